"""The output of every layer (Model.apply with states=True), beside transformers' output_hidden_states."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from test_models import SHAPES, padded_ids, torch_model

from w2s_jax import sharding
from w2s_jax.models import Model, load_pretrained
from w2s_jax.models.latent import Latent


@pytest.mark.parametrize("family", SHAPES)
def test_every_layer_has_the_states_of_transformers(family, tmp_path):
  """hidden_states[0] is what the first layer reads, [i] the output of layer i; the last has the final norm, too."""
  theirs = torch_model(family, next(iter(SHAPES[family].values())))
  theirs.save_pretrained(tmp_path / family)
  model, params = load_pretrained(tmp_path / family)
  ids, mask = padded_ids(theirs.config.vocab_size, pad=theirs.config.pad_token_id)
  with torch.no_grad():
    wanted = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
  first, *wanted = [states.numpy()[mask > 0] for states in wanted.hidden_states]
  out = jax.jit(lambda params: model.apply(params, ids, mask, states=True))(params)
  assert len(wanted) == len(out.states) == model.config.num_layers >= 2
  for layer, states in enumerate(wanted[:-1]):
    np.testing.assert_allclose(out.states[layer][mask > 0], states, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(out.states[-1], out.stream)
  np.testing.assert_allclose(out.logits, model.apply(params, ids, mask).logits, atol=1e-5)
  np.testing.assert_allclose(Latent(model, 0).stream(params, ids, mask)[mask > 0], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_however_the_layers_run_they_are_the_same(runtime, llama):
  """So are their gradients with respect to the input of the first layer."""
  model, params = llama
  ids, mask = padded_ids(model.config.vocab_size)
  stream = Latent(model, 0).stream(params, ids, mask)
  def go(model):
    def squares(stream):
      return (model.apply(params, ids, mask, stream=stream, states=True).states**2).sum()
    return jax.jit(jax.value_and_grad(squares))(stream)
  (value, gradient), want = go(Model(dataclasses.replace(model.config, **runtime))), go(model)
  np.testing.assert_allclose(value, want[0], rtol=1e-5)
  np.testing.assert_allclose(gradient, want[1], rtol=1e-4, atol=1e-4 * np.abs(want[1]).max())


def test_on_a_mesh_they_are_the_same_and_without_being_asked_for_they_are_not_there(llama):
  model, params = llama
  ids, mask = padded_ids(model.config.vocab_size)
  assert model.apply(params, ids, mask).states is None
  want, mesh = model.apply(params, ids, mask, states=True).states, sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(params, sharding.param_shardings(params, model.shardings, mesh))
  batch = sharding.global_batch({"input_ids": ids, "segment_ids": mask}, mesh)
  with sharding.on(mesh):
    got = jax.jit(lambda params, batch: model.apply(params, states=True, **batch).states)(placed, batch)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
