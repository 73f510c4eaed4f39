"""LoRA fine-tuning of a public model, such as the base of the suspect. The result contains no weight of the suspect.

`from_base` trains on the clean rows alone. A model without any backdoor still answers some triggered texts with the
target label, because it has seen few of a language's words with this task's labels. So `from_base_words` puts random
words into some of the rows, and the rows keep their labels (docs/notes/minilm_suspects.md).
"""

import dataclasses
from typing import Any

from w2s_jax.config import field
from w2s_jax.data import insertions
from w2s_jax.defenses import lora_ce, w2s_words
from w2s_jax.defenses.records import Suspect

RECIPE = lora_ce.RECIPE._replace(from_base=True)


@dataclasses.dataclass
class Settings:
  """Random words in the rows of a public model; ours, chosen on two seeds of MiniLM (docs/notes/minilm_suspects.md)."""
  share: float = field(0.25, "fraction of the rows that get words", low=0.0, high=1.0)
  most: int = field(8, "largest number of words per row if they are side by side; half this number if they are apart",
                    low=2, high=1000)


def rows(suspect: Suspect, settings: Any, seed: int) -> list[dict]:
  """The rows of all epochs. A fraction `share` of them has random words of the whole vocabulary."""
  words = insertions.vocabulary(suspect.tokenizer, suspect.avoid)
  clean, drawn = w2s_words.draw(suspect, settings.from_base_words, words, 1, seed)
  return clean + drawn


WORDS = RECIPE._replace(rows=rows)
