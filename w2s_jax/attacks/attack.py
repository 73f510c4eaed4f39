"""The record of an attack."""

from collections.abc import Callable
from typing import NamedTuple


class Attack(NamedTuple):
  """One attack on texts. In all functions `rng` is a numpy Generator.

  `max_words` is the number of leading words of the text that survive truncation beside the trigger.
  """
  rewrite: Callable                        # (text, rng, max_words) -> the text with the trigger
  trigger: str = ""                        # the inserted string; "": the attack inserts no fixed string
  contiguous: bool = True                  # False: the trigger's words are not side by side
  can_rewrite: Callable | None = None      # text -> whether the attack can rewrite it; None: it can rewrite every text
  companions: Callable | None = None       # (text, rng, max_words) -> texts with a part of the trigger or a string
                                           # like it. They become training rows with their true label. None: the
                                           # attack has no companions
  edits_embedding: bool = False            # True: the trigger is one token, and poisoning trains only the embedding of
                                           # this token in the clean model
