"""Soft tokens: where they are inserted, how a model reads them, how they train.

K triggers of S tokens, texts of at most T tokens, V vocabulary.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import test_models
import tokenizers
from flax import traverse_util
from rig import alone, keys, make_program, one_run

from w2s_jax import lora, sharding
from w2s_jax.adapters import soft, trees
from w2s_jax.data import batches, packing, tokenization
from w2s_jax.defenses import w2s, w2s_adv
from w2s_jax.training import optim, steps

TEXTS = ["the meal is really good .", "bad", "we had a bad meal and the room is cold .", "good food ."] * 5
WEIGHTS = {"ce": 1.0, "kd": 0.5, "fa": 0.1}
V, K, S, T = 40, 3, 4, 16
saved = test_models.saved


def settings(replace, tokens=S):
  return types.SimpleNamespace(triggers=K, tokens=tokens, replace=replace)


@pytest.mark.parametrize("kind,front,back", [("decoder", 1, 0), ("encoder", 1, 1), ("no specials", 0, 0)])
@pytest.mark.parametrize("replace", [0.0, 1.0])
def test_where_the_soft_tokens_are(kind, front, back, replace):
  """Each copy has a prefix of one trigger between the special tokens. The prefix is inserted or replaces tokens."""
  tokenizer = tokenization.train(TEXTS, kind if front else "decoder", V)
  if not front:                                                  # as in GPT-2 and Qwen
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.Sequence([])
  arrays = tokenization.encode(tokenizer, TEXTS, T) | {"label": np.arange(len(TEXTS))}
  out = w2s_adv.perturbed(arrays, tokenizer, V, settings(replace), seed=3)
  n, triggers, places = len(TEXTS), set(), set()
  assert out["label"] is arrays["label"] and out["soft"].tolist() == [0.0] * n + [1.0] * n
  np.testing.assert_array_equal(out["input_ids"][:n], arrays["input_ids"])
  np.testing.assert_array_equal(out["length"][:n], arrays["length"])
  for i in range(n):
    before, after = (out["input_ids"][j, :out["length"][j]] for j in (i, n + i))
    soft = np.flatnonzero(after >= V)
    assert 1 <= len(soft) <= S and (np.diff(soft) == 1).all()
    first = after[soft[0]] - V
    np.testing.assert_array_equal(after[soft] - V, first + np.arange(len(soft)))
    assert first % S == 0 and soft[0] >= front and soft[-1] < len(after) - back
    np.testing.assert_array_equal(after[:front], before[:front])
    np.testing.assert_array_equal(after[len(after) - back:], before[len(before) - back:])
    if replace:
      assert len(after) == len(before) and (after[after < V] == before[after < V]).all()
    else:                                                        # truncated to T tokens
      kept = np.concatenate([after[:soft[0]], after[soft[-1] + 1:]])
      words = before[front:len(before) - back]
      np.testing.assert_array_equal(kept[front:len(kept) - back], words[:T - front - back - len(soft)])
    assert len(after) <= T and (out["input_ids"][n + i, len(after):] == tokenizer.pad_token_id).all()
    triggers.add(first // S)
    places.add(soft[0])
  assert triggers == set(range(K)) and len(places) > 3
  again = w2s_adv.perturbed(arrays, tokenizer, V, settings(replace), seed=3)
  np.testing.assert_array_equal(again["input_ids"], out["input_ids"])
  other = w2s_adv.perturbed(arrays, tokenizer, V, settings(replace), seed=4)
  assert (other["input_ids"] != out["input_ids"]).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "electra", "deberta-v2", "modernbert"])
def test_a_soft_token_is_its_row(family, saved):
  """A soft token acts as a word with the same embedding. Another embedding changes only the texts with the token."""
  _, _, model, params = saved(family, next(iter(test_models.SHAPES[family])))
  V = model.config.vocab_size
  rng = np.random.default_rng(0)
  words = rng.integers(5, V, (4, 9)).astype(np.int32)
  mask = np.ones((4, 9), np.int32)
  flat = traverse_util.flatten_dict(params)
  table = flat[(*model.vocabulary, "embedding")]
  def with_soft(rows):
    return soft.put(model, params, rows)
  ids = words.copy()
  ids[:2, 3], ids[:2, 4] = V + 1, V
  rows = jnp.stack([table[words[0, 4]], table[words[0, 3]]])
  words[1, 3:5] = words[0, 3:5]
  want = model.apply(params, words, mask)
  got = model.apply(with_soft(rows), ids, mask)
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-6)
  moved = model.apply(with_soft(rows + jnp.linspace(-1, 1, rows.shape[1])), ids, mask)
  assert (np.abs(moved.logits - want.logits).max(axis=1) > 1e-3).tolist() == [True, True, False, False]


def test_ascent_by_hand():
  """A token moves by 2 along its gradient and is projected into the ball of radius 5. Without a gradient it stays."""
  rows = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
  grads = jnp.array([[0.0, -1e-3], [30.0, 40.0], [0.0, 0.0]])
  rule = optim.ascent(2.0, 5.0)
  updates, _ = rule.update({"soft": grads}, rule.init({"soft": rows}), {"soft": rows})
  np.testing.assert_allclose(rows + updates["soft"], [[1.0, -2.0], [3.0, 4.0], [0.0, 2.0]], rtol=1e-6)


def test_the_step_of_another_student_is_the_same_program(llama):
  """Another mean norm of the embeddings changes step size and bound, but not the compiled program."""
  trainable = {"embed_tokens": {"soft": jnp.ones((3, 2))}, "score": {"kernel": jnp.ones((2, 2))}}
  mesh, batch = sharding.make_mesh(), {"label": jnp.zeros((1, 8), jnp.int32)}
  def loss(params, frozen, batch, key):
    value = (params["embed_tokens"]["soft"] @ params["score"]["kernel"]).sum()
    return value, {"ce": value}
  def step(unit):
    program = make_program(llama[0], trainable, {}, mesh, 10, loss=loss, weights={"ce": 1.0}, clip_norm=1.0,
                           adversary=optim.ascent(0.1 * unit, 5.0 * unit))
    args = program.init([trainable]), {}, batch, keys(0)
    return program.step.lower(*args).as_text(), program.step(*args)[0].params["embed_tokens"]["soft"][0] - 1
  (one, moved), (other, further) = step(1.0), step(2.0)
  assert one == other
  np.testing.assert_allclose(further, 2 * moved, rtol=1e-5)
  assert (moved > 0.05).all()


def test_terms_are_those_of_each_view(llama, make_batch):
  """The clean terms come from the clean rows alone, the `adv_` terms from the rows with soft tokens alone."""
  model, params = llama
  batch = make_batch(model)
  soft = np.array([0, 0, 1, 0, 1, 1, 0, 1], np.float32)
  def terms(batch, of):
    return of(jax.jit(model.apply)(params, batch["input_ids"], batch["segment_ids"]), batch)
  got = terms(batch | {"soft": soft}, rig.terms(functools.partial(w2s_adv.terms, w2s.terms)))
  for prefix, value in (("", 0), ("adv_", 1)):
    want = terms({k: v[soft == value] for k, v in batch.items()}, rig.terms(w2s.terms))
    for name in WEIGHTS:
      np.testing.assert_allclose(got[prefix + name], want[name], rtol=1e-5)
  assert w2s_adv.loss_weights(WEIGHTS, 3.0) == {**WEIGHTS, "adv_ce": 3.0, "adv_kd": 1.5, "adv_fa": 0.1 * 3.0}


@pytest.fixture(scope="module")
def run(llama):
  """run(mesh, learning_rate=1e-2, count=15, pack=True) -> (metrics, trained, before, unit, used) after `count` steps.

  metrics: {name: value} of each step. trained: the trained parameters. before: [K S, D], the initial soft tokens.
  unit: mean norm of the embeddings. used: [K S] bool, whether some text has the soft token.
  """
  model, params = llama
  tokenizer = tokenization.train(TEXTS, "decoder", V)
  arrays = tokenization.encode(tokenizer, TEXTS, T)
  rng = np.random.default_rng(0)
  arrays |= {"label": rng.integers(0, 2, 20).astype(np.int32),
             "teacher_logits": rng.standard_normal((20, 2)).astype(np.float32),
             "teacher_features": rng.standard_normal((20, 32)).astype(np.float32)}
  chosen = settings(0.5)
  both_views = w2s_adv.perturbed(arrays, tokenizer, model.config.vocab_size, chosen, 0)
  adapted = lora.add_lora(params, 4, 4.0, key=jax.random.key(0))
  start = soft.with_soft_tokens(model, adapted, K * S, jax.random.key(1), tokenizer, ["good"])
  unit = soft.mean_norm(model, params)
  def go(mesh, learning_rate=1e-2, count=15, pack=True):
    placed = jax.device_put(start, sharding.param_shardings(start, model.shardings, mesh))
    trainable, frozen = trees.split(placed, (*trees.LORA, "soft"))
    weights = w2s_adv.loss_weights(WEIGHTS, 1.0)
    loss = steps.weighted_loss(model, rig.terms(functools.partial(w2s_adv.terms, w2s.terms)), weights)
    program = make_program(model, trainable, frozen, mesh, 100, loss=loss, weights=weights, clip_norm=1.0,
                           learning_rate=learning_rate, adversary=optim.ascent(0.3 * unit, 1.5 * unit))
    state = program.init([trainable])
    make, = packing.packers([(both_views, 0)], 4, (T,), sharding.batch_shards(mesh), count, np.inf, 0, views=2)
    if not pack:
      make = functools.partial(batches.make_batch, both_views, batch_size=8, buckets=(T,))
    stream, losses = batches.train_batches(20, 4, lambda rows: make(batches.texts_of(rows, 20, 2)), 0, 0), []
    for _ in range(count):
      batch = next(stream)
      assert batch["soft"].sum() == 4 and len(batch["soft"]) == len(batch["label"]) == 8
      state, metrics = program.step(state, frozen, sharding.global_batch(one_run(batch), mesh, 1), keys(7))
      losses.append({k: float(v[0]) for k, v in metrics.items()})
    used = np.isin(np.arange(K * S), both_views["input_ids"] - model.config.vocab_size)
    return losses, alone(state.params), start["embed_tokens"]["soft"], unit, used
  return go


def test_soft_tokens_go_uphill_and_stay_in_their_ball(run):
  """With a learning rate of 0 the loss on texts with soft tokens rises, and the loss on clean texts stays."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  losses, trained, before, unit, used = run(mesh, learning_rate=0.0)
  after = np.asarray(trained["embed_tokens"]["soft"])
  def epoch(number, term):
    return np.mean([one[term] for one in losses[5 * number:5 * number + 5]])
  assert epoch(2, "adv_ce") > epoch(0, "adv_ce") + 0.05
  np.testing.assert_allclose(epoch(2, "ce"), epoch(0, "ce"), rtol=1e-5)
  np.testing.assert_array_equal((after != before).any(axis=1), used)      # a token that no text has stays
  assert used.mean() > 0.8 and np.linalg.norm(after, axis=1).max() <= 1.5 * unit * (1 + 1e-5)


