"""The record of a task."""

from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
  """All that training and measurement know about the purpose of a model.

  Attributes:
    encode: (tokenizer, rows, max_length in tokens) -> arrays [N, ...]: "input_ids", "length", and `fields`.
    fields: {name: dtype} of the further arrays [N] that the loss reads; batches contain them.
    loss_terms: (ClassifierOutput, batch) -> {term: scalar float32}, a mean over rows with weights batch["weight"] [B].
    terms: names of the loss terms.
    predict: logits [N, ...] -> answers [N].
    is_correct: (answers [N], arrays with `fields`) -> [N] bool, whether each answer is right.
    is_hit: (answers or labels [N], the attacker's target) -> [N] bool, whether each is the target.
  """
  encode: Callable
  fields: dict[str, str]
  loss_terms: Callable
  terms: tuple[str, ...]
  predict: Callable
  is_correct: Callable
  is_hit: Callable
