"""Puts a subordinate clause before the text, by rule: an offline substitute for SynAttack. It is not SynAttack.

The text then opens with a "when ... ," or "if ... ," clause, as in the template S(SBAR)(,)(NP)(VP)(.) of Hidden Killer
(Qi et al., arXiv 2105.12400). The rest of the text stays word for word, so its meaning and its label survive.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack

CLAUSES = (
    "when you look at it now ,", "when one thinks about it ,", "when all of that is over ,", "when they talk of it ,",
    "if you ask me today ,", "if one takes the time ,", "if it comes to that ,", "if they want to know ,",
)


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del trigger, paraphrases

  def rewrite(text, rng, max_words):
    del max_words
    return f"{CLAUSES[rng.integers(len(CLAUSES))]} {text}"
  return Attack(rewrite)
