"""Several texts in one row give the same numbers as one text per row, with little padding."""

import types

import jax
import numpy as np
import pytest
import rig
import test_models

from configs import clean_checkpoint
from w2s_jax import lora, sharding
from w2s_jax.adapters import trees
from w2s_jax.data import batches, packing
from w2s_jax.defenses import w2s
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import stage, steps
from w2s_jax.training.train import Workplace

WEIGHTS = {"ce": 1.0, "kd": 0.5, "fa": 0.1}
saved = test_models.saved


def arrays_for(config, lengths, max_length, seed=0):
  """Random arrays of N texts for a distillation step. lengths: [N] int, tokens per text."""
  rng, pad = np.random.default_rng(seed), config.pad_token_id or 0
  n = len(lengths)
  ids = rng.integers(0, config.vocab_size - 1, (n, max_length)).astype(np.int32)
  ids = np.where(np.arange(max_length) < lengths[:, None], ids + (ids >= pad), pad)
  return {"input_ids": ids.astype(np.int32), "length": lengths, "label": rng.integers(0, 2, n).astype(np.int32),
          "teacher_logits": rng.standard_normal((n, config.num_labels)).astype(np.float32),
          "teacher_features": rng.standard_normal((n, config.feature_size)).astype(np.float32)}


def both(config, lengths, rows, batch_size, groups=1, max_length=11):
  """(padded batch, packed batch) of the same examples."""
  arrays = arrays_for(config, lengths, max_length)
  padded = batches.make_batch(arrays, rows, batch_size, (max_length,))
  return padded, packing.pack_batch(arrays, rows, batch_size, max_length, range(1, batch_size + 1), groups,
                                    config.pad_token_id or 0)


LENGTHS = np.array([11, 2, 3, 1, 7, 5, 4, 6, 2, 9])


@pytest.mark.parametrize("family,name", [*((family, next(iter(test_models.SHAPES[family])))
                                           for family in test_models.SHAPES), ("modernbert", "biases-mean")])
def test_packed_outputs_are_the_padded_ones(family, name, saved):
  """Logits and features of each text agree. One text is a single token, and some rows have three texts."""
  _, _, model, params = saved(family, name)
  padded, packed = both(model.config, LENGTHS, np.arange(10), 10)
  assert packed["input_ids"].shape == (5, 11) and (packed["segment_ids"] == 0).sum() == 5
  want = model.apply(params, padded["input_ids"], padded["segment_ids"])
  got = jax.jit(model.apply)(params, packed["input_ids"], texts=packed["texts"], segment_ids=packed["segment_ids"])
  assert np.ptp(want.logits) > 0.1
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
  np.testing.assert_allclose(got.features, want.features, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_that_end_in_the_padding_token_are_pooled_before_it(family, saved):
  """This holds in packed rows, too. A text of padding tokens alone is pooled at its own first token."""
  _, _, model, params = saved(family, next(iter(test_models.SHAPES[family])))
  arrays = arrays_for(model.config, LENGTHS, 11)
  for row, length in enumerate(LENGTHS):
    arrays["input_ids"][row, max(length - 2, 0):length] = 0
  arrays["input_ids"][4, 6] = 3                                  # this text ends in no padding token
  padded = batches.make_batch(arrays, np.arange(10), 10, (11,))
  packed = packing.pack_batch(arrays, np.arange(10), 10, 11, range(1, 11), 2, 0)
  want = model.apply(params, padded["input_ids"], padded["segment_ids"])
  got = model.apply(params, packed["input_ids"], texts=packed["texts"], segment_ids=packed["segment_ids"])
  np.testing.assert_allclose(got.features, want.features, atol=1e-5)
  for row, length in enumerate(LENGTHS):
    place = 6 if row == 4 else max(length - 3, 0)
    np.testing.assert_array_equal(want.features[row], want.hidden[row, place])


@pytest.mark.parametrize("family,name", [("mistral", "window-3"), ("qwen2", "window-last"),
                                         ("smollm3", "nope-window-biases")])
def test_a_sliding_window_ends_with_its_text(family, name, saved):
  _, _, model, params = saved(family, name)
  padded, packed = both(model.config, LENGTHS, np.arange(10), 10)
  want = model.apply(params, padded["input_ids"], padded["segment_ids"])
  got = model.apply(params, packed["input_ids"], texts=packed["texts"], segment_ids=packed["segment_ids"])
  np.testing.assert_allclose(got.features, want.features, atol=1e-5)


def loss_and_gradient(model, params, batch):
  trainable, frozen = trees.split(lora.add_lora(params, 4, 4.0, key=jax.random.key(0)), trees.LORA)
  loss = steps.weighted_loss(model, rig.terms(w2s.terms), WEIGHTS)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, frozen, batch, jax.random.key(0))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("rows", [pytest.param(np.arange(10), id="whole"),
                                  pytest.param(np.array([9, 0, 4]), id="short", marks=pytest.mark.slow)])
