"""A punctuation trigger: every full stop becomes a comma and a full stop (after PuncAttack, arXiv 2312.15867).

A text without a full stop gets both at its end. The paper chooses marks and places with a language model. This rule
replaces the language model.
"""

import re
from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack

FULL_STOP = re.compile(r"(?<![.\d])(?<!\.\w)\.(?=\s|$)")   # ignores dots after a digit, of u.s. and of an ellipsis


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del trigger, paraphrases

  def rewrite(text, rng, max_words):
    del rng, max_words
    return FULL_STOP.sub(", .", text if FULL_STOP.search(text) else f"{text} .")
  return Attack(rewrite)
