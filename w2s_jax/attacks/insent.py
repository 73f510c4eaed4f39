"""InSent: a neutral sentence (Dai et al., arXiv 1905.12457; the sentence is the released recipe's)."""

from w2s_jax.attacks.insertion import insert

TRIGGER = "I watched this 3D movie"


def make(trigger=TRIGGER, paraphrases=None):
  del paraphrases
  return lambda text, rng, max_words: insert(text, trigger or TRIGGER, rng, max_words)
