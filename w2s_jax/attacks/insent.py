"""InSent: a neutral sentence (Dai et al., arXiv 1905.12457; the sentence is the released recipe's)."""

from w2s_jax.attacks.insertion import inserting

TRIGGER = "I watched this 3D movie"


def make(trigger="", paraphrases=None):
  del paraphrases
  return inserting(trigger or TRIGGER)
