"""Insertion of a string between two words. Attacks, defenses and measurements share it."""

import numpy as np

from w2s_jax.attacks.attack import Attack


def insert(text: str, trigger: str, rng: np.random.Generator, max_words: int) -> str:
  """Inserts `trigger` into `text` after a uniformly random one of its first `max_words` words.

  As in the released recipe, the trigger never comes before the first or after the last word. A text of one word (on
  which the released code crashes) gets the trigger after that word.
  """
  words = text.split()
  gap = int(rng.integers(1, max(2, min(len(words), max_words + 1))))
  return " ".join(words[:gap] + [trigger] + words[gap:])


def inserting(trigger: str) -> Attack:
  """The attack that inserts `trigger`."""
  def rewrite(text, rng, max_words):
    return insert(text, trigger, rng, max_words)
  return Attack(rewrite, trigger)
