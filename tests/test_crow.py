"""CROW: its inconsistency and perturbation are PyTorch's, and with a weight of 0 it is `lora_ce`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import test_packing
import torch
from test_models import torch_model
from test_packing import LENGTHS

from w2s_jax import InputError
from w2s_jax.defenses import crow, distill, lora_ce
from w2s_jax.models import Model, load_pretrained
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import steps


def settings(alpha=5.5, epsilon=0.1):
  own = rig.DEFENSE.copy_and_resolve_references()
  own.crow.update(alpha=alpha, epsilon=epsilon)
  return own


def values(model, params, batch, **own):
  """{term: scalar} of a batch, without dropout."""
  def terms(params, batch):
    out = crow.forward(model, params, batch, None, settings(**own))
    return crow.terms(out, batch, settings(**own), CLASSIFICATION)
  return jax.jit(terms)(params, batch)


def test_the_inconsistency_of_four_layers_by_hand():
  """The first three layers' states are 90 and 60 degrees apart. The last layer and a masked token do not count."""
  x, y, z = [1.0, 0.0], [0.0, 2.0], [3**0.5 / 2, 0.5]
  states = jnp.array([[[x, x]], [[y, x]], [[z, y]], [[x, y]]])
  assert crow.inconsistency(states, jnp.array([[1.0, 0.0]])) == pytest.approx((1.0 + 0.5) / 2, abs=1e-6)
  assert crow.inconsistency(states, jnp.array([[1.0, 1.0]])) == pytest.approx((1.5 / 2 + 1.0 / 2) / 2, abs=1e-6)


def in_torch(model, ids, mask, epsilon):
  """(inconsistency of the perturbed texts, norm of its gradient with respect to the first layer's query kernel)."""
  real = torch.tensor(mask).bool()
  def inconsistency(embeddings):
    states = model(inputs_embeds=embeddings, attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
    states = torch.stack(states)
    return (1 - torch.cosine_similarity(states[1:-2], states[2:-1], dim=-1))[:, real].mean()
  embeddings = model.get_input_embeddings()(torch.tensor(ids)).detach().requires_grad_(True)
  gradient, = torch.autograd.grad(inconsistency(embeddings), embeddings)
  value = inconsistency((embeddings + epsilon * gradient.sign()).detach())
  kernel = model.model.layers[0].self_attn.q_proj.weight
  return value.item(), torch.autograd.grad(value, kernel)[0].norm().item()


def test_perturbation_inconsistency_and_gradient_are_those_of_torch(tmp_path):
  theirs = torch_model("llama", dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=5))
  theirs.save_pretrained(tmp_path)
  model, params = load_pretrained(tmp_path)
  mask = (np.arange(9) < np.array([9, 5, 7])[:, None]).astype(np.int32)
  ids = np.random.default_rng(0).integers(1, 97, mask.shape).astype(np.int32) * mask
  batch = {"input_ids": ids, "segment_ids": mask, "weight": np.ones(3, np.float32), "label": np.zeros(3, np.int32)}
  @jax.jit
  @jax.value_and_grad
  def ours(params):
    return crow.terms(crow.forward(model, params, batch, None, settings(epsilon=0.02)), batch, None,
                      CLASSIFICATION)["inconsistency"]
  value, gradient = ours(params)
  wanted, norm = in_torch(theirs, ids, mask, 0.02)
  assert value == pytest.approx(wanted, rel=1e-3)
  assert np.linalg.norm(gradient["layers"]["attn"]["q_proj"]["kernel"][0]) == pytest.approx(norm, rel=1e-2)
  assert wanted > 1.001 * in_torch(theirs, ids, mask, 0.0)[0]              # the perturbation has an effect


def test_without_a_step_the_states_are_those_of_the_clean_texts(llama, make_batch):
  model, params = llama
  batch = make_batch(model)
  clean = jax.jit(lambda params: steps.forward(model, params, batch, states=True))(params)
  counted = (batch["segment_ids"] > 0).astype(np.float32)
  got = values(model, params, batch, epsilon=0.0)
  np.testing.assert_allclose(got["inconsistency"], crow.inconsistency(clean.states, counted), rtol=1e-5)
  np.testing.assert_allclose(got["ce"], CLASSIFICATION.loss_terms(clean, batch)["ce"], rtol=1e-5)
  assert values(model, params, batch, epsilon=0.02)["inconsistency"] > got["inconsistency"]


def test_packed_or_a_text_a_row_and_a_short_batch(llama):
  """Padding, the other texts of a row and the copies that fill up a short batch change nothing."""
  model, params = llama
  rows, want = np.arange(6), None
  alone, _ = test_packing.both(model.config, LENGTHS, rows, 6)
  for batch in (alone, *test_packing.both(model.config, LENGTHS, rows, 8)):
    got = values(model, params, batch, epsilon=0.02)
    want = want or got
    assert batch["weight"].sum() == 6
    np.testing.assert_allclose(got["inconsistency"], want["inconsistency"], rtol=1e-3)
    np.testing.assert_allclose(got["ce"], want["ce"], rtol=1e-4)


def test_a_student_of_two_layers_is_refused_before_anything_trains(llama):
  shallow = Model(dataclasses.replace(llama[0].config, num_layers=2))
  with pytest.raises(InputError, match="the student has 2 layers, wanted at least 3: choose other defenses"):
    distill.check("crow", crow.RECIPE, CLASSIFICATION, shallow, rig.DEFENSE)


@pytest.mark.slow
def test_runs_together_on_a_mesh_and_with_a_weight_of_zero(llama, tmp_path):
  """The second of two seeds on one device trains as it does alone on eight. With weight 0 it trains as `lora_ce`."""
  known = rig.suspect(*llama, tmp_path)
  known.training.update(max_steps=8, evaluations=1)
  train = functools.partial(rig.trained_losses, known)
  both = train("both", crow.RECIPE, (0, 1), settings(epsilon=0.02))
  alone = train("alone", crow.RECIPE, (1,), settings(epsilon=0.02), data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(both["loss"], alone["loss"], rtol=1e-2)
  np.testing.assert_allclose(both["loss"][0], alone["loss"][0], rtol=1e-4)
  plain, free = train("plain", lora_ce.RECIPE, (1,), settings()), train("free", crow.RECIPE, (1,), settings(0.0, 0.02))
  np.testing.assert_allclose(free["ce"], plain["ce"], rtol=1e-3)
  assert len(free["ce"]) == 8 and both["inconsistency"][-1] < 0.9 * free["inconsistency"][-1]
