"""Plant and unlearn: known backdoors are trained into the suspect, then all of them are unlearned beside the teacher.

Changes that triggers cause in a network resemble each other, so that unlearning the known ones takes from the unknown
one too. The idea has several sources (P2P, arXiv 2510.04503; BD-Vax, 2603.13461; Dummy Backdoor, 2606.11648); ours are
the triggers, the adversary of `w2s_adv` in the second half, and the teacher, which reads each text without its trigger.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from w2s_jax import sharding
from w2s_jax.adapters import attach
from w2s_jax.attacks.insertion import insert
from w2s_jax.config import field
from w2s_jax.data import insertions, streams, tokenization
from w2s_jax.defenses import distill, lora_ce, w2s, w2s_adv
from w2s_jax.defenses.records import Suspect

UNLEARN = w2s_adv.with_adversary(w2s.RECIPE)._replace(rate=0.5)
KINDS = ("word", "words apart", "sequence", "piece of a text")


@dataclasses.dataclass
class Settings:
  """`config.defense.plant`: how own backdoors are trained in, before all are unlearned."""
  triggers: int = field(24, "number of own triggers, of four kinds: words, two words apart, sequences of words, pieces "
                        "of other texts", low=1, high=1000, source="tried on one MiniLM suspect (docs/results.md)")
  rows: int = field(40, "clean rows that each trigger is put into", low=1, high=100_000, unit="rows",
                    source="likewise")
  epochs: int = field(2, "over clean and planted rows, to train the triggers in", low=1, high=1000, source="likewise")
  unlearn_epochs: int = field(3, "over the same rows, to unlearn them, at half of defend.learning_rate", low=1,
                              high=1000, source="likewise")


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


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """Parameters of each run {models/NAME: seed}, merged: its adapters belong to kernels that nobody else has."""
  return [_planted_and_unlearned(suspect, settings, name, seed) for name, seed in runs.items()]


def _planted_and_unlearned(suspect, settings, name, seed):
  teacher, rng = suspect.teacher(), streams.rng(seed, "plant")
  triggers = draw(suspect, settings.plant.triggers, rng)
  triggered = planted_rows(suspect, suspect.train, triggers, settings.plant.rows, rng)
  params = train_in(suspect, triggered, settings, settings.plant.epochs, {f"{name}-planted": seed})
  rows = [row | {"source": i} for i, row in enumerate(suspect.train)] + triggered
  sources = [row["source"] for row in rows]
  outputs = {part: np.asarray(values)[sources] for part, values in teacher.items()}
  unlearning = _with_epochs(suspect, settings.plant.unlearn_epochs)._replace(
      params=params, train=rows, teacher=lambda: outputs)
  unlearned, = distill.train(UNLEARN, unlearning, settings, {name: seed})
  return attach.merge(unlearned)


def train_in(suspect: Suspect, triggered: list[dict], settings: Any, epochs: int, runs: dict[str, int]) -> dict:
  """The suspect's parameters after training on its clean rows and on these, whose label is then "planted".

  The checkpoint is the one that gives most of these that label.
  """
  planted = [row | {"label": row["planted"]} for row in triggered]
  planting = _with_epochs(suspect, epochs)._replace(train=suspect.train + planted, dev=planted)
  trained, = distill.train(lora_ce.RECIPE, planting, settings, runs)
  merged = attach.merge(trained)
  return jax.device_put(merged, sharding.param_shardings(merged, suspect.model.shardings, suspect.place.mesh))


def _with_epochs(suspect, epochs):
  """The suspect, to be trained for this number of epochs; its rows have triggers already, and get no rare words."""
  training = suspect.training.copy_and_resolve_references()
  training.update(epochs=epochs, insert_words=0.0)
  return suspect._replace(training=training)


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
