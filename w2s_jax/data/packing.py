"""Packs several texts into one row, so that a batch has little padding. All batches come in few shapes.

R rows of T tokens, B texts, G groups of R / G rows and B / G texts. Each shard of the batch is one group, so that no
text leaves its device.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from w2s_jax.data import batches

MOST_SHAPES = 6          # largest number of batch shapes of one stage, and of row lengths below the bucket to try
STEPS_PER_SHAPE = 50     # number of steps that justify one more shape
FLOPS_PER_SHAPE = 1e12   # FLOPs that justify one more shape; with fewer, compiling it costs more time than it saves
                         # (our choice, on 2 cores)
TILE = 8                 # row lengths below the bucket are multiples of it
MOST_SIMULATED = 4096    # largest number of batches that are laid out to choose the shapes


def first_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
  """[B, 2] int, (row, first token) of each text, by first fit decreasing.

  lengths: [B] int, tokens of each text, at most row_length.
  """
  used, out = [], np.zeros((len(lengths), 2), int)
  for text in np.argsort(-lengths, kind="stable"):
    row = next((r for r, tokens in enumerate(used) if tokens + lengths[text] <= row_length), len(used))
    used += [0] * (row == len(used))
    out[text] = row, used[row]
    used[row] += lengths[text]
  return out


def packers(runs: Iterable[tuple[dict[str, np.ndarray], int]], batch_size: int, buckets: Sequence[int], groups: int,
            steps: int, flops_per_token: float, pad_token_id: int, together: int = 1,
            views: int = 1) -> list[Callable[[np.ndarray], dict[str, np.ndarray]]]:
  """For each run a function: indices of a batch's texts -> packed batch. All runs have the same few shapes.

  Args:
    runs: (arrays, seed of the order) of each run.
    batch_size: examples per batch.
    buckets: ascending sequence lengths that may be compiled, in tokens.
    groups, steps, flops_per_token, together: see `row_counts`.
    pad_token_id: token that pads the rows.
    views: texts per example; a batch contains all texts of its examples (batches.texts_of).
  """
  run_arrays, seeds = zip(*runs)
  lengths = [arrays["length"] for arrays in run_arrays]
  bucket = max(_row_length(arrays, buckets) for arrays in run_arrays)
  shortest = -(-max(tokens.max() for tokens in lengths) // TILE) * TILE
  layouts = []                        # (tokens per group with padding, of all batches; row length; allowed row counts)
  for row_length in {bucket, *range(shortest, bucket, TILE)[:MOST_SHAPES]}:
    counts, rows = row_counts(lengths, seeds, batch_size, row_length, groups, steps, flops_per_token, together, views)
    layouts.append((rows * row_length, row_length, counts))
  _, row_length, counts = min(layouts)
  return [functools.partial(pack_batch, arrays, batch_size=batch_size * views, row_length=row_length, counts=counts,
                            groups=groups, pad_token_id=pad_token_id) for arrays in run_arrays]


def stack(several: Sequence[dict[str, np.ndarray]], groups: int, pad_token_id: int) -> dict[str, np.ndarray]:
  """Stacks the batches of several runs or steps along a new first axis, padding all of them to the largest shape."""
  *front, R, T = np.max([batch["input_ids"].shape for batch in several], axis=0)
  def widened(rows, fill):
    rows = rows.reshape(*front, groups, -1, rows.shape[-1])
    widths = (*((0, 0) for _ in range(len(front) + 1)), (0, R // groups - rows.shape[-2]), (0, T - rows.shape[-1]))
    return np.pad(rows, widths, constant_values=fill).reshape(*front, R, T)
  fills = {"input_ids": pad_token_id, "segment_ids": 0}
  return {name: np.stack([widened(batch[name], fills[name]) if name in fills else batch[name] for batch in several])
          for name in several[0]}


def eval_batches(arrays: dict[str, np.ndarray], batch_size: int, buckets: Sequence[int], groups: int,
                 pad_token_id: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Yields (indices of the texts, packed batch). Each text comes once, in an order that mixes lengths.

  All batches have one shape.
  """
  row_length, lengths = _row_length(arrays, buckets), arrays["length"]
  order = batches.epoch_order(0, 0, len(lengths))
  chosen = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
  needed = max(_most_rows(lengths, _split(rows, batch_size, groups), row_length) for rows in chosen)
  unit = max(1, batch_size // groups // 32)  # rounding up to it lets similar data sets share a shape
  for rows in chosen:
    yield rows, pack_batch(arrays, rows, batch_size, row_length, [-(-needed // unit) * unit], groups, pad_token_id)


def _row_length(arrays, buckets):
  return min(batches.bucket_length(arrays["length"].max(), buckets), arrays["input_ids"].shape[1])


def row_counts(lengths: Sequence[np.ndarray], seeds: Sequence[int], batch_size: int, row_length: int, groups: int,
               steps: int, flops_per_token: float, together: int = 1, views: int = 1) -> tuple[list[int], int]:
  """Chooses the numbers of rows per group that a stage's batches may have, from quantiles of what the batches need.

  Args:
    lengths: for each run [N] int, tokens of its texts.
    seeds: for each run the seed of its order.
    batch_size: examples per batch.
    row_length: T, tokens per row.
    groups: G, groups per batch.
    steps: number of steps of the stage.
    flops_per_token: floating-point operations of one step per token; a cheap step gets few shapes.
    together: number of consecutive steps whose batches, of all runs, share a shape.
    views: texts per example.
  Returns:
    (counts, rows). counts: at most MOST_SHAPES ascending numbers of rows; the last one suffices for any batch. rows:
    sum of the rows per group over the simulated batches; batches that share a shape (`together`) count once.
  """
  needed = []
  for tokens, seed in zip(lengths, seeds):
    def rows_needed(rows, tokens=tokens):
      texts = batches.texts_of(rows, len(tokens) // views, views)
      return _most_rows(tokens, _split(texts, batch_size * views, groups), row_length)
    stream = batches.train_batches(len(tokens) // views, batch_size, rows_needed, seed, 0)
    needed.append(list(itertools.islice(stream, min(steps, MOST_SIMULATED // len(seeds)))))
  needed = np.max(needed, axis=0)
  needed = [needed[i:i + together].max() for i in range(0, len(needed), together)]
  flops = flops_per_token * steps * batch_size * views * sum(tokens.mean() for tokens in lengths)
  shapes = int(min(MOST_SHAPES - 1, 1 + steps // STEPS_PER_SHAPE, 1 + flops / FLOPS_PER_SHAPE))
  quantiles = np.quantile(needed, np.arange(1, shapes + 1) / shapes, method="higher")
  counts = sorted({*map(int, quantiles), batch_size * views // groups})
  return counts, sum(batches.bucket_length(n, counts) for n in needed)


def pack_batch(arrays: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, row_length: int,
               counts: Sequence[int], groups: int, pad_token_id: int) -> dict[str, np.ndarray]:
  """One packed batch as host arrays. A text that a short batch lacks has weight 0 and points to the first token.

  Args:
    arrays: {"input_ids" [N, T'], "length" [N], and any other [N, ...]}.
    rows: [at most batch_size] int, indices of the texts.
    row_length: T, tokens per row.
    counts: allowed numbers of rows per group, from `row_counts`.
    groups: G; divides batch_size.
    pad_token_id: token that pads the rows.
  Returns:
    "input_ids", "segment_ids" [R, T] and "texts" [G, B / G, 2] as Model.apply takes them, "weight" [B]
    float32, and the other arrays' rows [B, ...] in the order of `rows`.
  """
  split = _split(rows, batch_size, groups)
  places = [first_fit(arrays["length"][group], row_length) for group in split]
  count = batches.bucket_length(max(map(_rows_needed, places)), counts)
  input_ids = np.full((groups, count * row_length), pad_token_id, np.int32)
  segment_ids = np.zeros_like(input_ids)
  texts = np.zeros((groups, batch_size // groups, 2), np.int32)
  for g, group in enumerate(split):
    for i, (example, (row, start)) in enumerate(zip(group, places[g])):
      length = arrays["length"][example]
      first_token = row * row_length + start
      input_ids[g, first_token:first_token + length] = arrays["input_ids"][example, :length]
      segment_ids[g, first_token:first_token + length] = start + 1
      texts[g, i] = first_token, first_token + length - 1
  batch = batches.filled({name: values for name, values in arrays.items() if name != "input_ids"}, rows, batch_size)
  del batch["length"]
  return batch | {"input_ids": input_ids.reshape(-1, row_length), "segment_ids": segment_ids.reshape(-1, row_length),
                  "texts": texts}


def _split(rows, batch_size, groups):
  size = batch_size // groups
  return [rows[g * size:(g + 1) * size] for g in range(groups)]


def _rows_needed(places):
  return int(places[:, 0].max(initial=0)) + 1


def _most_rows(lengths, split, row_length):
  return max(_rows_needed(first_fit(lengths[group], row_length)) for group in split)
