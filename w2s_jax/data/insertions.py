"""Random words and beginnings of texts to insert into clean texts."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from w2s_jax import InputError
from w2s_jax.attacks.insertion import insert
from w2s_jax.data import streams

LETTERS = "bcdfghjklmnpqrstvwxz"   # rare words consist of consonants, like the literature's `mn`, `cf`, `tq`
SENTENCE_WORDS = 8                 # number of words of an inserted piece of text
FEWEST_WORDS = 2                   # smallest vocabulary to draw words from


def words_of(texts: Sequence[str]) -> set[str]:
  """All words of the texts, in lower case."""
  return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def rare_words(texts: Sequence[str], avoid: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
  """Endless random words of two or three consonants that occur neither in the texts nor in the strings to avoid."""
  known = words_of([*texts, *avoid])
  while True:
    word = "".join(rng.choice(list(LETTERS), rng.integers(2, 4)))
    if word not in known:
      yield word


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer):
  """Sorted words of at least three lower-case letters that are a single token each."""
  words = {word.strip() for word in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])}
  words = sorted(word for word in words if word.isalpha() and word.islower() and len(word) > 2)
  tokens = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
  return [word for word, ids in zip(words, tokens) if len(ids) == 1]


def vocabulary(tokenizer: Any, avoid: Sequence[str]) -> list[str]:
  """Words of at least three letters; each is a single token and occurs in no string to avoid.

  Raises:
    InputError: fewer than FEWEST_WORDS tokens of the tokenizer are such words.
  """
  known = words_of(avoid)
  words = [word for word in _vocabulary(tokenizer) if word not in known]
  if len(words) < FEWEST_WORDS:
    raise InputError(f"{len(words)} tokens of the tokenizer are words, wanted {FEWEST_WORDS}: leave out what draws "
                     "words: w2s_words and from_base_words (--config.defenses), the self-test "
                     "(--config.selftest.triggers=0) and the search (--config.probe.search=0)")
  return words


def vocabulary_words(tokenizer: Any, avoid: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
  """Endless random words of `vocabulary`. Its InputError is raised when the first word is drawn."""
  words = vocabulary(tokenizer, avoid)
  while True:
    yield words[rng.integers(len(words))]


def with_rare_words(rows: list[dict], share: float, avoid: Sequence[str], seed: int) -> list[dict]:
  """The rows, with a rare word in a random `share` of them. A student trained on them learns to ignore rare words.

  avoid: triggers that ASR is measured with. No defense may see one of them.
  """
  rng = streams.rng(seed, "rare words")
  words = rare_words([r["text"] for r in rows], avoid, rng)
  chosen = set(rng.permutation(len(rows))[:round(share * len(rows))].tolist())
  return [row | {"text": insert(row["text"], next(words), rng, len(row["text"]))} if i in chosen else row
          for i, row in enumerate(rows)]


def insertions(texts: Sequence[str], words: int, sentences: int, avoid: Sequence[str],
               seed: int) -> list[tuple[str, str]]:
  """[(kind, string to insert)]: `words` rare words of kind "word", then `sentences` strings of kind "sentence".

  A string of kind "sentence" is the first SENTENCE_WORDS words of a random text.
  """
  rng = streams.rng(seed, "insertions")
  rare = itertools.islice(rare_words(texts, avoid, rng), words)
  chosen = rng.permutation(len(texts))[:sentences]
  return [*(("word", w) for w in rare), *(("sentence", " ".join(texts[i].split()[:SENTENCE_WORDS])) for i in chosen)]
