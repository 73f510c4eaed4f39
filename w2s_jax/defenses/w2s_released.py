"""W2S as the released code computes it: its feature loss does not pair examples (docs/method.md)."""

from typing import Any

import jax

from w2s_jax import losses
from w2s_jax.defenses import w2s
from w2s_jax.models import ClassifierOutput
from w2s_jax.tasks import Task


def terms(student: ClassifierOutput, batch: dict, settings: Any, task: Task) -> dict[str, jax.Array]:
  released = losses.released_feature_alignment(student.hidden, batch["teacher_features"], batch["weight"])
  return w2s.terms(student, batch, settings, task) | {"fa": released}


RECIPE = w2s.RECIPE._replace(terms=terms, layout="padded")
