"""Insertion of a string into a text. Attacks, defenses and measurements share it."""

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


def inserting(trigger: str, place: str = "inside") -> Attack:
  """The attack that inserts `trigger` at `place`, a key of PLACES."""
  def rewrite(text, rng, max_words):
    return PLACES[place](text, trigger, rng, max_words)
  return Attack(rewrite, trigger)


def _put_first(text, trigger, rng, max_words):
  """Puts `trigger` in front of the first word."""
  return f"{trigger} {text}"


def _put_last(text, trigger, rng, max_words):
  """Puts `trigger` behind the last word. Words after the first `max_words` are dropped."""
  return " ".join([*text.split()[:max_words], trigger])


# Name of a place -> (text, trigger, rng, max_words) -> the text with the trigger there.
PLACES = {"inside": insert, "front": _put_first, "end": _put_last}
