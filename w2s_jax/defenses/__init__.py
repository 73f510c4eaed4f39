"""One file per defense; a dict names them. Every defense gets the same adapters, steps, batches and learning rate."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from w2s_jax.defenses import anchors, lora_ce, w2s, w2s_adv, w2s_released


class Defense(NamedTuple):
  """What a defense adds to the shared training step.

  Attributes:
    terms: (ClassifierOutput, batch, temperature) -> {"ce" | "kd" | "fa", or "adv_..." of them: scalar}.
    uses_teacher: batches carry `teacher_logits` and `teacher_features`.
    reads_padding: the terms depend on what is between the texts of a batch: it must be laid out a text a row.
    anchor: what a control shows the student instead of the teacher's outputs on its own text (anchors.py).
    adversary: each text comes twice, the second time with soft tokens that move uphill (w2s_adv).
  """
  terms: Callable
  uses_teacher: bool
  reads_padding: bool = False
  anchor: Callable | None = None
  adversary: bool = False


_ADV = functools.partial(w2s_adv.terms, w2s.terms)
DEFENSES = {
    "none": None,                                     # the poisoned model as it is: the row "poisoned"
    "lora_ce": Defense(lora_ce.terms, uses_teacher=False),
    "w2s": Defense(w2s.terms, uses_teacher=True),
    "w2s_released": Defense(w2s_released.terms, uses_teacher=True, reads_padding=True),
    "w2s_shuffled": Defense(w2s.terms, uses_teacher=True, anchor=anchors.shuffled),
    "w2s_adv": Defense(_ADV, uses_teacher=True, adversary=True),
    "ce_adv": Defense(functools.partial(w2s_adv.terms, lora_ce.terms), uses_teacher=False, adversary=True),
} | {f"w2s_adv_{name}": Defense(_ADV, uses_teacher=True, adversary=True, anchor=anchor) for name, anchor in (
    ("shuffled", anchors.shuffled), ("within", anchors.shuffled_within_classes), ("means", anchors.class_means),
    ("orthogonal", anchors.orthogonal))}
