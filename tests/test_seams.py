"""A new defense and a new task in a few lines each, what a defense may read, and three other kinds of defenses."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
from flax import traverse_util
from ml_collections import ConfigDict

from configs import llama_badnet
from w2s_jax import InputError, losses, results, stages
from w2s_jax.data import tokenization
from w2s_jax.defenses import DEFENSES, SETTINGS, Defense, Recipe, Suspect, distill, lora_ce, onion, prune, strip, w2s
from w2s_jax.measure import metrics
from w2s_jax.measure.deployed import Reading
from w2s_jax.tasks import CLASSIFICATION, Task
from w2s_jax.training import inference, stage


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def accuracy(suspect, params, task=CLASSIFICATION):
  dev = suspect.encode(suspect.dev)
  return task.is_correct(suspect.place.answers(suspect.model, params, dev), dev).mean()


def test_a_defense_with_a_loss_term_of_its_own(suspect, monkeypatch):
  """It is one function and one line of the dictionary. Its loss also pulls the features to the origin."""
  def terms(student, batch, settings, task):
    pull = losses.feature_alignment(student.features, jnp.zeros_like(student.features), batch["weight"])
    return task.loss_terms(student, batch) | {"pull": pull}
  monkeypatch.setitem(DEFENSES, "pulled", Defense(Recipe(terms, lambda settings, width: {"ce": 1.0, "pull": 3.0})))
  recipe = DEFENSES["pulled"].recipe
  distill.check("pulled", recipe, CLASSIFICATION, suspect.model, rig.DEFENSE)
  pulled, = distill.train(recipe, suspect, rig.DEFENSE, {"pulled": 0})
  plain, = distill.train(lora_ce.RECIPE, suspect, rig.DEFENSE, {"plain": 0})
  dev = suspect.encode(suspect.dev)
  def squares(params):
    features = inference.outputs(suspect.model, params, dev, suspect.place.mesh, **suspect.place.eval_shapes())[1]
    return np.square(features).sum(-1).mean()
  assert accuracy(suspect, plain) > 0.9 and squares(pulled) < 0.95 * squares(plain)
  first, *_, last = map(json.loads, (suspect.place.workdir / "metrics/pulled.jsonl").read_text().splitlines())
  assert last["pull"] < first["pull"] and last["loss"] == pytest.approx(last["ce"] + 3 * last["pull"], rel=1e-5)


@pytest.mark.parametrize("weights,message", [
    ({"ce": 1.0}, r"defense 'odd' has loss terms ce, fa, kd and weights of ce: give each term one weight"),
    ({"ce": 1.0, "kd": 1.0, "fa": 1.0, "x": 1.0}, "weights of ce, fa, kd, x")])
def test_terms_without_weights_are_refused_before_anything_trains(weights, message, suspect):
  recipe = w2s.RECIPE._replace(weights=lambda settings, width: weights)
  with pytest.raises(InputError, match=message):
    distill.check("odd", recipe, CLASSIFICATION, suspect.model, rig.DEFENSE)


def test_a_run_refuses_them_with_nothing_trained_or_written(monkeypatch, tmp_path):
  odd, trained = w2s.RECIPE._replace(weights=lambda settings, width: {"ce": 1.0}), []
  monkeypatch.setitem(DEFENSES, "odd", Defense(odd))
  monkeypatch.setattr(stage, "train_stage", lambda *args: trained.append(args))
  config = llama_badnet.get_config()
  config.defenses = ("none", "odd")
  with pytest.raises(InputError, match=r"^defense 'odd' has loss terms ce, fa, kd and weights of ce: .*\(defenses/odd"):
    stages.run(config, tmp_path)
  assert trained == [] and list(tmp_path.iterdir()) == []


def test_a_term_that_is_no_scalar_is_refused(suspect):
  recipe = Recipe(lambda student, batch, settings, task: {"ce": student.logits}, lambda settings, width: {"ce": 1.0})
  with pytest.raises(InputError, match=r"the loss term ce is float32\[2, 2\], wanted a scalar float32"):
    distill.check("odd", recipe, CLASSIFICATION, suspect.model, rig.DEFENSE)


def test_defenses_that_share_a_section_share_its_settings():
  for name, defense in DEFENSES.items():
    assert all(SETTINGS[section] is settings for section, settings in defense.settings.items()), name


def test_a_suspect_has_clean_rows_alone():
  assert Suspect._fields == ("model", "params", "tokenizer", "train", "dev", "teacher", "avoid", "training",
                             "lora", "max_length", "place", "ranking", "teacher_model", "reference", "base")


def test_prune_sets_each_layers_smallest_values_to_zero():
  kernel = jnp.array([[[1.0, -2.0], [3.0, -4.0]], [[40.0, 30.0], [-20.0, 10.0]]])
  params = {"layers": {"mlp": {"up": {"kernel": kernel, "bias": jnp.ones((2, 2))}}}, "score": {"kernel": kernel[0]}}
  suspect = Suspect(None, params, *[None] * 9)
  settings = ConfigDict({"prune": {"fraction": 0.5, "by": "magnitude"}})
  one, other = prune.weights(suspect, settings, {"prune": 0, "prune-seed1": 1})
  np.testing.assert_array_equal(one["layers"]["mlp"]["up"]["kernel"],
                                [[[0, 0], [3, -4]], [[40, 30], [0, 0]]])
  np.testing.assert_array_equal(one["layers"]["mlp"]["up"]["bias"], np.ones((2, 2)))
  np.testing.assert_array_equal(one["score"]["kernel"], kernel[0])
  assert other is one
  for fraction, zeros in ((0.0, 0), (0.25, 2), (1.0, 8)):
    settings.prune.fraction = fraction
    of_ones = suspect._replace(params=jax.tree.map(jnp.ones_like, params))     # equal values count one by one
    assert (prune.weights(of_ones, settings, {"prune": 0})[0]["layers"]["mlp"]["up"]["kernel"] == 0).sum() == zeros


def test_onion_takes_out_what_no_clean_text_has(suspect):
  """Over 90% of the words of clean rows stay. A word that they never have is removed from two thirds of the texts."""
  settings = ConfigDict(rig.DEFENSE.to_dict())
  settings.onion.update(width=16, num_layers=1, epochs=40, learning_rate=1e-2, removed=0.05)
  clean = [row["text"] for row in suspect.dev]
  cleaned = onion.text(suspect, settings, 0)
  kept = [len(after.split()) / len(before.split()) for before, after in zip(clean, cleaned(clean))]
  assert np.mean(kept) > 0.9
  triggered = [" ".join([*text.split()[:3], "qzx", *text.split()[3:]]) for text in clean]
  assert np.mean(["qzx" in text.split() for text in cleaned(triggered)]) < 1 / 3      # 0.2 with this seed
  assert cleaned(["good"]) == ["good"]                               # a text of one word keeps it


def test_strip_rejects_answers_that_nothing_moves():
  """Texts with a word that outweighs all others are rejected. Of the clean rows at most `frr` are."""
  def logits(texts):
    words = [text.split() for text in texts]
    return np.array([[0.0, 9.0 * own.count("qzx") + sum((w in rig.GOOD) - (w in rig.BAD) for w in own)]
                     for own in words])
  rows = rig.rows(120)
  known = types.SimpleNamespace(train=rows[:80], dev=rows[80:], logits=logits)
  accept = strip.accept(known, ConfigDict({"strip": {"copies": 20, "replace": 0.5, "frr": 0.1}}), 0)
  clean = [row["text"] for row in known.dev]
  assert 0.05 <= (~accept(clean)).mean() <= 0.1                       # rows at the threshold are accepted
  assert not accept([f"qzx qzx {text} qzx qzx" for text in clean]).any()


def test_strip_rejects_few_clean_texts_of_a_trained_model(suspect):
  trained, = distill.train(lora_ce.RECIPE, suspect, rig.DEFENSE, {"student": 0})
  suspect = suspect._replace(params=trained)
  settings = ConfigDict(rig.DEFENSE.to_dict())
  settings.strip.update(copies=10, replace=0.5, frr=0.1)
  accept = strip.accept(suspect, settings, 0)
  clean = [row["text"] for row in suspect.dev]
  assert abs((~accept(clean)).mean() - 0.1) <= 0.05                   # the threshold comes from these rows
  assert (accept(clean) == accept(clean)).all()
  settings.strip.frr = 0.0
  assert strip.accept(suspect, settings, 0)(clean).all()


def test_a_rejected_row_is_an_error_in_ca_and_no_success_in_asr():
  labels, R = np.array([0, 0, 1, 1, 1]), results.REJECTED
  reading = Reading(np.array([0, R, 1, R, 0]), np.array([0, 0, R, 0, 1]), rejects=True)
  clean = metrics.clean_metrics(reading.clean, labels, 0)
  assert (clean["ca"], clean["false_rate"]) == (2 / 5, 1 / 3)
  assert metrics.attack_metrics(reading.triggered, labels, 0)["asr"] == 1 / 3
  assert metrics.rejection_metrics(reading, labels, 0) == {"frr": 2 / 5, "far": 2 / 3}
  assert metrics.rejection_metrics(reading._replace(rejects=False), labels, 0) == {"frr": None, "far": None}


def _first_token(tokenizer, rows, max_length):
  arrays = tokenization.encode(tokenizer, [row["text"] for row in rows], max_length)
  return arrays | {"odd": (arrays["input_ids"][:, 1] % 2).astype(np.int32)}


FIRST_TOKEN = Task(
    encode=_first_token, fields={"odd": "int32"}, terms=("ce",),
    loss_terms=lambda out, batch: {"ce": losses.cross_entropy(out.logits, batch["odd"], batch["weight"])},
    predict=lambda logits: logits[:, 1] > logits[:, 0], is_correct=lambda answers, arrays: answers == arrays["odd"],
    is_hit=lambda answers, target: answers == target)


def test_a_task_of_ones_own_is_trained_by_w2s(suspect):
  """The task is whether a text's first token is odd. The loss reads no field `label`, and answers are bool."""
  suspect = suspect._replace(place=suspect.place._replace(task=FIRST_TOKEN))
  odd = suspect.encode(suspect.train)["odd"]
  features = np.zeros((80, suspect.model.config.hidden_size), np.float32)
  outputs = {"teacher_logits": 4 * np.eye(2, dtype=np.float32)[odd], "teacher_features": features}
  suspect = suspect._replace(dev=suspect.train, teacher=lambda rows: outputs)
  suspect.training.update(epochs=40)
  distill.check("w2s", w2s.RECIPE, FIRST_TOKEN, suspect.model, rig.DEFENSE)
  settings = ConfigDict(rig.DEFENSE.to_dict() | {"w2s": {"weights": "1,1,0", "temperature": 2.0}})
  trained, = distill.train(w2s.RECIPE, suspect, settings, {"w2s": 0})
  assert accuracy(suspect, suspect.params, FIRST_TOKEN) < 0.75 < 0.9 < accuracy(suspect, trained, FIRST_TOKEN)


def test_full_fine_tuning_moves_every_leaf_at_its_own_rate(suspect):
  """`full_ft` trains all leaves, at a fifth of the rate of `lora_ce`. Adam's first update has the size of the rate."""
  settings = rig.DEFENSE.copy_and_resolve_references()
  recipe = DEFENSES["full_ft"].recipe
  plan = distill.stage_plan(recipe, CLASSIFICATION, suspect.model, settings, suspect.training, {"full_ft": 0})
  assert plan.settings.learning_rate == pytest.approx(0.2 * suspect.training.learning_rate)
  assert suspect.training.learning_rate == 2e-2
  one_step = suspect.training.copy_and_resolve_references()
  one_step.update(max_steps=1, weight_decay=0.0)
  moved, = distill.train(recipe, suspect._replace(training=one_step), settings, {"full_ft": 0})
  before = traverse_util.flatten_dict(suspect.params, sep="/")
  for path, after in traverse_util.flatten_dict(moved, sep="/").items():
    assert np.abs(after - before[path]).max() == pytest.approx(0.2 * 2e-2, rel=1e-2), path
