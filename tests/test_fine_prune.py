"""Fine-Pruning: which units die, that dead units may as well be cut out, and that they stay dead in training."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import torch
import transformers
from flax import traverse_util

from w2s_jax.defenses import DEFENSES, distill, fine_prune
from w2s_jax.models import Model, config_from_hf, save_pretrained
from w2s_jax.models.model import FAMILIES, model_types

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=0)
GROUPED = SHAPE | dict(num_key_value_heads=2, head_dim=8)
CONFIGS = {       # every family; Phi-3 makes gate and up in one kernel, like ModernBERT
    "llama": GROUPED | dict(mlp_bias=True), "phi3": SHAPE | dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
    "gemma2": GROUPED | dict(sliding_window=4), "gpt2": dict(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_inner=48,
                                                             n_positions=64, pad_token_id=0),
    "bert": SHAPE, "deberta-v2": SHAPE | dict(relative_attention=True, position_biased_input=False,
                                              pos_att_type=["p2c", "c2p"]),
    "modernbert": SHAPE | dict(mlp_bias=True, local_attention=4),
}
SHARE, UNITS, DEAD = 0.26, 48, 12      # 0.26 * 48 is 12.48


def settings(share):
  out = rig.DEFENSE.copy_and_resolve_references()
  out.fine_prune.share = share
  return out


def flat(params):
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def pruned(suspect, share=SHARE):
  params, arrays = fine_prune.start(suspect, settings(share), suspect.params, {"x": 1}, 0)
  assert arrays == {"x": 1}
  return params


def dead_units(params):
  """[L, F] bool: units whose outgoing weights are all zero."""
  return np.stack([(leaf == 0).all(axis=-1) for path, leaf in flat(params).items()
                   if re.fullmatch(fine_prune.READS_UNITS, path)][0])


@pytest.fixture
def suspect(request, tmp_path):
  """Suspect of a family; norms and biases are random, too."""
  model = Model(config_from_hf({"model_type": request.param} | CONFIGS[request.param]))
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda leaf: jnp.float32(0.5 * rng.standard_normal(leaf.shape)), model.abstract_params())
  return rig.suspect(model, params, tmp_path)


def of(*names):
  return pytest.mark.parametrize("suspect", names, indirect=True)


def test_every_family_is_tested():
  assert {id(model_types()[name]) for name in CONFIGS} == {id(family) for family in FAMILIES.values()}


@of(*CONFIGS)
def test_the_units_with_the_smallest_activations_die(suspect, tmp_path):
  """The activations are the inputs of PyTorch's layer behind the units, one text at a time."""
  model = suspect.model
  save_pretrained(tmp_path / "model", model, suspect.params)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
  name, = (name for path, name in model.weight_names().items() if re.fullmatch(fine_prune.READS_UNITS, path))
  activations = [[] for _ in range(model.config.num_layers)]
  for layer, read in enumerate(activations):
    theirs.get_submodule(name.format(layer).removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args, read=read: read.append(args[0].detach().reshape(-1, UNITS)))
  arrays = suspect.encode(suspect.train)
  with torch.no_grad():
    for ids, length in zip(arrays["input_ids"], arrays["length"]):
      theirs(torch.tensor(ids[None, :length]).long(), attention_mask=torch.ones(1, length))
  norms = np.stack([np.linalg.norm(np.concatenate(read), axis=0) for read in activations])
  dead = dead_units(pruned(suspect))
  assert (dead.sum(axis=1) == DEAD).all()
  assert (np.where(dead, norms, -np.inf).max(axis=1) < np.where(dead, np.inf, norms).min(axis=1)).all()


@of(*CONFIGS)
def test_a_model_with_dead_units_is_the_model_without_them(suspect):
  """A network of 36 instead of 48 units, with the columns and rows of the living ones, has the same logits."""
  params = pruned(suspect)
  living = [np.flatnonzero(~dead) for dead in dead_units(params)]
  def cut(path, leaf, before):
    if "/mlp/" not in path or leaf.shape == (len(living), 32):                           # or the bias after the units
      np.testing.assert_array_equal(leaf, before, err_msg=path)
      return leaf
    axis = 0 if re.fullmatch(fine_prune.READS_UNITS, path) else -1
    halves = range(leaf.shape[1:][axis] // UNITS)
    return np.stack([np.take(own, np.concatenate([kept + UNITS * half for half in halves]), axis)
                     for own, kept in zip(before, living)])
  before = flat(suspect.params)
  small = traverse_util.unflatten_dict({path: cut(path, leaf, before[path]) for path, leaf in flat(params).items()},
                                       sep="/")
  narrow = Model(dataclasses.replace(suspect.model.config, intermediate_size=UNITS - DEAD))
  arrays = suspect.encode(suspect.dev)
  wanted = suspect.place.logits(narrow, small, arrays)
  np.testing.assert_allclose(suspect.place.logits(suspect.model, params, arrays), wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(suspect.place.logits(suspect.model, suspect.params, arrays) - wanted).max() > 1e-2


@of("llama", "bert")
def test_dead_units_stay_dead_in_the_training(suspect):
  """The weights and biases of dead units stay exactly zero, in spite of weight decay. Those of living units move."""
  suspect.training.update(max_steps=6)
  begin = flat(pruned(suspect))
  trained, = distill.train(fine_prune.RECIPE, suspect, settings(SHARE), {"fine_prune": 0})
  np.testing.assert_array_equal(dead_units(trained), dead_units(pruned(suspect)))
  for path, after in flat(trained).items():
    if "/mlp/" in path:
      np.testing.assert_array_equal(after[begin[path] == 0], 0, err_msg=path)
      assert (after != begin[path])[begin[path] != 0].mean() > 0.9, path


@of("llama")
def test_a_share_of_0_is_full_fine_tuning(suspect):
  jax.tree.map(np.testing.assert_array_equal, pruned(suspect, 0.0), suspect.params)
  assert fine_prune.RECIPE._replace(augment=None) == DEFENSES["full_ft"].recipe
