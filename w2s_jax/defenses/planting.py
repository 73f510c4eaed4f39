"""Backdoors of our own, trained into a suspect through LoRA: triggers of four kinds, for each class in turn."""

from typing import Any, NamedTuple

import jax
import numpy as np

from w2s_jax import sharding
from w2s_jax.adapters import attach
from w2s_jax.attacks.insertion import insert
from w2s_jax.data import insertions, tokenization
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.defenses.records import Suspect

KINDS = ("word", "words apart", "sequence", "piece of a text")


class Trigger(NamedTuple):
  """A backdoor of our own.

  Attributes:
    kind: one of KINDS.
    parts: strings that are put into a text, each by itself.
    target: the class that rows of the others get.
  """
  kind: str
  parts: tuple[str, ...]
  target: int

  def put(self, text: str, rng: np.random.Generator, max_words: int) -> str:
    """The text with it, before its first `max_words` words end."""
    for part in self.parts:
      text = insert(text, part, rng, max_words)
    return text


def train_in(suspect: Suspect, triggered: list[dict], settings: Any, epochs: int, runs: dict[str, int]) -> dict:
  """The suspect's parameters after training on its clean rows and on these, whose label is then "planted".

  The checkpoint is the one that gives most of these that label.
  """
  planted = [row | {"label": row["planted"]} for row in triggered]
  training = suspect.training.copy_and_resolve_references()
  training.update(epochs=epochs, insert_words=0.0)
  planting = suspect._replace(train=suspect.train + planted, dev=planted, training=training)
  trained, = distill.train(lora_ce.RECIPE, planting, settings, runs)
  merged = attach.merge(trained)
  return jax.device_put(merged, sharding.param_shardings(merged, suspect.model.shardings, suspect.place.mesh))


def planted_rows(suspect: Suspect, rows: list[dict], triggers: list[Trigger], count: int,
                 rng: np.random.Generator) -> list[dict]:
  """`count` rows of other classes than its target for each trigger, with it in their text, where it is not cut off.

  Returns:
    Rows of "text", their true "label", the class "planted", and "source" and "trigger", places in the two lists.
  """
  out = []
  for number, trigger in enumerate(triggers):
    able = [i for i, row in enumerate(rows) if row["label"] != trigger.target]
    chosen = rng.permutation(able)[:count].tolist()
    if not chosen:                                          # all rows have its target class
      continue
    texts = [rows[i]["text"] for i in chosen]
    max_words = tokenization.words_kept(suspect.tokenizer, texts, " ".join(trigger.parts), suspect.max_length)
    out += [{"text": trigger.put(text, rng, words), "label": rows[i]["label"], "planted": trigger.target, "source": i,
             "trigger": number} for i, text, words in zip(chosen, texts, max_words)]
  return out


def draw(suspect: Suspect, count: int, rng: np.random.Generator) -> list[Trigger]:
  """Random triggers: the kinds take turns, and after each round of them the classes."""
  texts, classes = [row["text"] for row in suspect.train], sorted({row["label"] for row in suspect.train})
  rare = insertions.rare_words(texts, suspect.avoid, rng)
  words = insertions.vocabulary_words(suspect.tokenizer, suspect.avoid, rng)
  def parts(kind):
    if kind == "word":
      return (next(rare),)
    if kind == "words apart":
      return (next(words), next(words))
    if kind == "sequence":
      return (" ".join(next(words) for _ in range(rng.integers(4, 9))),)
    text = texts[rng.integers(len(texts))].split()
    start = rng.integers(max(1, len(text) - insertions.SENTENCE_WORDS + 1))
    return (" ".join(text[start:start + insertions.SENTENCE_WORDS]),)
  return [Trigger(KINDS[i % len(KINDS)], parts(KINDS[i % len(KINDS)]), classes[i // len(KINDS) % len(classes)])
          for i in range(count)]
