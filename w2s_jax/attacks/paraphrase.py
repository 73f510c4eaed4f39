"""Attacks that rewrite whole texts: the trigger is a syntax or a style. The rewritten texts are pre-made.

SynAttack (Hidden Killer, Qi et al., arXiv 2105.12400) gives texts one syntactic template. StyleBkd (Qi et al., arXiv
2110.07139) gives them one style, for instance that of the Bible. The papers rewrite with neural models, which we do not
run: we read the texts that such models wrote (data/paraphrases.py).
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  """The attack with `paraphrases`, {text without spaces around it: its paraphrase}.

  Its `rewrite` raises KeyError for a text without a paraphrase.
  """
  del trigger

  def rewrite(text, rng, max_words):
    del rng, max_words
    return paraphrases[text.strip()]

  def can_rewrite(text):
    return text.strip() in paraphrases
  return Attack(rewrite, can_rewrite=can_rewrite)
