"""Plants known backdoors in a suspect by training adapters. Triggers of four kinds take turns; so do the targets."""

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
  """The trigger of a planted backdoor.

  Attributes:
    kind: one of KINDS.
    parts: strings to insert into a text, each at its own place.
    target: the class that the backdoor gives to rows of other classes.
  """
  kind: str
  parts: tuple[str, ...]
  target: int

  def put(self, text: str, rng: np.random.Generator, max_words: int) -> str:
    """Inserts the trigger's parts, each after one of the first `max_words` words of the text."""
    for part in self.parts:
      text = insert(text, part, rng, max_words)
    return text


def train_in(suspect: Suspect, triggered: list[dict], settings: Any, epochs: int, runs: dict[str, int]) -> dict:
  """The suspect's parameters after training on its clean rows and on the `triggered` rows with "planted" as label.

  It chooses the checkpoint with the highest accuracy on the triggered rows, and merges its adapters.

  Args:
    triggered: rows from `planted_rows`.
    epochs: number of passes over the clean and the triggered rows.
    runs: {models/NAME: seed} of a single run.
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
  """For each trigger at most `count` rows of other classes than its target, with the trigger where truncation keeps it.

  Returns:
    Rows of "text", the true "label", the target as "planted", and "source" and "trigger", indices into `rows` and
    `triggers`.
  """
  out = []
  for number, trigger in enumerate(triggers):
    able = [i for i, row in enumerate(rows) if row["label"] != trigger.target]
    chosen = rng.permutation(able)[:count].tolist()
    if not chosen:                                          # all rows have the trigger's target class
      continue
    texts = [rows[i]["text"] for i in chosen]
    max_words = tokenization.words_kept(suspect.tokenizer, texts, " ".join(trigger.parts), suspect.max_length)
    out += [{"text": trigger.put(text, rng, words), "label": rows[i]["label"], "planted": trigger.target, "source": i,
             "trigger": number} for i, text, words in zip(chosen, texts, max_words)]
  return out


def draw(suspect: Suspect, count: int, rng: np.random.Generator) -> list[Trigger]:
  """`count` random triggers. The kinds take turns. After each round of all kinds, the next class is the target."""
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
