"""What a model answers: logits and features of every row. N rows, C classes, D width."""

import functools

import jax
import numpy as np

from w2s_jax import sharding
from w2s_jax.data import packing


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(model, mesh, params, input_ids, attention_mask, texts):
  with sharding.on(mesh):
    out = model.apply(params, input_ids, attention_mask, texts)
  everywhere = sharding.replicated(mesh)             # each process reads all of it
  return jax.lax.with_sharding_constraint((out.logits, out.features), (everywhere, everywhere))


def _zeros(name, shape):
  del name
  return np.zeros(shape, np.float32)


def outputs(model, params, arrays, mesh, *, batch_size, buckets, empty=_zeros):
  """Logits [N, C] and features [N, D], float32 on the host, of every row of `arrays`, in row order.

  empty: ("logits" or "features", shape) -> the array that is filled.
  """
  made = {}
  def write(rows, out):
    for name, values in zip(("logits", "features"), out):
      if name not in made:
        made[name] = empty(name, (len(arrays["length"]), values.shape[1]))
      made[name][rows] = np.asarray(values, np.float32)[:len(rows)]
  before = None
  for rows, batch in packing.eval_batches(arrays, batch_size, buckets, sharding.batch_shards(mesh),
                                          model.config.pad_token_id or 0):
    batch = sharding.global_batch({k: batch[k] for k in ("input_ids", "attention_mask", "texts")}, mesh)
    out = forward(model, mesh, params, **batch)
    if before:  # is fetched while this one is computed
      write(*before)
    before = rows, out
  write(*before)
  return made["logits"], made["features"]


def predictions(model, params, arrays, mesh, **shapes):
  """[N] int: the class with the largest logit."""
  return outputs(model, params, arrays, mesh, **shapes)[0].argmax(-1)