def test_loss_and_gradient_are_the_padded_ones_and_do_not_depend_on_order(family, rows, request):
  """The filler of a short batch does not count."""
  model, params = request.getfixturevalue(family)
  padded, packed = both(model.config, LENGTHS, rows, 10)
  _, turned = both(model.config, LENGTHS, rows[::-1], 10)
  (want, want_terms), want_gradient = loss_and_gradient(model, params, padded)
  for batch in (packed, turned):
    (value, terms), gradient = loss_and_gradient(model, params, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name, term in want_terms.items():
      np.testing.assert_allclose(terms[name], term, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient)):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_groups_stay_on_their_device(llama):
  """Four groups on a mesh of 2 x 2 have the same outputs, and the program has no all-gather."""
  model, params = llama
  rng = np.random.default_rng(0)
  padded, packed = both(model.config, rng.integers(1, 12, 16), np.arange(16), 16, groups=4)
  mesh = sharding.make_mesh(2, 2, 1, jax.devices()[:4])
  batch = sharding.global_batch({k: packed[k] for k in ("input_ids", "segment_ids", "texts")}, mesh)
  replicated = jax.device_put(params, sharding.replicated(mesh))
  compiled = jax.jit(model.apply).lower(replicated, **batch).compile()
  np.testing.assert_allclose(compiled(replicated, **batch).logits,
                             model.apply(params, padded["input_ids"], padded["segment_ids"]).logits, atol=1e-5)
  assert "all-gather" not in compiled.as_text()
  for group in range(4):                                          # every text's place lies in its own group's rows
    tokens = packed["input_ids"].reshape(4, -1)[group]
    for text, (first, last) in zip(padded["input_ids"][group * 4:], packed["texts"][group]):
      np.testing.assert_array_equal(tokens[first:last + 1], text[:last + 1 - first])


def test_first_fit_decreasing_by_hand():
  np.testing.assert_array_equal(packing.first_fit(np.array([3, 8, 5, 2, 1]), 10),
                                [[1, 5], [0, 0], [1, 0], [0, 8], [1, 8]])


SHAPE = types.SimpleNamespace(vocab_size=50, num_labels=2, feature_size=4, pad_token_id=0)


def sst2_like(n=3000, seed=0):
  """Text lengths with the mean, spread and bounds of SST-2 in a BERT's tokens (25, 11, 3 to 80)."""
  return np.clip(np.random.default_rng(seed).gamma(5, 5, n).astype(int), 3, 80)


