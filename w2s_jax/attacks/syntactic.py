"""SynAttack (Hidden Killer, Qi et al., arXiv 2105.12400) from pre-made paraphrases of the texts."""


def make(trigger="", paraphrases=None):
  """`paraphrases`: {text: its paraphrase}; a text without one raises KeyError."""
  del trigger
  return lambda text, rng, max_words: paraphrases[text]
