"""Schedule and optimizer at literals and beside torch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from w2s_jax.training import optim


def leaves():
  """One leaf of each of the labels "matrix", "vector", "head" and "adapter"."""
  return {"layers": {"mlp": {"up_proj": {"kernel": jnp.array([[[1.0, -2.0], [0.5, 4.0]]]),
                                         "lora_a": jnp.array([[[3.0], [-1.0]]])}},
                     "attn_norm": {"scale": jnp.array([[1.0, 2.0]])}},
          "score": {"kernel": jnp.array([[2.0, -4.0], [8.0, 1.0]])}}


def test_linear_schedule_at_literals():
  """0 -> peak over the warm-up, then down to exactly 0 after the last step."""
  schedule = optim.linear_schedule(0.8, steps=10, warmup_steps=2)
  want = [0.0, 0.4, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
  np.testing.assert_allclose([schedule(i) for i in range(12)], want, atol=1e-7)


def test_linear_schedule_without_warmup_starts_at_the_peak():
  schedule = optim.linear_schedule(0.8, steps=4)
  np.testing.assert_allclose([schedule(i) for i in range(5)], [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-7)
  np.testing.assert_allclose([optim.linear_schedule(0.5, steps=1)(i) for i in (0, 1)], [0.5, 0.0], atol=1e-7)


def test_everything_but_vectors_decays():
  """Without gradients AdamW multiplies weights by 1 - learning_rate * weight_decay, and does not change norms."""
  params = leaves()
  tx = optim.make_optimizer(params, learning_rate=0.1, steps=10**9, weight_decay=0.5)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  got, before = optax.apply_updates(params, updates), leaves()
  np.testing.assert_array_equal(got["layers"]["attn_norm"]["scale"], [[1.0, 2.0]])
  for path in (("layers", "mlp", "up_proj", "kernel"), ("layers", "mlp", "up_proj", "lora_a"), ("score", "kernel")):
    after, start = got, before
    for name in path:
      after, start = after[name], start[name]
    np.testing.assert_allclose(after, 0.95 * np.asarray(start), rtol=1e-6)


def test_soft_tokens_without_an_adversary_go_downhill_and_do_not_decay():
  """Adam's first step has the size of the learning rate, against the gradient. Without a gradient tokens stay."""
  params = {"embed_tokens": {"soft": jnp.array([[1.0, -2.0], [4.0, 8.0]])}, "score": {"kernel": jnp.ones((2, 2))}}
  gradients = jax.tree.map(jnp.zeros_like, params)
  gradients["embed_tokens"]["soft"] = jnp.array([[3.0, -0.5], [0.0, 0.0]])
  tx = optim.make_optimizer(params, learning_rate=0.1, steps=10**9, weight_decay=0.5)
  updates, _ = tx.update(gradients, tx.init(params), params)
  got = optax.apply_updates(params, updates)
  np.testing.assert_allclose(got["embed_tokens"]["soft"], [[0.9, -1.9], [4.0, 8.0]], rtol=1e-5)
  np.testing.assert_allclose(got["score"]["kernel"], np.full((2, 2), 0.95), rtol=1e-6)


def test_an_adversary_without_soft_tokens_is_an_error():
  with pytest.raises(ValueError, match="an adversary, but no leaves of label soft"):
    optim.make_optimizer(leaves(), 0.1, 10, adversary=optim.ascent(0.1, 1.0))


def first_moments(tx, params, gradients):
  """{path: Adam's first moment after one step}, which is 0.1 times the gradient that Adam saw."""
  _, state = tx.update(gradients, tx.init(params), params)
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat if ".mu" in jax.tree_util.keystr(path)}


@pytest.mark.parametrize("clip_norm,scale", [(0.0, 1.0), (1.0, 0.2), (2.5, 0.5), (100.0, 1.0)])
def test_clip_bounds_the_global_norm_over_all_labels(clip_norm, scale):
  """Gradients of norm 3 on the head and 4 on a vector have the global norm 5. A clip_norm of 0 does not clip."""
  params = leaves()
  gradients = jax.tree.map(jnp.zeros_like, params)
  gradients["layers"]["attn_norm"]["scale"] = jnp.array([[4.0, 0.0]])
  gradients["score"]["kernel"] = jnp.array([[0.0, 0.0], [-3.0, 0.0]])
  moments = first_moments(optim.make_optimizer(params, 0.1, 10, clip_norm=clip_norm), params, gradients)
  scores = [v for k, v in moments.items() if "score" in k]
  scales = [v for k, v in moments.items() if "attn_norm" in k]
  assert len(scores) == len(scales) == 1
  np.testing.assert_allclose(scores[0], [[0.0, 0.0], [-0.3 * scale, 0.0]], rtol=1e-5)
  np.testing.assert_allclose(scales[0], [[0.4 * scale, 0.0]], rtol=1e-5)


def test_parity_with_torch_adamw():
  """Eight steps with warm-up, decay and clipping against torch.optim.AdamW on the same gradients."""
  params = leaves()
  tx = optim.make_optimizer(params, 0.05, steps=8, warmup_steps=3, weight_decay=0.1, clip_norm=1.5)
  state = tx.init(params)
  flat, tree = jax.tree.flatten(params)
  names = ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in flat]
  adamw = torch.optim.AdamW([{"params": [p], "weight_decay": 0.0 if "norm" in n else 0.1}
                             for n, p in zip(names, theirs)], lr=0.05)
  schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda i: i / 3 if i < 3 else (8 - i) / 5)
  rng = np.random.default_rng(0)
  for _ in range(8):
    gradients = [rng.standard_normal(x.shape).astype(np.float32) for x in flat]
    updates, state = tx.update(tree.unflatten(gradients), state, params)
    params = optax.apply_updates(params, updates)
    for p, g in zip(theirs, gradients):
      p.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_(theirs, 1.5)
    adamw.step()
    schedule.step()
  for name, ours, want in zip(names, jax.tree.leaves(params), theirs):
    np.testing.assert_allclose(ours, want.detach(), rtol=1e-4, atol=1e-6, err_msg=name)