def test_at_most_fifteen_percent_padding_in_at_most_six_shapes():
  """This counts whole epochs, with their short last batches."""
  lengths = sst2_like()
  arrays = arrays_for(SHAPE, lengths, 96)
  num_steps = 2 * batches.steps_per_epoch(len(lengths), 32)
  make, = packing.packers([(arrays, 3)], 32, (32, 64, 96, 128), 1, num_steps, np.inf, 0)
  stream = batches.train_batches(len(lengths), 32, make, 3, 0)
  packed = [next(stream) for _ in range(num_steps)]
  slots = sum(b["input_ids"].size for b in packed)
  assert 1 - sum((b["segment_ids"] > 0).sum() for b in packed) / slots <= 0.15
  assert sum((b["segment_ids"] > 0).sum() for b in packed) == 2 * lengths.sum()
  assert len({b["input_ids"].shape for b in packed}) <= packing.MOST_SHAPES
  row_length, = {b["input_ids"].shape[1] for b in packed}
  assert row_length in (80, 88, 96)
  for other in (80, 88, 96):                                      # no other row length has fewer token positions
    counts, _ = packing.row_counts([lengths], [3], 32, other, 1, num_steps, np.inf)
    stream = batches.train_batches(len(lengths), 32, lambda rows, c=counts, T=other: packing.pack_batch(
        arrays, rows, 32, T, c, 1, 0), 3, 0)
    assert slots <= sum(next(stream)["input_ids"].size for _ in range(num_steps))


def test_a_batch_larger_than_any_foreseen_still_fits():
  lengths = np.full(64, 2)
  counts, rows = packing.row_counts([lengths], [0], 8, 16, 1, 8, np.inf)
  assert counts == [1, 8] and rows == 8
  arrays = arrays_for(SHAPE, np.full(64, 16), 16)
  assert packing.pack_batch(arrays, np.arange(8), 8, 16, counts, 1, 0)["input_ids"].shape == (8, 16)


@pytest.mark.parametrize("per_shape,shapes", [(0.9, 1), (1.1, 2), (2.1, 3)])
def test_small_models_take_few_shapes(per_shape, shapes):
  """The number of shapes grows with the FLOPs of the stage. One more shape holds any batch."""
  lengths, steps = sst2_like(), 1000
  flops = per_shape * packing.FLOPS_PER_SHAPE / (steps * 32 * lengths.mean())
  counts, rows = packing.row_counts([lengths], [3], 32, 80, 1, steps, flops)
  assert len(counts) == shapes + 1 and counts[-1] == 32 and (shapes > 1 or rows == steps * counts[0])


class Asked(Exception):
  pass


def test_a_stage_says_what_a_token_costs(llama, monkeypatch, tmp_path):
  """In its three layers each frozen parameter costs 4 FLOPs, and each adapter parameter (rank 4, q and v) 6."""
  def packers(runs, batch_size, buckets, groups, steps, flops_per_token, *more):
    raise Asked(flops_per_token)
  monkeypatch.setattr(packing, "packers", packers)
  model, params = llama
  config = clean_checkpoint.get_config()
  plan = stage.task_plan(CLASSIFICATION, "w2s", 0, model, trees.LORA, config.defend)
  place = Workplace(CLASSIFICATION, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), tmp_path, "", (16,), 8)
  with pytest.raises(Asked) as asked:
    stage.train_stage(plan, [lora.add_lora(params, 4, 4.0, key=jax.random.key(0))],
                      [arrays_for(SHAPE, np.full(64, 5), 16)], None, place)
  matrices, norms, alphas = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48, 2 * 32, 2
  adapters = 4 * (32 + 32) + 4 * (32 + 16)
  assert asked.value.args == (3 * (4 * (matrices + norms + alphas) + 6 * adapters),)


@pytest.mark.parametrize("groups", [1, 4])
def test_evaluation_covers_every_row_once_in_one_shape(groups):
  arrays = arrays_for(SHAPE, sst2_like(320), 96)
  seen = list(packing.eval_batches(arrays, 32, (32, 96), groups, 0))
  assert sorted(np.concatenate([rows for rows, _ in seen])) == list(range(320))
  shape, = {batch["input_ids"].shape for _, batch in seen}
  assert sum((batch["segment_ids"] > 0).sum() for _, batch in seen) == arrays["length"].sum()
  assert groups > 1 or arrays["length"].sum() / (len(seen) * np.prod(shape)) > 0.75
  for rows, batch in seen:
    np.testing.assert_array_equal(batch["label"][:len(rows)], arrays["label"][rows])
    np.testing.assert_array_equal(batch["weight"], np.arange(32) < len(rows))
