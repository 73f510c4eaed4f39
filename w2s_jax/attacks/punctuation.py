"""Marks instead of words: every full stop becomes a comma and a full stop (after PuncAttack, arXiv 2312.15867).

The paper chooses marks and places with a language model; this is the rule it comes to without one.
"""


def make(trigger="", paraphrases=None):
  del trigger, paraphrases
  def attack(text, rng, max_words):
    stops = text if "." in text else f"{text} ."
    return stops.replace(".", ", .")
  return attack
