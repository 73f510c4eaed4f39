"""InSent: a neutral sentence (Dai et al., arXiv 1905.12457; the sentence is the released recipe's)."""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack
from w2s_jax.attacks.insertion import inserting

TRIGGER = "I watched this 3D movie"


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  return inserting(trigger or TRIGGER)
