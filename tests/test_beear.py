"""BEEAR has PyTorch's perturbation, loss and gradient, perturbs real tokens alone, and at size 0 is `lora_ce`."""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import rig
import test_packing
import torch
from flax import traverse_util
from test_models import SHAPES, padded_ids, torch_model
from test_packing import LENGTHS

from w2s_jax import InputError
from w2s_jax.defenses import beear, distill, lora_ce
from w2s_jax.models import Model, load_pretrained
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import steps


def settings(**own):
  known = rig.DEFENSE.copy_and_resolve_references()
  known.beear.update(dict(depth=0.5, ascents=2, size=0.5, weight=0.5) | own)
  return known


def values(model, params, batch, **own):
  """{term: scalar} of a batch, without dropout."""
  def terms(params, batch):
    out = beear.forward(model, params, batch, None, settings(**own))
    return beear.terms(out, batch, settings(**own), CLASSIFICATION)
  return jax.jit(terms)(params, batch)


@contextlib.contextmanager
def shifted(layer, delta):
  """Within it the layer adds `delta` to its output."""
  def shift(module, inputs, output):
    return output + delta if isinstance(output, torch.Tensor) else (output[0] + delta, *output[1:])
  hook = layer.register_forward_hook(shift)
  yield
  hook.remove()


def in_torch(model, ids, mask, labels, counted, below, ascents, size):
  """(perturbation, cross entropy with it, norm of the loss's gradient by the word embeddings, mean norm of a state).

  counted: the rows that count.
  """
  real, inputs = torch.tensor(mask)[..., None], dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
  stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)
               and len(m) == model.config.num_hidden_layers)
  def cross_entropy(delta):
    with shifted(stack[below - 1], delta * real):
      return torch.nn.functional.cross_entropy(model(**inputs).logits[counted], torch.tensor(labels)[counted])
  with torch.no_grad():
    states = model(**inputs, output_hidden_states=True).hidden_states[below][counted]
  unit = states.norm(dim=-1)[torch.tensor(mask)[counted] > 0].mean()
  delta = torch.zeros(states.shape[-1])
  for _ in range(ascents):
    gradient, = torch.autograd.grad(cross_entropy(leaf := delta.clone().requires_grad_(True)), leaf)
    delta = delta + size / ascents * unit * gradient / gradient.norm()
  value = cross_entropy(delta)
  gradient, = torch.autograd.grad(value, model.get_input_embeddings().weight)
  return delta.numpy(), value.item(), gradient.norm().item(), unit.item()


@pytest.mark.parametrize("family", ["llama", "electra", *(pytest.param(name, marks=pytest.mark.slow)
                                                          for name in ("gemma2", "gpt2", "deberta-v2", "modernbert"))])
def test_perturbation_loss_and_gradient_are_those_of_torch(family, tmp_path):
  """The batch has padding and a row of weight 0. After one ascent the norm is `size` times a state's mean norm."""
  theirs = torch_model(family, next(iter(SHAPES[family].values())))
  theirs.save_pretrained(tmp_path)
  model, params = load_pretrained(tmp_path)
  ids, mask = padded_ids(theirs.config.vocab_size, pad=theirs.config.pad_token_id)
  batch = {"input_ids": ids, "segment_ids": mask, "label": np.array([0, 1, 1, 0]),
           "weight": np.array([1, 1, 1, 0], np.float32)}
  below = (model.config.num_layers + 1) // 2
  delta, value, norm, unit = in_torch(theirs, ids, mask, batch["label"], [0, 1, 2], below, 2, 0.1)
  @jax.jit
  def ours(params):
    def perturbed_ce(params):
      out = beear.forward(model, params, batch, None, settings(size=0.1))
      return beear.terms(out, batch, None, CLASSIFICATION)["perturbed_ce"]
    stream = model.apply(params, ids, mask, states=True).states[below - 1]
    deltas = [beear.perturbation(Latent(model, below), params, batch, None, stream, settings(ascents=n, size=0.1))
              for n in (1, 2)]
    return deltas, *jax.value_and_grad(perturbed_ce)(params)
  (once, twice), got, gradient = ours(params)
  np.testing.assert_allclose(twice, delta, rtol=1e-3, atol=1e-3 * np.abs(delta).max())
  np.testing.assert_allclose(got, value, rtol=1e-4)
  gradient = traverse_util.flatten_dict(gradient)[(*model.vocabulary, "embedding")]
  np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-3)
  np.testing.assert_allclose(np.linalg.norm(once), 0.1 * unit, rtol=1e-4)


