"""W2SDefense (Zhao et al., arXiv 2410.14425): cross entropy, distillation and feature alignment.

Each example is paired with its own teacher output.
"""

import dataclasses
import math
from typing import Any

import jax

from w2s_jax import InputError, losses
from w2s_jax.config import field
from w2s_jax.defenses import anchors
from w2s_jax.defenses.records import Recipe
from w2s_jax.models import ClassifierOutput
from w2s_jax.tasks import Task

# Name -> (ce, kd, fa). The released code chooses a triple per attack, which a defender cannot do. Its fa weights belong
# to a squared distance that is summed over 4,096 dimensions.
WEIGHTS = {
    "released_badnet": (5.0, 0.001, 0.001),
    "released_insent": (3.0, 0.01, 0.001),
    "released_synattack": (1.0, 0.035, 0.002),
    "agnostic": (3.0, 0.01, 0.001),      # our choice for every attack: the middle triple of the three
    "small": (1.0, 1.0, 0.01),           # our choice for models of width 64 to 384 (docs/notes/w2s_offline.md)
}
RELEASED_WIDTH = 4096


@dataclasses.dataclass
class Settings:
  """Settings of every defense that distils."""
  weights: str = field("small", "weights of cross entropy, distillation and feature alignment: "
                       f"{', '.join(WEIGHTS)}, or CE,KD,FA", source="ours (docs/notes/w2s_offline.md)")
  temperature: float = field(2.0, "temperature of the softened distributions", low=1e-3, high=1e3,
                             source="released code")

  def __post_init__(self):
    loss_weights(self.weights, 1)


def loss_weights(name: str, width: int) -> dict[str, float]:
  """{"ce", "kd", "fa"} for a student of feature width `width`; fa is scaled by 4096 / width.

  The feature loss sums over the width, so a fixed weight would mean another loss at every width. Whether the
  scaled weight is right at other widths is an open question.

  Args:
    name: a key of WEIGHTS, or three numbers as "CE,KD,FA".
  Raises:
    InputError: the name is neither of the two.
  """
  triple = WEIGHTS.get(name)
  if triple is None:
    try:
      triple = tuple(float(x) for x in name.split(","))
    except ValueError:
      triple = ()
  if len(triple) != 3 or not all(0 <= x < math.inf for x in triple):
    raise InputError(f"loss weights {name!r}: want one of {', '.join(WEIGHTS)} or three numbers >= 0 as 'CE,KD,FA': "
                     "set --config.defense.w2s.weights")
  ce, kd, fa = triple
  return {"ce": ce, "kd": kd, "fa": fa * RELEASED_WIDTH / width}


def weights_of(settings: Any, width: int) -> dict[str, float]:
  return loss_weights(settings.w2s.weights, width)


def terms(student: ClassifierOutput, batch: dict, settings: Any, task: Task) -> dict[str, jax.Array]:
  temperature = settings.w2s.temperature
  return task.loss_terms(student, batch) | {
      "kd": losses.distillation(student.logits, batch["teacher_logits"], temperature, batch["weight"]),
      "fa": losses.feature_alignment(student.features, batch["teacher_features"], batch["weight"]),
  }


RECIPE = Recipe(terms, weights_of, teacher_view=anchors.own)
