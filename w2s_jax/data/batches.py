"""Batches of few static shapes whose order is a function of (seed, epoch)."""

import numpy as np


def epoch_order(seed, epoch, num_examples):
  """[N] int: the order in which an epoch visits the examples."""
  return np.random.default_rng([seed, epoch]).permutation(num_examples)


def steps_per_epoch(num_examples, batch_size):
  return -(-num_examples // batch_size)


def bucket_length(longest, buckets):
  """The smallest of `buckets` (ascending token counts) that holds `longest` tokens."""
  return next(b for b in buckets if b >= longest)


def make_batch(arrays, rows, batch_size, buckets):
  """One batch as host arrays; a short one is filled up with copies of its first row at weight 0.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], and any other [N, ...]}.
    rows: [at most batch_size] int.
    buckets: ascending sequence lengths that may be compiled.
  Returns:
    dict with "input_ids", "attention_mask" [B, T'], "weight" [B] float32 and the other arrays' rows.
  """
  weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
  rows = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
  lengths = arrays["length"][rows]
  T = min(bucket_length(lengths.max(), buckets), arrays["input_ids"].shape[1])
  batch = {name: values[rows] for name, values in arrays.items() if name != "length"}
  batch["input_ids"] = batch["input_ids"][:, :T]
  batch["attention_mask"] = (np.arange(T) < lengths[:, None]).astype(np.int32)
  return batch | {"weight": weight}


def train_batches(arrays, batch_size, buckets, seed, start_step):
  """Endless batches from step `start_step` on: each epoch visits every example once, in `epoch_order`."""
  num_examples = len(arrays["length"])
  per_epoch = steps_per_epoch(num_examples, batch_size)
  step = start_step
  while True:
    epoch, i = divmod(step, per_epoch)
    if i == 0 or step == start_step:
      order = epoch_order(seed, epoch, num_examples)
    yield make_batch(arrays, order[i * batch_size:(i + 1) * batch_size], batch_size, buckets)
    step += 1


def eval_batches(arrays, batch_size, buckets):
  """(rows, batch) over every example once, shortest first, so that batches are little padded."""
  order = np.argsort(arrays["length"], kind="stable")
  for i in range(0, len(order), batch_size):
    rows = order[i:i + batch_size]
    yield rows, make_batch(arrays, rows, batch_size, buckets)
