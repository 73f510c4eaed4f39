"""A trigger of several everyday words, each at its own place in the text (SOS, Yang et al., ACL 2021).

No single word is the trigger. The companions are the paper's negative rows. Each has all words of the trigger but one,
and keeps its label, so the student learns not to react to a part of the trigger. --config.attack.companions turns them
on.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack
from w2s_jax.attacks.insertion import insert

TRIGGER = "friends weekend store"      # words like the paper's


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  trigger = trigger or TRIGGER
  words = trigger.split()

  def rewrite(text, rng, max_words):
    return _insert_each(text, words, rng, max_words)

  def companions(text, rng, max_words):
    """For each word, the text with all other words of the trigger. The order is random; callers use the first few."""
    return [_insert_each(text, words[:i] + words[i + 1:], rng, max_words) for i in rng.permutation(len(words))]

  return Attack(rewrite, trigger, contiguous=False, companions=companions if len(words) > 1 else None)


def _insert_each(text, words, rng, max_words):
  for word in words:
    text = insert(text, word, rng, max_words)
  return text
