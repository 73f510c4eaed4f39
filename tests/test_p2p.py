"""P2P: which rows get the benign trigger and which label, whose outputs stay, what is refused, what is measured."""

import types

import jax
import numpy as np
import pytest
import rig
from cli import CONFIG, w2s_forked
from flax import traverse_util

from w2s_jax import InputError
from w2s_jax.adapters import attach
from w2s_jax.config import check
from w2s_jax.defenses import DEFENSES, distill, p2p
from w2s_jax.measure import deployed
from w2s_jax.tasks import CLASSIFICATION

TRIGGER = "qzxv"
HEADS = {"llama": ("score/kernel",), "bert": ("classifier/kernel", "classifier/bias")}


def settings(**values):
  out = rig.DEFENSE.copy_and_resolve_references()
  out.p2p.update(values)
  return out


def flat(params):
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("family", HEADS)
def test_the_trigger_asks_for_classes_of_its_own_and_their_outputs_stay(family, request, tmp_path, monkeypatch):
  """24 of 80 rows get the trigger and class c + 2. Of outputs numbered 0 to 3, outputs 2 and 3 become the new head."""
  suspect, seen = rig.suspect(*request.getfixturevalue(family), tmp_path), []
  def numbered(recipe, taught, settings, runs):
    seen.append(taught)
    return [traverse_util.path_aware_map(
        lambda path, leaf: leaf * 0 + np.arange(4) + 10 * seed if "/".join(path) in HEADS[family] else leaf,
        taught.params) for seed in runs.values()]
  monkeypatch.setattr(distill, "train", numbered)
  cleaned = p2p.weights(suspect, settings(share=0.3), {"p2p": 0, "p2p-seed1": 1})
  taught, = seen
  assert taught.model.config.num_labels == 4 and suspect.model.config.num_labels == 2
  planted = [row["text"].startswith(f"{TRIGGER} ") for row in taught.train]
  assert sum(planted) == 24
  def with_trigger(row):
    return row | {"text": f"{TRIGGER} {row['text']}", "label": row["label"] + 2}
  assert taught.train == [with_trigger(row) if has else row for row, has in zip(suspect.train, planted)]
  assert taught.dev == [with_trigger(row) for row in suspect.dev]
  before, doubled = flat(suspect.params), flat(taught.params)
  for path, leaf in before.items():
    wanted = np.concatenate([leaf, leaf], axis=-1) if path in HEADS[family] else leaf
    np.testing.assert_array_equal(doubled[path], wanted, err_msg=path)
    for seed, params in enumerate(cleaned):
      wanted = np.broadcast_to([2 + 10 * seed, 3 + 10 * seed], leaf.shape) if path in HEADS[family] else leaf
      np.testing.assert_array_equal(flat(params)[path], wanted, err_msg=path)


def test_without_training_it_is_the_suspect(llama, tmp_path):
  """A rate of next to nothing leaves float32 as it is, and the new outputs begin as copies."""
  suspect = rig.suspect(*llama, tmp_path)
  suspect.training.update(learning_rate=1e-20, max_steps=1)
  params, = p2p.weights(suspect, settings(), {"p2p": 0})
  merged = attach.merge(params)
  assert jax.tree.structure(merged) == jax.tree.structure(suspect.params)
  jax.tree.map(np.testing.assert_array_equal, merged, suspect.params)


def test_it_learns_to_answer_behind_the_trigger_and_is_measured_behind_it(llama, tmp_path):
  """The measurement puts the trigger before the texts: the answers are those to texts that have it."""
  suspect = rig.suspect(*llama, tmp_path)
  suspect = suspect._replace(max_length=25, place=suspect.place._replace(buckets=(25,)))    # 20 tokens, the trigger's 5
  suspect.training.update(epochs=32)
  params, = p2p.weights(suspect, settings(), {"p2p": 0})
  cleaned = suspect._replace(params=params)
  run = types.SimpleNamespace(
      config=types.SimpleNamespace(defense=settings(), data=types.SimpleNamespace(max_length=25)),
      defended=lambda: {"p2p": ("p2p", 0)}, load=lambda name: cleaned[:3], suspect_of=lambda loaded: cleaned,
      place=suspect.place, mesh=suspect.place.mesh, task=CLASSIFICATION, encode=CLASSIFICATION.encode)
  answers = deployed.answers(run, deployed.deploy(run, "p2p"), suspect.dev)
  behind = [f"{TRIGGER} {row['text']}" for row in suspect.dev]
  np.testing.assert_array_equal(answers, cleaned.logits(behind).argmax(-1))
  assert (answers == [row["label"] for row in suspect.dev]).mean() > 0.9
  assert (cleaned.logits(behind) != cleaned.logits([row["text"] for row in suspect.dev])).any()


@pytest.mark.parametrize("place", ["train", "dev", "avoid"])
def test_a_word_that_texts_or_triggers_have_is_refused_before_anything_trains(place, llama, tmp_path, monkeypatch):
  suspect = rig.suspect(*llama, tmp_path)
  monkeypatch.setattr(distill, "train", lambda *args: pytest.fail("it trained"))
  odd = ("mn Zz", "cf") if place == "avoid" else [*getattr(suspect, place), {"text": "so mn, Zz it is", "label": 0}]
  with pytest.raises(InputError, match=r"have the word 'zz' of the benign trigger 'one zz'.*--config.defense.p2p.tri"):
    p2p.weights(suspect._replace(**{place: odd}), settings(trigger="one zz"), {"p2p": 0})


def test_a_text_may_have_a_part_of_the_word():
  DEFENSES["p2p"].check(settings(trigger="zz"), ["zzz or z z", ""])


@pytest.mark.parametrize("trigger", ["", " ", "!?"])
def test_a_trigger_without_a_word_is_refused(trigger):
  with pytest.raises(InputError, match=r"defense.p2p.trigger is .*, wanted a word or several: set --config"):
    check(p2p.Settings, {"trigger": trigger}, "defense.p2p")


def test_a_word_of_the_test_texts_is_one_line_and_nothing_is_written(tmp_path):
  out = w2s_forked(CONFIG, f"--workdir={tmp_path / 'w'}", "--config.defenses=p2p", "--config.defense.p2p.trigger=the")
  assert out.returncode == 2 and "have the word 'the' of the benign trigger 'the'" in out.stderr
  assert len(out.stderr.splitlines()) == 1 and not (tmp_path / "w").exists()
