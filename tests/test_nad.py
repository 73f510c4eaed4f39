"""Neural Attention Distillation: attention maps by hand, their order, the teacher, and a weight of 0."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import test_packing
from test_packing import LENGTHS

from w2s_jax.data import batches
from w2s_jax.defenses import distill, lora_ce, nad
from w2s_jax.tasks import CLASSIFICATION


def settings(weight):
  own = rig.DEFENSE.copy_and_resolve_references()
  own.nad.weight = weight
  return own


def test_maps_of_two_packed_texts_by_hand():
  """Sums of squares are 9 and 16 in one text, 4, 4 and 1 in the other. The map of each text has a norm of 1."""
  row = jnp.array([[3.0, 0.0], [0.0, -4.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [7.0, 7.0]])
  states = jnp.stack([row[None], 2 * row[None]])                      # a scale does not show in a map
  batch = {"texts": jnp.array([[[0, 1], [2, 4]]])}
  maps = nad.attention_maps(states, batch, 4)
  want = [np.array([9, 16, 0, 0]) / (81 + 256)**0.5, np.array([4, 4, 1, 0]) / 33**0.5]
  np.testing.assert_allclose(maps, np.repeat(np.array(want)[:, None], 2, axis=1), rtol=1e-5)
  alone = {"segment_ids": jnp.array([[1, 1, 1, 1, 1, 0]])}
  want = np.array([9, 16, 4, 4, 1, 0]) / (81 + 256 + 33)**0.5
  np.testing.assert_allclose(nad.attention_maps(states, alone, 6)[0, 1], want, rtol=1e-5)


def test_packed_or_a_text_a_row_and_whose_maps_they_are(llama, tmp_path):
  """Each text has its own maps, in the order of the texts. The loss is a mean over the texts that count."""
  model, params = llama
  place = rig.suspect(*llama, tmp_path).place
  arrays = test_packing.arrays_for(model.config, LENGTHS, 11)
  maps = nad.maps_of(model, params, arrays, place)
  states = jax.jit(lambda *args: model.apply(*args, states=True).states)
  for n, length in enumerate(LENGTHS):                                # each text by itself
    real = (np.arange(11) < length).astype(np.int32)[None]
    strengths = np.square(np.asarray(states(params, arrays["input_ids"][n:n + 1], real)))[:, 0, :length].sum(-1)
    unit = strengths / np.linalg.norm(strengths, axis=1, keepdims=True)
    np.testing.assert_allclose(maps[n, :, :length], unit, rtol=1e-4)
    assert not maps[n, :, length:].any()
  others = np.random.default_rng(0).normal(size=maps.shape).astype(np.float32)
  want = np.square(others[:6] - maps[:6]).sum((1, 2)).mean() / 3
  for batch in test_packing.both(model.config, LENGTHS, np.arange(6), 8):
    batch = batch | {"maps": np.concatenate([others[:6], others[:2]])}          # the batch of 8 has 6 texts that count
    got = jax.jit(lambda batch: nad.terms(nad.forward(model, params, batch), batch, None, CLASSIFICATION))(batch)
    np.testing.assert_allclose(got["maps"], want, rtol=1e-4)


@pytest.mark.slow
def test_the_teacher_and_a_weight_of_zero(llama, tmp_path):
  """The teacher is the suspect after `lora_ce` with another seed. At weight 0 the student trains as `lora_ce`."""
  known = rig.suspect(*llama, tmp_path)
  known.training.update(max_steps=8, evaluations=1)
  known = known._replace(place=known.place._replace(log_every=1))
  def logged(name, term):
    return [json.loads(line)[term] for line in (tmp_path / f"metrics/{name}.jsonl").read_text().splitlines()]
  distill.train(nad.RECIPE, known, settings(1000.0), {"both0": 0, "both1": 1})
  teacher, _ = distill.train(lora_ce.RECIPE, known, settings(0.0), {"like-teacher": nad.teacher_seed(1), "plain": 1})
  distill.train(nad.RECIPE, known, settings(0.0), {"free": 1})
  np.testing.assert_allclose(logged("both1-teacher", "ce"), logged("like-teacher", "ce"), rtol=1e-3)
  np.testing.assert_allclose(logged("free", "ce"), logged("plain", "ce"), rtol=1e-3)
  assert abs(logged("plain", "ce")[0] / logged("like-teacher", "ce")[0] - 1) > 1e-2     # another order of the rows
  start, taught = (nad.maps_of(known.model, params, known.encode(known.train), known.place)
                   for params in (known.params, teacher))
  first = batches.epoch_order(1, 0, 80)[:16]                            # in the first batch the student is the suspect
  gap = np.square(start[first] - taught[first]).sum((1, 2)).mean() / 3
  np.testing.assert_allclose([logged(name, "maps")[0] for name in ("both1", "free")], gap, rtol=1e-2)
  assert logged("both1", "maps")[-1] < 0.8 * logged("free", "maps")[-1]
