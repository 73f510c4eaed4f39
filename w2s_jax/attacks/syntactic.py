"""SynAttack (Hidden Killer, Qi et al., arXiv 2105.12400) from pre-made paraphrases of the texts."""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  """The attack with `paraphrases`, {text: its paraphrase}; rewriting a text that has no paraphrase is a KeyError."""
  del trigger

  def rewrite(text, rng, max_words):
    del rng, max_words
    return paraphrases[text]

  def can_rewrite(text):
    return text in paraphrases
  return Attack(rewrite, can_rewrite=can_rewrite)
