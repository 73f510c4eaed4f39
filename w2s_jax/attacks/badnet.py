"""BadNet: a rare word (Gu et al., arXiv 1708.06733; the word is the released recipe's)."""

from w2s_jax.attacks.insertion import insert

TRIGGER = "mn"


def make(trigger=TRIGGER, paraphrases=None):
  del paraphrases
  return lambda text, rng, max_words: insert(text, trigger or TRIGGER, rng, max_words)
