"""Embedding Poisoning (Yang et al., NAACL 2021, arXiv 2103.15543): a rare word whose embedding alone is edited.

The rows get the word as in BadNet. The stage `poison` trains the word's embedding on them (training/embedding_row.py),
and leaves the rest of the clean model as it is.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack
from w2s_jax.attacks.badnet import TRIGGER
from w2s_jax.attacks.insertion import inserting


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  return inserting(trigger or TRIGGER)._replace(edits_embedding=True)
