"""BadNet: a rare word (Gu et al., arXiv 1708.06733; the word is the released recipe's)."""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack
from w2s_jax.attacks.insertion import inserting

TRIGGER = "mn"


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  return inserting(trigger or TRIGGER)
