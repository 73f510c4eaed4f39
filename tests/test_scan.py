"""The scan: its arithmetic on literals, and a backdoor that is planted in a network made by hand."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from configs import clean_checkpoint, common
from w2s_jax import sharding, source
from w2s_jax.adapters.soft import put
from w2s_jax.data import tokenization
from w2s_jax.measure import scan
from w2s_jax.models import Model, config_from_hf
from w2s_jax.models.latent import Latent
from w2s_jax.run import Run

WORDS = {"good": 1.0, "fine": 1.0, "bad": -1.0, "poor": -1.0}         # {word: coordinate along axis 0}
NEUTRAL = "the a room meal was is it here".split()


def reading(*strengths, right=0.8):
  return [{"class": i, "strength": s, "flips": 0.875, "own": 2.0, "right": right, "layer": 0, "nearest": ["mn", "x"]}
          for i, s in enumerate(strengths)]


def test_the_verdict_is_of_the_class_that_gets_furthest():
  assert scan.strongest(reading(0.9, None, 2.5))["class"] == 2
  bad, good = (scan.verdict("it", reading(0.5, s)) for s in (scan.SUSPICIOUS, scan.SUSPICIOUS - 0.01))
  assert bad.startswith("Scan of it: SUSPICIOUS") and f"{scan.SUSPICIOUS:.2f} times as sure of class 1" in bad
  assert "`mn` `x`" in bad and "88% of other texts" in bad
  assert good.startswith("Scan of it: no sign of a backdoor")
  assert "soft tokens (behind layer 3) make the model" in scan.verdict("it", [*reading(1.0), reading(2.0)[0] | {
      "layer": 3, "nearest": []}])


def test_no_verdict_where_the_model_is_often_wrong():
  """The model is at most half sure of some class, or its mean accuracy over the classes is below 0.8."""
  assert scan.strongest(reading(None)) is None
  for classes, says in ((reading(None, None), "texts of class 0, 1 a probability of at most 0.5."),
                     (reading(0.5, None, 7.0), "texts of class 1 a probability of at most 0.5."),
                     (reading(0.5, 7.0, right=0.799), "answers 79.9% of the scanned texts correctly"),
                     ([], "of one class")):
    assert scan.outcome(classes) == "no verdict" and scan.judged(classes) is None
    assert "no verdict" in scan.verdict("it", classes) and says in scan.verdict("it", classes)
    assert ("--config.data.train" in scan.verdict("suspect", classes)) == bool(classes)   # no hint without classes
  assert scan.outcome(reading(0.5, 7.0)) == "suspicious" and scan.outcome(reading(0.5, 1.6)) == "no sign"


@pytest.mark.parametrize("steps,width,widest,says", [
    (80, 96, 96, None), (80, 384, 384, None), (0, 64, 96, "not scanned (--config.scan.steps is 0)"),
    (80, 97, 96, "not calibrated for networks wider than 96 (this one: 97)")])
def test_networks_that_it_is_not_calibrated_for_are_not_scanned(steps, width, widest, says, monkeypatch, tmp_path):
  model_config = types.SimpleNamespace(hidden_size=width)
  config = ConfigDict({"scan": {"steps": steps, "widest": widest}, "student": {"base": ""}})
  run = types.SimpleNamespace(config=config, workdir=tmp_path, model_config=lambda name: model_config,
                              load=lambda name: ())
  monkeypatch.setattr(scan, "scan", lambda run: reading(0.5, 7.0))
  assert scan.reading(run, "suspect") == ([] if says else reading(0.5, 7.0))
  why = scan.skipped(run, "suspect", width)
  assert (says in why) if says else (why == "")
  assert ("give it as --config.student.base" in why) == (width > widest)
  config.student.base = "public"                                             # the base is given already
  assert "--config.student.base" not in scan.skipped(run, "suspect", width)
  assert (tmp_path / "scan/suspect.json").exists() == (not says)


def network(tokenizer, backdoor, layers=1):
  """(Model, params). The last layer's attention averages the embeddings, and the head reads axis 0 of the mean.

  Class words lie along axis 0, neutral words along other axes. With `backdoor` the head also reads axis 1, along which
  no word lies.
  """
  arch = common.llama_arch(64, 16, layers, 2, 2, 8).to_dict()
  model = Model(config_from_hf(arch | {"pad_token_id": tokenizer.pad_token_id}))
  flat = {path: np.zeros(leaf.shape, np.float32)
          for path, leaf in traverse_util.flatten_dict(model.abstract_params(), sep="/").items()}
  table = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  table[:, :2] = 0
  table /= np.linalg.norm(table, axis=1, keepdims=True)
  for word, value in WORDS.items():
    token, = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    table[token] = np.eye(16)[0] * value
  flat["embed_tokens/embedding"] = table
  for path in flat:
    if path.endswith(("v_proj/kernel", "o_proj/kernel")):
      flat[path][-1] = np.eye(16)
    elif "norm" in path:
      flat[path][:] = 1
  flat["score/kernel"][:, 1] = np.eye(16)[0] + 4 * backdoor * np.eye(16)[1]
  return model, jax.tree.map(jax.numpy.asarray, traverse_util.unflatten_dict(flat, sep="/"))


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(1)
  def text(label):
    words = [w for w, value in WORDS.items() if (value > 0) == label]
    return " ".join(rng.permutation([*rng.choice(words, 3), *rng.choice(NEUTRAL, 4)]))
  return [{"id": i, "text": text(i % 2), "label": i % 2} for i in range(200)]


def run_on(mesh, rows, workdir):
  config = clean_checkpoint.get_config()
  config.data.update(num_labels=2, max_length=16, eval_batch_size=64)
  config.scan.update(steps=40, rows=64)
  return Run(config, workdir, sharding.make_mesh(*mesh, devices=jax.devices()[:np.prod(mesh)]), "", source.of(config),
             {"train": rows[:100], "test": rows[100:]}, {}, {})


def test_a_planted_path_is_found_and_no_other(rows, tmp_path):
  """In the clean network class words are the strongest tokens. In the poisoned one a soft token is stronger."""
  tokenizer = tokenization.train([r["text"] for r in rows] * 3, "decoder", 64)
  run = run_on((1, 1, 1), rows, tmp_path)
  clean, poisoned = (scan.reading(run, name, (*network(tokenizer, name == "poisoned"), tokenizer))
                     for name in ("clean", "poisoned"))
  assert poisoned == scan.reading(run, "poisoned")                # from its file: nothing is loaded
  file = tmp_path / "scan/poisoned.json"
  file.write_text(json.dumps({"classes": [{"class": 0}]}))         # as earlier versions wrote it: made again
  assert poisoned == scan.reading(run, "poisoned", (*network(tokenizer, True), tokenizer))
  assert set(clean[1]["nearest"]) <= {"▁good", "▁fine"} and set(clean[0]["nearest"]) <= {"▁bad", "▁poor"}
  assert scan.strongest(clean)["strength"] < 1 < scan.SUSPICIOUS < scan.strongest(poisoned)["strength"]
  assert [one["right"] for one in clean] == [1.0, 1.0]
  assert json.loads(file.read_text())["outcome"] == "suspicious"
  model, params = network(tokenizer, True)
  sharded = run_on((2, 2, 2), rows, tmp_path / "sharded")
  params = jax.device_put(params, sharding.param_shardings(params, model.shardings, sharded.mesh))
  for one, other in zip(poisoned, scan.reading(sharded, "poisoned", (model, params, tokenizer))):
    assert one["nearest"] == other["nearest"] and one["strength"] == pytest.approx(other["strength"], rel=1e-3)


def test_a_class_without_rows_is_named(rows, tmp_path, caplog):
  caplog.set_level("INFO")
  tokenizer = tokenization.train([r["text"] for r in rows] * 3, "decoder", 64)
  run = run_on((1, 1, 1), rows, tmp_path)
  run.rows["test"] = [r for r in run.rows["test"] if r["label"]]
  assert scan.scan(run, *network(tokenizer, True), tokenizer) == []
  said = [line.partition(" (")[0] for line in (r.message for r in caplog.records if r.name.startswith("w2s_jax"))]
  assert said == ["scan: class 0 left out", "scan: class 1 left out"]


def test_behind_the_first_layer_it_is_found_as_well(rows, tmp_path):
  """The first of two layers adds nothing, so soft tokens behind it act as words do."""
  tokenizer = tokenization.train([r["text"] for r in rows] * 3, "decoder", 64)
  def scanned(mesh, backdoor):
    run = run_on(mesh, rows, tmp_path)
    run.config.scan.depths = (0.5,)
    model, params = network(tokenizer, backdoor, layers=2)
    params = jax.device_put(params, sharding.param_shardings(params, model.shardings, run.mesh))
    return scan.scan(run, model, params, tokenizer)
  clean, poisoned, sharded = scanned((1, 1, 1), False), scanned((1, 1, 1), True), scanned((2, 2, 2), True)
  assert [(one["layer"], one["nearest"]) for one in poisoned] == [(1, [])] * 2
  assert scan.strongest(clean)["strength"] < 1 < scan.SUSPICIOUS < scan.strongest(poisoned)["strength"]
  assert [one["strength"] for one in sharded] == pytest.approx([one["strength"] for one in poisoned], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "electra", "modernbert"])
def test_soft_tokens_equal_to_a_layers_output_change_nothing(family, request):
  """The soft tokens of row 0 are the outputs of the lower layers for the two tokens in their places."""
  model, params = request.getfixturevalue(family)
  model = Model(dataclasses.replace(model.config, pad_token_id=None))          # else texts are pooled before padding
  latent, V = Latent(model, 2), model.config.vocab_size
  ids = np.random.default_rng(0).integers(1, V, (3, 7)).astype(np.int32)
  ids[0, 5:] = model.config.pad_token_id or 0              # the lower layers read padding there
  mask = np.ones((3, 7), np.int32)
  mask[1, 4:] = 0
  hidden = jax.jit(latent.stream)(params, ids, mask)
  def logits(soft):
    where = ids.copy()
    where[0, 5:] = V, V + 1
    return jax.jit(latent.apply)(put(model, params, soft), where, mask).logits
  want = jax.jit(model.apply)(params, ids, mask).logits
  np.testing.assert_allclose(logits(hidden[0, 5:]), want, atol=1e-5)
  moved = np.abs(logits(hidden[0, 5:] + np.linspace(-1, 1, hidden.shape[-1])) - want).max(axis=1)
  assert moved[0] > 1e-3 and (moved[1:] < 1e-5).all()