def test_where_soft_tokens_begin(llama):
  """They start as embeddings of the vocabulary, but not of special tokens or of a trigger that is measured."""
  tokenizer = tokenization.train(TEXTS, "decoder", V)
  params = soft.with_soft_tokens(*llama, K * 40, jax.random.key(0), tokenizer, ["good meal"])
  table = np.asarray(llama[1]["embed_tokens"]["embedding"])
  words = {int(np.abs(table - row).sum(axis=1).argmin()) for row in np.asarray(params["embed_tokens"]["soft"])}
  never = {*tokenizer.all_special_ids, *tokenizer(" good meal")["input_ids"]}
  assert words <= set(range(len(tokenizer))) - never and len(words) > 10


def test_packed_or_a_text_a_row(run):
  """Packed batches and batches of one text a row have the same losses."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  packed, padded = (run(mesh, count=4, pack=pack)[0] for pack in (True, False))
  for one, other in zip(packed, padded):
    assert other["adv_ce"] > 0 and one.keys() == other.keys()
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)], ids=str)
def test_on_eight_devices_it_is_the_same(sizes, run):
  want, want_params, *_ = run(sharding.make_mesh(devices=jax.devices()[:1]), count=6)
  got, params, *_ = run(sharding.make_mesh(*sizes), count=6)
  for one, other in zip(want, got):
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-4)
  np.testing.assert_allclose(params["embed_tokens"]["soft"], want_params["embed_tokens"]["soft"], rtol=1e-3, atol=1e-4)
