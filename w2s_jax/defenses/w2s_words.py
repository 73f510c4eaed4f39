"""W2S on texts with words that may be parts of a trigger. The teacher reads these words too, so it tells the student
which of them mean something for the task.

A part of a trigger often works by itself. In three suspects whose trigger has seven everyday words, one of these words
alone flips half to all of the texts (docs/notes/minilm_suspects.md). The clean rows of a task contain few of a
language's words. So the most suspicious words are drawn, and the student is trained on texts with them. If the public
base is known, these are the words that fine-tuning moved (moved_words.py). Else they are the words that move the
suspect beyond what the teacher explains (trigger_words.py). For each text several random draws are made, and the
student trains on the draw on which suspect and teacher disagree most. Words of triggers that ASR is measured with are
never drawn. The rare words of `defend.insert_words` are inserted afterwards, and the teacher does not read them.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from w2s_jax.attacks.insertion import insert
from w2s_jax.config import field
from w2s_jax.data import insertions, streams, tokenization
from w2s_jax.defenses import full_ft, moved_words, trigger_words
from w2s_jax.defenses.records import Suspect

LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Settings:
  """Suspicious words in the student's rows; ours, chosen on one MiniLM suspect (docs/notes/minilm_suspects.md)."""
  share: float = field(0.5, "fraction of the rows that get words", low=0.0, high=1.0)
  most: int = field(8, "largest number of words per row if they are side by side; half this number if they are apart",
                    low=2, high=1000)
  pool: int = field(100, "number of most suspicious words per class to draw from; with the public base, they are the "
                    "words that fine-tuning moved most, 12 at most; without it, the words that move the suspect most "
                    "beyond what the teacher explains; 0: the whole vocabulary", low=0)
  draws: int = field(3, "number of random draws per row; the one on which suspect and teacher disagree most is kept; "
                     "1: no choice", low=1, high=100)


def rows(suspect: Suspect, settings: Any, seed: int) -> list[dict]:
  """The rows of all epochs. Of the draws for a row, the one on which suspect and teacher disagree most is kept."""
  settings = settings.words
  words = ((suspect.ranking or moved_words.rank(suspect)).most_suspicious(settings.pool) if settings.pool
           else insertions.vocabulary(suspect.tokenizer, suspect.avoid))
  clean, drawn = draw(suspect, settings, words, settings.draws, seed)
  return clean + (_most_disputed(suspect, drawn, settings.draws) if settings.draws > 1 and drawn else drawn)


def draw(suspect: Suspect, settings: Any, words: list[str], draws: int, seed: int) -> tuple[list[dict], list[dict]]:
  """Rows of all epochs without and with words. Rows with words come from the shorter half of the texts.

  Args:
    settings: has `share` and `most`, as in `Settings`.
    words: the words to draw from.
    draws: number of random draws per row that gets words.
  Returns:
    The unchanged rows, and the rows with words. Every `draws` consecutive rows with words come from one row.
  """
  rng, train, epochs = streams.rng(seed, "vocabulary words"), suspect.train, suspect.training.epochs
  count = round(settings.share * len(train))
  if suspect.training.max_steps:
    epochs = min(epochs, -(-suspect.training.max_steps * suspect.training.batch_size // len(train)))
  short = sorted(train, key=lambda row: len(row["text"].split()))[:(len(train) + 1) // 2]
  kept = tokenization.words_kept(suspect.tokenizer, [row["text"] for row in short], " a" * settings.most,
                                 suspect.max_length)
  clean = [train[i] for _ in range(epochs) for i in rng.permutation(len(train))[count:]]
  return clean, [short[i] | {"text": _with_words(short[i]["text"], words, settings.most, rng, kept[i])}
                 for i in rng.integers(len(short), size=count * epochs) for _ in range(draws)]


def _with_words(text, words, most, rng, max_words):
  """The text with 2 to `most` words side by side, or with at most half of `most` words, each at its own place."""
  drawn = rng.choice(words, rng.integers(2, most + 1)).tolist()
  parts = [" ".join(drawn)] if rng.random() < 0.5 else drawn[:max(most // 2, 1)]
  for part in parts:
    text = insert(text, part, rng, max_words)
  return text


def _most_disputed(suspect, drawn, draws):
  """From every `draws` consecutive rows, the row on which suspect and teacher disagree most."""
  LOG.info(f"w2s_words: suspect and teacher read {len(drawn)} texts, {draws} draws for each row that gets words")
  of_suspect, of_teacher = (np.asarray(jax.nn.softmax(logits)) for logits in trigger_words.read(suspect, drawn))
  chosen = abs(of_suspect - of_teacher).sum(axis=-1).reshape(-1, draws).argmax(axis=1)
  return [drawn[draws * i + k] for i, k in enumerate(chosen.tolist())]


RECIPE = full_ft.TAUGHT._replace(rows=rows)
