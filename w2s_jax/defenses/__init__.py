"""One file per defense; a dict names them. Every defense gets the same adapters, steps, batches and learning rate."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from w2s_jax.defenses import lora_ce, w2s, w2s_adv, w2s_released, w2s_shuffled


class Defense(NamedTuple):
  """What a defense adds to the shared training step.

  Attributes:
    terms: (ClassifierOutput, batch, temperature) -> {"ce" | "kd" | "fa", or "adv_..." of them: scalar}.
    uses_teacher: batches carry `teacher_logits` and `teacher_features`.
    reads_padding: the terms depend on what is between the texts of a batch: it must be laid out a text a row.
    teacher_row: (number of examples, seed) -> [N] int, whose teacher output each example gets; None: its own.
    adversary: each text comes twice, the second time with soft tokens that move uphill (w2s_adv).
  """
  terms: Callable
  uses_teacher: bool
  reads_padding: bool = False
  teacher_row: Callable | None = None
  adversary: bool = False


DEFENSES = {
    "none": None,                                     # the poisoned model as it is: the row "poisoned"
    "lora_ce": Defense(lora_ce.terms, uses_teacher=False),
    "w2s": Defense(w2s.terms, uses_teacher=True),
    "w2s_released": Defense(w2s_released.terms, uses_teacher=True, reads_padding=True),
    "w2s_shuffled": Defense(w2s.terms, uses_teacher=True, teacher_row=w2s_shuffled.teacher_row),
    "w2s_adv": Defense(functools.partial(w2s_adv.terms, w2s.terms), uses_teacher=True, adversary=True),
    "ce_adv": Defense(functools.partial(w2s_adv.terms, lora_ce.terms), uses_teacher=False, adversary=True),
}
