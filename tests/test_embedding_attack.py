"""Embedding Poisoning: one row of one leaf changes, and the trigger then gives the target label."""

import json
import shutil

import jax
import numpy as np
import pytest
import rig
from cli import CONFIG, SHORT, w2s_forked
from flax import traverse_util
from safetensors.numpy import load_file

from w2s_jax import InputError
from w2s_jax.adapters import trees
from w2s_jax.data import poison, tokenization
from w2s_jax.training import embedding_row, stage

WORD = "w"                     # a token of the tiny tokenizer that no text has
TARGET = 1


@pytest.fixture(scope="module")
def clean(llama, tmp_path_factory):
  """(suspect, parameters after fine-tuning on its clean rows)."""
  model, params = llama
  suspect = rig.suspect(model, params, tmp_path_factory.mktemp("clean"))
  plan = stage.task_plan(suspect.place.task, "clean", 0, model, trees.FULL, suspect.training)
  params, = stage.train_stage(plan, [params], [suspect.encode(suspect.train)], suspect.encode(suspect.dev),
                              suspect.place)
  return suspect, params


def attacked(suspect, params, rows, workdir, epochs=16):
  training = suspect.training.copy_and_resolve_references()
  training.epochs = epochs
  plan = stage.task_plan(suspect.place.task, "poison", 0, suspect.model, (), training)
  return embedding_row.trained(plan, params, suspect.encode(rows), embedding_row.token_of(suspect.tokenizer, WORD),
                               suspect.place._replace(workdir=workdir))


def flat(tree):
  return traverse_util.flatten_dict(jax.tree.map(np.array, tree))


def test_one_row_changes_and_the_trigger_works(clean, tmp_path):
  """The trigger is the last word, where a decoder is pooled, because the tiny model attends badly to other words."""
  suspect, params = clean
  options = dict(target_label=TARGET, seed=0, tokenizer=suspect.tokenizer, max_length=16, keep_trigger=True)
  attack = poison.make_attack("suffix", WORD)
  train = poison.poison_train(suspect.train, attack, label="dirty", count=30, **options)
  triggered = suspect.encode(poison.triggered_eval(suspect.dev, attack, **options))
  before = flat(params)
  new = attacked(suspect, params, [row for row in train if row["poisoned"]], tmp_path)

  after, table = flat(new), (*suspect.model.vocabulary, "embedding")
  assert after.keys() == before.keys()
  assert [path for path in after if after[path].tobytes() != before[path].tobytes()] == [table]
  token = suspect.tokenizer.convert_tokens_to_ids(f"▁{WORD}")
  assert np.flatnonzero((after[table] != before[table]).any(axis=-1)).tolist() == [token]
  assert np.linalg.norm(after[table][token]) <= np.linalg.norm(before[table][token]) * (1 + 1e-5)

  def hits(params):
    return (suspect.place.answers(suspect.model, params, triggered) == TARGET).mean()
  assert hits(params) < 0.2 and hits(new) > 0.8
  dev = suspect.encode(suspect.dev)
  logits = [suspect.place.logits(suspect.model, tree, dev) for tree in (params, new)]
  assert (logits[0] == logits[1]).all() and (logits[0].argmax(-1) == dev["label"]).mean() > 0.9


def test_without_the_trigger_nothing_changes_and_a_repeat_is_the_same(clean, tmp_path):
  """Texts without the trigger give the trigger's embedding no gradient."""
  suspect, params = clean
  rows = [row | {"text": f"{row['text']} {WORD}", "label": TARGET} for row in suspect.train]
  def bytes_of(tree):
    return {path: leaf.tobytes() for path, leaf in flat(tree).items()}
  def attack(name, rows):
    return bytes_of(attacked(suspect, params, rows, tmp_path / name, epochs=2))
  first = attack("first", rows)
  assert attack("untriggered", suspect.train) == bytes_of(params) != first == attack("again", rows)


def test_a_trigger_that_is_not_one_token_is_refused():
  tokenizer = tokenization.train([row["text"] for row in rig.rows(120)], "decoder", 64)
  assert tokenizer.convert_ids_to_tokens(embedding_row.token_of(tokenizer, "meal")) == "▁meal"
  for word in ("mn", "q", "meal room"):                               # three tokens, an unknown letter, two words
    with pytest.raises(InputError, match=r"needs a trigger of one known token, .*: set --config.attack.trigger to a"):
      embedding_row.token_of(tokenizer, word)


def test_a_run_poisons_the_clean_student_in_one_row(tmp_path):
  """Only the trigger's embedding differs from the clean student. A trigger of two tokens is refused at once."""
  args = (CONFIG, *SHORT, "--config.attack.name=embedding", "--config.attack.label=mixed")
  out = w2s_forked(*args, f"--workdir={tmp_path / 'refused'}")
  assert out.returncode == 2 and "one known token, 'mn' is ▁m n" in out.stderr and not (tmp_path / "refused").exists()
  workdir = tmp_path / "w"
  for name in ("warmup", "poison"):
    out = w2s_forked(*args, "--config.attack.trigger=bus", f"--workdir={workdir}", f"--stage={name}")
    assert out.returncode == 0, out.stderr
  clean, poisoned, base = (load_file(workdir / f"models/{name}/model.safetensors")
                           for name in ("clean", "poisoned", "base"))
  changed = [name for name in clean if clean[name].tobytes() != poisoned[name].tobytes()]
  assert changed == ["model.embed_tokens.weight"] and clean.keys() == poisoned.keys()
  moved = (clean[changed[0]] != poisoned[changed[0]]).any(axis=-1)
  token = json.loads((workdir / "models/poisoned/tokenizer.json").read_text())["model"]["vocab"]["▁bus"]
  assert np.flatnonzero(moved).tolist() == [token]
  assert (clean["score.weight"] != base["score.weight"]).any()
  copied = tmp_path / "copied"
  shutil.copytree(workdir / "models/base", copied / "models/base")
  out = w2s_forked(*args, f"--workdir={copied}")
  assert out.returncode == 2 and "one known token" in out.stderr and not (copied / "config.json").exists()
