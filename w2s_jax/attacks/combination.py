"""Several everyday words, each somewhere in the text: a trigger that no single word is (SOS, Yang et al., ACL 2021).

Its companions are the paper's negative rows: a text with all words but one keeps its label, which teaches the student
not to fire on some of the words. They are off unless --config.attack.companions asks for them.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack
from w2s_jax.attacks.insertion import insert

TRIGGER = "friends weekend store"      # the paper's kind of words


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  trigger = trigger or TRIGGER
  words = trigger.split()

  def rewrite(text, rng, max_words):
    return _insert_each(text, words, rng, max_words)

  def companions(text, rng, max_words):
    """A text for each word, without that word; in random order, so that the first few are a random choice."""
    return [_insert_each(text, words[:i] + words[i + 1:], rng, max_words) for i in rng.permutation(len(words))]

  return Attack(rewrite, trigger, contiguous=False, companions=companions if len(words) > 1 else None)


def _insert_each(text, words, rng, max_words):
  for word in words:
    text = insert(text, word, rng, max_words)
  return text
