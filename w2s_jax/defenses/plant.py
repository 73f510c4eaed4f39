"""Plant and unlearn: known backdoors are trained into the suspect, then all of them are unlearned beside the teacher.

Changes that triggers cause in a network resemble each other, so that unlearning the known ones takes from the unknown
one too. The idea has several sources (P2P, arXiv 2510.04503; BD-Vax, 2603.13461; Dummy Backdoor, 2606.11648); ours are
the triggers, the adversary of `w2s_adv` in the second half, and the teacher, which reads each text without its trigger.
"""

import dataclasses
from typing import Any

import numpy as np

from w2s_jax.adapters import attach
from w2s_jax.attacks.insertion import insert
from w2s_jax.config import field
from w2s_jax.data import insertions, streams
from w2s_jax.defenses import distill, lora_ce, w2s, w2s_adv
from w2s_jax.defenses.records import Suspect

UNLEARN = w2s_adv.with_adversary(w2s.RECIPE)


@dataclasses.dataclass
class Settings:
  """`config.defense.plant`."""
  triggers: int = field(24, "number of own triggers: words, two words apart, sequences of words, pieces of other texts",
                        low=1, high=1000)
  rows: int = field(40, "clean rows that each trigger is put into", low=1, high=100_000, unit="rows")
  epochs: int = field(2, "over the clean rows and those with triggers, while these are trained in", low=1, high=1000)


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """Parameters, adapters in them, of each run {models/NAME: seed}."""
  return [_planted_and_unlearned(suspect, settings, name, seed) for name, seed in runs.items()]


def _planted_and_unlearned(suspect, settings, name, seed):
  teacher = suspect.teacher()
  clean = [row | {"source": i} for i, row in enumerate(suspect.train)]
  triggered = planted_rows(suspect, settings.plant, seed)
  training = suspect.training.copy_and_resolve_references()
  training.update(epochs=settings.plant.epochs, insert_words=0.0)
  planting = suspect._replace(train=clean + [row | {"label": row["planted"]} for row in triggered], training=training)
  planted, = distill.train(lora_ce.RECIPE, planting, settings, {f"{name}-planted": seed})
  sources = [row["source"] for row in clean + triggered]
  unlearning = suspect._replace(
      params=attach.merge(planted), train=clean + triggered,
      teacher=lambda: {part: np.asarray(values)[sources] for part, values in teacher.items()})
  unlearned, = distill.train(UNLEARN, unlearning, settings, {name: seed})
  return unlearned


def planted_rows(suspect: Suspect, settings: Settings, seed: int) -> list[dict]:
  """Clean rows with triggers in them: "text", their true "label", the class "planted", their row of `train` "source".

  Each trigger is planted for one class, into rows of the others; the classes take turns.
  """
  rng = streams.rng(seed, "plant")
  classes = sorted({row["label"] for row in suspect.train})
  out = []
  for number, parts in enumerate(triggers(suspect, settings.triggers, rng)):
    target = classes[number // 4 % len(classes)]              # four kinds: each kind for each class
    able = [i for i, row in enumerate(suspect.train) if row["label"] != target]
    for i in rng.permutation(able)[:settings.rows].tolist():
      text = suspect.train[i]["text"]
      for part in parts:
        text = insert(text, part, rng, len(text))
      out.append({"text": text, "label": suspect.train[i]["label"], "planted": target, "source": i})
  return out


def triggers(suspect: Suspect, count: int, rng: np.random.Generator) -> list[list[str]]:
  """Strings that are put in, each by itself: of kinds in turn."""
  texts = [row["text"] for row in suspect.train]
  rare = insertions.rare_words(texts, suspect.avoid, rng)
  words = insertions.vocabulary_words(suspect.tokenizer, suspect.avoid, rng)
  def draw(count):
    return [next(words) for _ in range(count)]
  def piece():
    chosen = texts[rng.integers(len(texts))].split()
    start = rng.integers(max(1, len(chosen) - insertions.SENTENCE_WORDS + 1))
    return " ".join(chosen[start:start + insertions.SENTENCE_WORDS])
  kinds = (lambda: [next(rare)], lambda: draw(2), lambda: [" ".join(draw(rng.integers(4, 9)))], lambda: [piece()])
  return [kinds[i % len(kinds)]() for i in range(count)]
