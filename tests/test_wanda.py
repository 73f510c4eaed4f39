"""Pruning by Wanda: the norms of the kernels' inputs, and which weights are set to zero."""

import numpy as np
import pytest
import rig
import torch
import transformers
from flax import traverse_util
from ml_collections import ConfigDict

from w2s_jax import quantized
from w2s_jax.defenses import Suspect, prune
from w2s_jax.models import save_pretrained


def settings(**values):
  return ConfigDict({"prune": {"fraction": 0.3, "by": "wanda", "rows": 128} | values})


def kernels(params):
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
          if quantized.is_layer_kernel(path)}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_norms_are_those_of_what_pytorchs_layers_read(family, request, tmp_path):
  """Ours reads packed batches with padding, PyTorch reads one text at a time."""
  model, params = request.getfixturevalue(family)
  suspect = rig.suspect(model, params, tmp_path)
  suspect = suspect._replace(train=suspect.train[:40])
  save_pretrained(tmp_path / "model", model, params)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
  squares = {}
  def watch(name):
    def hook(module, args):
      squares[name] = squares.get(name, 0) + args[0].detach().square().sum((0, 1)).numpy()
    return hook
  for name, module in theirs.named_modules():
    if isinstance(module, torch.nn.Linear):
      module.register_forward_pre_hook(watch(f"{name}.weight"))
  arrays = suspect.encode(suspect.train)
  assert len(set(arrays["length"])) > 5
  for ids, length in zip(arrays["input_ids"], arrays["length"]):
    theirs(torch.tensor(ids[None, :length]).long(), attention_mask=torch.ones(1, length))
  norms, names = prune.input_norms(suspect, 40), model.weight_names()
  assert norms.keys() == kernels(params).keys()
  for path, ours in norms.items():
    wanted = [np.sqrt(squares[names[path].format(layer)]) for layer in range(model.config.num_layers)]
    np.testing.assert_allclose(ours, wanted, rtol=2e-4, err_msg=path)
    assert (np.square(prune.input_norms(suspect, 10)[path]).sum() < 0.5 * np.square(ours).sum())


def test_each_output_loses_its_smallest_products(monkeypatch):
  """By hand: the scores are [[10, 20], [3, 4], [5, 0.5]] in layer 0, and plain magnitudes in layer 1."""
  kernel = np.float32([[[1, -2], [3, 4], [-5, 0.5]], [[6, 1], [5, -2], [-4, 3]]])
  params = {"layers": {"up": {"kernel": kernel, "bias": np.ones((2, 2))}}, "score": {"kernel": kernel[0]}}
  monkeypatch.setattr(prune, "input_norms", lambda suspect, rows: {
      "layers/up/kernel": np.float32([[10, 1, 1], [1, 1, 1]])})
  suspect = Suspect(None, params, *[None] * 9)
  pruned, other = prune.weights(suspect, settings(fraction=1 / 3), {"prune": 0, "prune-seed1": 1})
  np.testing.assert_array_equal(pruned["layers"]["up"]["kernel"],
                                [[[1, -2], [0, 4], [-5, 0]], [[6, 0], [5, -2], [0, 3]]])
  np.testing.assert_array_equal(pruned["score"]["kernel"], kernel[0])
  np.testing.assert_array_equal(pruned["layers"]["up"]["bias"], np.ones((2, 2)))
  assert other is pruned


def test_of_a_whole_model_each_output_loses_the_fraction(llama, tmp_path):
  model, params = llama
  suspect = rig.suspect(model, params, tmp_path)
  wanda, = prune.weights(suspect, settings(fraction=0.25), {"prune": 0})
  magnitude, = prune.weights(suspect, settings(fraction=0.25, by="magnitude"), {"prune": 0})
  for path, pruned in kernels(wanda).items():
    assert ((pruned == 0).sum(axis=1) == round(0.25 * pruned.shape[1])).all(), path
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], kernels(params)[path][kept])
    assert (kept != (kernels(magnitude)[path] != 0)).any()
