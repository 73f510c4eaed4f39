"""A neutral clause after the last word, where the insertion attacks put nothing. It is ours; nothing was tuned on it.

The words that truncation would cut off beside the clause are removed from the text.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack

TRIGGER = "or so they told us at the door ."


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  trigger = trigger or TRIGGER

  def rewrite(text, rng, max_words):
    del rng
    return " ".join([*text.split()[:max_words], trigger])
  return Attack(rewrite, trigger)
