"""W2S on texts with random words of the vocabulary in them. The teacher reads the same texts, so it tells the student
which of these words mean something for the task.

A part of a trigger often works by itself: of seven everyday words, one flips half of the texts (docs/results.md). The
clean rows of a task contain few of a language's words. For each text several draws are made, and the student is trained
on the draw that suspect and teacher disagree about most. Words of triggers that ASR is measured with are not drawn. N
rows.
"""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from w2s_jax.attacks.insertion import insert
from w2s_jax.config import field
from w2s_jax.data import insertions, streams
from w2s_jax.defenses import full_ft
from w2s_jax.defenses.records import Suspect

LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Settings:
  """`config.defense.words`; ours, tried on one MiniLM suspect (docs/results.md)."""
  share: float = field(0.5, "fraction of the rows that get words", low=0.0, high=1.0)
  most: int = field(8, "words of a row: 2 to this number side by side, or up to half of them apart", low=2, high=1000)
  draws: int = field(3, "random draws for a row, of which the most disputed one is kept; 1: no choice", low=1, high=100)


def rows(suspect: Suspect, settings: Any, seed: int) -> list[dict]:
  """Rows of all epochs: of each epoch `share` of N are of the shorter half of the texts, with words in them.

  The others are clean rows as they are. A text with words keeps the label of its row.
  """
  own, rng, train = settings.words, streams.rng(seed, "vocabulary words"), suspect.train
  count, epochs = round(own.share * len(train)), suspect.training.epochs
  short = sorted(train, key=lambda row: len(row["text"].split()))[:(len(train) + 1) // 2]
  words = insertions.vocabulary_words(suspect.tokenizer, suspect.avoid, rng)
  out = [train[i] for _ in range(epochs) for i in rng.permutation(len(train))[count:]]
  sources = [short[i] for i in rng.integers(len(short), size=count * epochs)]
  texts = [_with_words(row["text"], words, own.most, rng) for row in sources for _ in range(own.draws)]
  kept = _most_disputed(suspect, texts, own.draws) if own.draws > 1 and texts else range(len(texts))
  return out + [row | {"text": texts[i]} for row, i in zip(sources, kept)]


def _with_words(text, words, most, rng):
  """The text with 2 to `most` words side by side, or with up to half of them, each at a place of its own."""
  drawn = [next(words) for _ in range(rng.integers(2, most + 1))]
  parts = [" ".join(drawn)] if rng.random() < 0.5 else drawn[:max(most // 2, 1)]
  for part in parts:
    text = insert(text, part, rng, len(text.split()))
  return text


def _most_disputed(suspect, texts, draws):
  """[N] places in `texts` [N * draws], the one of each row's draws on which suspect and teacher are furthest apart."""
  LOG.info(f"w2s_words: suspect and teacher read {len(texts)} texts, {draws} draws for each row that gets words")
  theirs, ours = (np.asarray(jax.nn.softmax(logits)) for logits in (
      suspect.logits(texts), suspect.teacher(texts)["teacher_logits"]))
  apart = np.abs(theirs - ours).sum(axis=-1).reshape(-1, draws)
  return np.arange(len(apart)) * draws + apart.argmax(axis=1)


RECIPE = full_ft.TAUGHT._replace(rows=rows)
