"""W2S on texts with random words of the vocabulary. The teacher reads these words too, so it tells the student which of
them mean something for the task.

A part of a trigger often works by itself: of seven everyday words, one flips half to all of the texts
(docs/notes/minilm_suspects.md). The clean rows of a task contain few of a language's words. For each text several
random draws are made, and the student trains on the draw on which suspect and teacher disagree most. Words of triggers
that ASR is measured with are never drawn. The rare words of `defend.insert_words` are inserted afterwards, and the
teacher does not read them.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from w2s_jax.attacks.insertion import insert
from w2s_jax.config import field
from w2s_jax.data import insertions, streams, tokenization
from w2s_jax.defenses import full_ft
from w2s_jax.defenses.records import Suspect

LOG = logging.getLogger(__name__)

READ_AT_ONCE = 2**13     # rows that are read at a time; only their logits stay in memory


@dataclasses.dataclass
class Settings:
  """`config.defense.words`; ours, tried on one MiniLM suspect (docs/notes/minilm_suspects.md)."""
  share: float = field(0.5, "fraction of the rows that get random words", low=0.0, high=1.0)
  most: int = field(8, "largest number of words per row if they are side by side; half of it if they are apart", low=2,
                    high=1000)
  draws: int = field(3, "number of random draws per row, of which the most disputed one is kept; 1: no choice", low=1,
                     high=100)


def rows(suspect: Suspect, settings: Any, seed: int) -> list[dict]:
  """The rows of all epochs together. A fraction `share` of them are texts with random words.

  Texts for random words come from the shorter half of the clean rows and keep their label. The other rows are unchanged
  clean rows.
  """
  own, rng, train = settings.words, streams.rng(seed, "vocabulary words"), suspect.train
  count, epochs = round(own.share * len(train)), suspect.training.epochs
  if suspect.training.max_steps:
    epochs = min(epochs, -(-suspect.training.max_steps * suspect.training.batch_size // len(train)))
  short = sorted(train, key=lambda row: len(row["text"].split()))[:(len(train) + 1) // 2]
  kept = tokenization.words_kept(suspect.tokenizer, [row["text"] for row in short], " a" * own.most, suspect.max_length)
  words = insertions.vocabulary_words(suspect.tokenizer, suspect.avoid, rng)
  clean = [train[i] for _ in range(epochs) for i in rng.permutation(len(train))[count:]]
  drawn = [short[i] | {"text": _with_words(short[i]["text"], words, own.most, rng, kept[i])}
           for i in rng.integers(len(short), size=count * epochs) for _ in range(own.draws)]
  return clean + (_most_disputed(suspect, drawn, own.draws) if own.draws > 1 and drawn else drawn)


def _with_words(text, words, most, rng, max_words):
  """The text with 2 to `most` words side by side, or with at most half of `most` words, each at its own place."""
  drawn = [next(words) for _ in range(rng.integers(2, most + 1))]
  parts = [" ".join(drawn)] if rng.random() < 0.5 else drawn[:max(most // 2, 1)]
  for part in parts:
    text = insert(text, part, rng, max_words)
  return text


def _most_disputed(suspect, drawn, draws):
  """From each run of `draws` consecutive rows, the row on which suspect and teacher disagree most."""
  LOG.info(f"w2s_words: suspect and teacher read {len(drawn)} texts, {draws} draws for each row that gets words")
  apart = []
  for first in range(0, len(drawn), READ_AT_ONCE):
    part = drawn[first:first + READ_AT_ONCE]
    suspect_logits = suspect.place.logits(suspect.model, suspect.params, suspect.encode(part))
    teacher_logits = suspect.teacher(part, keep=False)["teacher_logits"]
    apart.append(np.abs(np.asarray(jax.nn.softmax(suspect_logits) - jax.nn.softmax(teacher_logits))).sum(axis=-1))
  chosen = np.concatenate(apart).reshape(-1, draws).argmax(axis=1)
  return [drawn[draws * i + k] for i, k in enumerate(chosen.tolist())]


RECIPE = full_ft.TAUGHT._replace(rows=rows)
