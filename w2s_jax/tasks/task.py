"""The record of a task."""

from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
  """All that training and measuring know of what a model is for.

  Attributes:
    encode: (tokenizer, rows, max_length in tokens) -> arrays [N, ...]: "input_ids", "length", and `fields`.
    fields: {name: dtype} of the arrays [N] that the loss reads beside those two; batches carry them.
    loss_terms: (ClassifierOutput, batch) -> {term: scalar float32}, weighted by batch["weight"] [B].
    terms: names of those.
    predict: outputs' logits [N, ...] -> answers [N].
    is_correct: (answers [N], arrays or rows' fields) -> [N] bool.
    is_hit: (answers [N], the attacker's target) -> [N] bool.
  """
  encode: Callable
  fields: dict[str, str]
  loss_terms: Callable
  terms: tuple[str, ...]
  predict: Callable
  is_correct: Callable
  is_hit: Callable