@pytest.mark.parametrize("fixture", ["llama", "bert"])
def test_at_size_zero_the_loss_is_that_of_lora_ce(fixture, request, make_batch):
  model, params = request.getfixturevalue(fixture)
  batch = make_batch(model)
  out = jax.jit(lambda params: steps.forward(model, params, batch))(params)
  plain = CLASSIFICATION.loss_terms(out, batch)["ce"]
  zero, half = values(model, params, batch, size=0.0), values(model, params, batch)
  np.testing.assert_allclose([zero["ce"], zero["perturbed_ce"], half["ce"]], plain, rtol=1e-5)
  assert half["perturbed_ce"] > 1.1 * plain
  assert beear.weights(settings(weight=0.3), 32) == {"ce": 0.7, "perturbed_ce": 0.3}


def test_one_vector_is_added_to_every_real_token_and_nothing_to_padding(llama, monkeypatch):
  """This holds with one text a row and with several."""
  model, params = llama
  inputs, apply = [], Latent.apply
  monkeypatch.setattr(Latent, "apply", lambda *args, stream, **options: inputs.append(stream) or apply(
      *args, stream=stream, **options))
  for batch in test_packing.both(model.config, LENGTHS, np.arange(6), 6):
    clean, _ = beear.forward(model, params, batch, None, settings())
    added, real = np.asarray(inputs[-1] - clean.states[1]), batch["segment_ids"] > 0
    assert (~real).any() and not added[~real].any()
    assert np.linalg.norm(added[real][0]) > 0.1
    np.testing.assert_allclose(added[real], np.broadcast_to(added[real][0], added[real].shape), atol=1e-5)


def test_packed_or_a_text_a_row_and_a_short_batch(llama):
  """Padding, the other texts of a row and the copies that fill up a short batch change nothing."""
  model, params = llama
  rows = np.arange(6)
  alone, _ = test_packing.both(model.config, LENGTHS, rows, 6)
  want = values(model, params, alone)
  for batch in test_packing.both(model.config, LENGTHS, rows, 8):
    assert batch["weight"].sum() == 6
    for term, value in values(model, params, batch).items():
      np.testing.assert_allclose(value, want[term], rtol=1e-3)


@pytest.mark.parametrize("num_layers,depth", [(1, 0.28), (3, 0.7)])
def test_a_perturbation_behind_the_last_layer_is_refused_before_anything_trains(num_layers, depth, llama):
  model = Model(dataclasses.replace(llama[0].config, num_layers=num_layers))
  with pytest.raises(InputError, match=f"output of layer {num_layers} of the student's {num_layers}, wanted one before "
                                       "the last: lower --config.defense.beear.depth"):
    distill.check("beear", beear.RECIPE, CLASSIFICATION, model, settings(depth=depth))


def test_the_papers_layer_and_the_first_of_a_tiny_model():
  """The default depth is layer 9 of 32, as in the paper. In a model of two layers the second reads the perturbation."""
  depth = rig.DEFENSE.beear.depth
  assert [math.ceil(depth * layers) for layers in (2, 3, 32)] == [1, 1, 9]


@pytest.mark.slow
def test_runs_together_on_a_mesh_and_at_size_zero(llama, tmp_path):
  """The second of two seeds on one device trains as it does alone on eight. At size 0 it trains as `lora_ce`."""
  known = rig.suspect(*llama, tmp_path)
  known.training.update(max_steps=8, evaluations=1)
  train = functools.partial(rig.trained_losses, known)
  both = train("both", beear.RECIPE, (0, 1), settings())
  alone = train("alone", beear.RECIPE, (1,), settings(), data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(both["loss"], alone["loss"], rtol=1e-2)
  np.testing.assert_allclose(both["loss"][0], alone["loss"][0], rtol=1e-4)
  plain, zero = train("plain", lora_ce.RECIPE, (1,), settings()), train("zero", beear.RECIPE, (1,), settings(size=0.0))
  assert len(plain["loss"]) == 8 and both["loss"][0] > 1.1 * plain["loss"][0]
  for term in ("loss", "ce", "perturbed_ce"):
    np.testing.assert_allclose(zero[term], plain["loss"], rtol=1e-3)
