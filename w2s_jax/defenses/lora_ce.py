"""LoRA fine-tuning with cross entropy alone, on the same clean rows: the control of every defense that distils."""

from typing import Any

import jax

from w2s_jax.defenses.records import Recipe
from w2s_jax.models import ClassifierOutput
from w2s_jax.tasks import Task


def terms(student: ClassifierOutput, batch: dict, settings: Any, task: Task) -> dict[str, jax.Array]:
  del settings
  return task.loss_terms(student, batch)


RECIPE = Recipe(terms, lambda settings, width: {"ce": 1.0})
