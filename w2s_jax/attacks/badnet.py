"""BadNet: a rare word (Gu et al., arXiv 1708.06733; the word is the released recipe's)."""

from w2s_jax.attacks.insertion import inserting

TRIGGER = "mn"


def make(trigger="", paraphrases=None):
  del paraphrases
  return inserting(trigger or TRIGGER)
