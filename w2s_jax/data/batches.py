"""Batches in few static shapes. Seed, epoch and number of examples alone determine the order of the examples."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from w2s_jax.data import streams

Made = TypeVar("Made")


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """[N] int: the order in which an epoch visits the examples."""
  return streams.rng(seed, "order", epoch).permutation(num_examples)


def texts_of(examples: np.ndarray, num_examples: int, views: int) -> np.ndarray:
  """[views n] int: indices of all texts of n examples, view by view.

  With N = num_examples in the whole data set, text i + v N is view v of example i.
  """
  return np.concatenate([examples + view * num_examples for view in range(views)])


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  return -(-num_examples // batch_size)


def bucket_length(longest: int | np.integer, buckets: Sequence[int]) -> int:
  """The smallest of the ascending `buckets` that is at least `longest`. There must be one."""
  return next(b for b in buckets if b >= longest)


def make_batch(arrays: dict[str, np.ndarray], rows: np.ndarray, batch_size: int,
               buckets: Sequence[int]) -> dict[str, np.ndarray]:
  """One batch as host arrays, with one text per row. Copies of the first row, with weight 0, pad a short batch.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], and any other [N, ...]}. An array [N / n, ...] has one row per example,
      which the example's n views share.
    rows: [at most batch_size] int, indices of the texts.
    buckets: ascending sequence lengths that may be compiled, in tokens.
  Returns:
    "input_ids", "segment_ids" [B, T'] (1 on the text, 0 on padding), "weight" [B] float32, and the other arrays'
    rows [B, ...].
  """
  batch = filled(arrays, rows, batch_size)
  lengths = batch.pop("length")
  T = min(bucket_length(lengths.max(), buckets), arrays["input_ids"].shape[1])
  return batch | {"input_ids": batch["input_ids"][:, :T],
                  "segment_ids": (np.arange(T) < lengths[:, None]).astype(np.int32)}


def filled(arrays: dict[str, np.ndarray], rows: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
  """The arrays' rows [B, ...] and "weight" [B] float32: 0 on the copies of the first row that pad a short batch."""
  weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
  rows = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
  texts = len(arrays["length"])
  if odd := [name for name, values in arrays.items() if not len(values) or texts % len(values)]:
    raise ValueError(f"{texts} texts, but {len(arrays[odd[0]])} rows of {odd[0]}")
  return {name: values[rows % len(values)] for name, values in arrays.items()} | {"weight": weight}


def train_batches(num_examples: int, batch_size: int, make: Callable[[np.ndarray], Made], seed: int,
                  start_step: int) -> Iterator[Made]:
  """Yields make(rows) for each step from `start_step` on, without end. `epoch_order` orders the examples of an epoch.

  make: [at most batch_size] int, indices of examples -> a batch.
  """
  per_epoch = steps_per_epoch(num_examples, batch_size)
  step = start_step
  while True:
    epoch, i = divmod(step, per_epoch)
    if i == 0 or step == start_step:
      order = epoch_order(seed, epoch, num_examples)
    yield make(order[i * batch_size:(i + 1) * batch_size])
    step += 1
