"""CA, ASR, floor, intervals. N rows, C classes, D width."""

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


def wilson(hits, n):
  """[low, high]: Wilson's 95% interval of a rate; [0, 1] where n is 0."""
  if not n:
    return [0.0, 1.0]
  import scipy.stats  # half a second that the training stages do not wait for
  interval = scipy.stats.binomtest(int(hits), int(n)).proportion_ci(method="wilson")
  return [float(interval.low), float(interval.high)]


def clean_metrics(predicted, labels, target_label):
  """Clean accuracy with its interval, and the false rate: how often other classes' clean rows are called the target.

  target_label None (unknown): no false rate. An ASR below the same model's false rate cannot be expected of any
  defense.
  """
  hits = int((predicted == labels).sum())
  others = labels != target_label
  return {"ca": hits / len(labels), "ca_n": len(labels), "ca_ci": wilson(hits, len(labels)),
          "false_rate": None if target_label is None else float((predicted[others] == target_label).mean())}


def attack_metrics(predicted, labels, target_label):
  """ASR with its interval: target predictions among triggered rows whose true class is another.

  Not 1 - accuracy, which with more than two classes counts confusions between the other classes too.
  """
  others = labels != target_label
  hits, n = int((predicted[others] == target_label).sum()), int(others.sum())
  return {"asr": hits / n, "asr_n": n, "asr_ci": wilson(hits, n)}
