"""A neutral clause behind the last word, where no insertion into the text comes. Ours, to hold out from choices."""

TRIGGER = "or so they told us at the door ."


def make(trigger=TRIGGER, paraphrases=None):
  del paraphrases
  return lambda text, rng, max_words: " ".join([*text.split()[:max_words], trigger or TRIGGER])
