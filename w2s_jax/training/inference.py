"""Inference: logits, features and perplexities of every row. N rows, C classes, D width."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import losses, sharding
from w2s_jax.data import batches, packing
from w2s_jax.models import Model
from w2s_jax.models.latent import Latent


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(model: Model | Latent, mesh: jax.sharding.Mesh, params: dict, input_ids: jax.Array, segment_ids: jax.Array,
            texts: jax.Array) -> tuple[jax.Array, jax.Array]:
  with sharding.on(mesh):
    out = model.apply(params, input_ids, texts=texts, segment_ids=segment_ids)
  everywhere = sharding.replicated(mesh)             # because every process reads the whole result
  return jax.lax.with_sharding_constraint((out.logits, out.features), (everywhere, everywhere))


def _zeros(name, shape):
  del name
  return np.zeros(shape, np.float32)


def packed_batches(model: Model | Latent, arrays: dict, mesh: jax.sharding.Mesh, *, batch_size: int,
                   buckets: Sequence[int]) -> Iterator[tuple[np.ndarray, dict]]:
  """Yields (indices of texts in `arrays`, global batch of these texts), with the fields that Model.apply reads."""
  for rows, batch in packing.eval_batches(arrays, batch_size, buckets, sharding.batch_shards(mesh),
                                          model.config.pad_token_id or 0):
    yield rows, sharding.global_batch({k: batch[k] for k in ("input_ids", "segment_ids", "texts")}, mesh)


def outputs(model: Model | Latent, params: dict, arrays: dict, mesh: jax.sharding.Mesh, *, batch_size: int,
            buckets: Sequence[int],
            empty: Callable[[str, tuple[int, ...]], np.ndarray] = _zeros) -> tuple[np.ndarray, np.ndarray]:
  """Logits [N, C] and features [N, D], float32 on the host, of every row of `arrays`, in row order.

  empty: ("logits" or "features", shape) -> the array that the results are written to, such as a memory-mapped file.
  """
  host_arrays = {}
  def write(rows, out):
    for name, values in zip(("logits", "features"), out):
      if name not in host_arrays:
        host_arrays[name] = empty(name, (len(arrays["length"]), values.shape[1]))
      host_arrays[name][rows] = np.asarray(values, np.float32)[:len(rows)]
  before = None
  for rows, batch in packed_batches(model, arrays, mesh, batch_size=batch_size, buckets=buckets):
    out = forward(model, mesh, params, **batch)
    if before:  # fetch the previous batch while the device computes this one
      write(*before)
    before = rows, out
  write(*before)
  return host_arrays["logits"], host_arrays["features"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_losses(model, mesh, params, input_ids, segment_ids):
  """[B] float32: mean cross entropy of each text's tokens except the first. Each row is one text."""
  with sharding.on(mesh):
    out = model.apply(params, input_ids, segment_ids=segment_ids)
    logits = model.lm_logits(params, out.hidden[:, :-1])
  values, counted = losses.next_token(logits.astype(jnp.float32), input_ids, segment_ids)
  means = (values * counted).sum(-1) / jnp.maximum(counted.sum(-1), 1)
  return jax.lax.with_sharding_constraint(means, sharding.replicated(mesh))


def perplexities(model: Model, params: dict, arrays: dict, mesh: jax.sharding.Mesh, *, batch_size: int,
                 buckets: Sequence[int]) -> np.ndarray:
  """[N] float32 on the host: the perplexity of each text under a decoder."""
  out = np.empty(len(arrays["length"]), np.float32)
  order = np.argsort(arrays["length"], kind="stable")
  for rows in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
    batch = batches.make_batch(arrays, rows, batch_size, buckets)
    batch = sharding.global_batch({name: batch[name] for name in ("input_ids", "segment_ids")}, mesh)
    out[rows] = np.exp(np.asarray(_mean_losses(model, mesh, params, **batch)))[:len(rows)]
  return out
