"""The records of a ranking of words, a suspect, a recipe and a defense."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.adapters import trees
from w2s_jax.data import tokenization
from w2s_jax.models import Model
from w2s_jax.training.train import Workplace

MOVED = 12               # most words to take from a ranking with `moved`; chosen on seeds 301 and 302 of MiniLM


class Ranking(NamedTuple):
  """Words and how suspicious each is for each class.

  Attributes:
    words: W words. Each is one token of the suspect; if `moved`, some are two tokens.
    scores: [W, C] float64, larger is more suspicious; the same for each class if `moved`.
    moved: True if the words are ranked by how far fine-tuning moved them (moved_words.py). False if they are ranked by
      how far they move the suspect (trigger_words.py).
  """
  words: list[str]
  scores: np.ndarray
  moved: bool = False

  def most_suspicious(self, count: int) -> list[str]:
    """The `word_count(count)` words with the highest scores of each class, sorted and without repetition."""
    first = np.argsort(-self.scores, axis=0)[:self.word_count(count)]
    return sorted({self.words[i] for i in first.ravel()})

  def word_count(self, count: int) -> int:
    """The number of words to take for each class if `count` are wanted; at most MOVED if `moved`."""
    return min(count, MOVED) if self.moved else count

  def to_json(self) -> str:
    return json.dumps({"words": self.words, "scores": self.scores.tolist(), "moved": self.moved})

  @classmethod
  def from_json(cls, text: str) -> "Ranking | None":
    """The ranking that `to_json` wrote; None if an older version wrote it, without `moved`."""
    kept = json.loads(text)
    return cls(kept["words"], np.array(kept["scores"]), kept["moved"]) if "moved" in kept else None


class Suspect(NamedTuple):
  """Everything that a defense may see: the attacked model and clean rows, none of which has a trigger.

  For a recipe with `from_base` a public model takes the place of the attacked model.

  Attributes:
    model, params, tokenizer: the attacked model.
    train, dev: clean rows {"text", "label"}.
    teacher: (rows, keep=True) -> {"teacher_logits" [N, C], "teacher_features" [N, D]} of the rows' texts; cached in
      files, unless keep is False.
    avoid: strings that ASR is measured with; no random word may be one of their words.
    training: section `defend` of the config: length and learning rate of every defense's training.
    lora: section `lora` of the config: shape of every defense's adapters.
    max_length: length to which texts are truncated, in tokens.
    place: devices, directory and shapes (training/train.py).
    ranking: the words that the search ranked for this model (moved_words.py); None: they are not ranked yet.
    teacher_model: () -> (model, params, tokenizer) of the teacher.
    reference: () -> (model, params, tokenizer) of models/reference, the public base fine-tuned on the clean rows for
      the search; None: the search has not made it.
    base: () -> (model, params, tokenizer) of the public model from which, as the user says, the suspect was fine-tuned.
      None: the user names none. If this run poisoned the student, a defense with `mixes_base` gets models/base.
  """
  model: Model
  params: dict
  tokenizer: Any
  train: list
  dev: list
  teacher: Callable[..., dict]
  avoid: tuple[str, ...]
  training: Any
  lora: Any
  max_length: int
  place: Workplace
  ranking: Ranking | None = None
  teacher_model: Callable[[], tuple[Model, dict, Any]] | None = None
  reference: Callable[[], tuple[Model, dict, Any]] | None = None
  base: Callable[[], tuple[Model, dict, Any]] | None = None

  def encode(self, rows: list) -> dict:
    return self.place.task.encode(self.tokenizer, rows, self.max_length)

  def logits(self, texts: list[str]) -> np.ndarray:
    """Logits [N, C] float32 of the attacked model, in text order."""
    arrays = tokenization.encode(self.tokenizer, texts, self.max_length)
    return self.place.logits(self.model, self.params, arrays)


class Recipe(NamedTuple):
  """A defense that distill.py trains. By default all recipes use the same adapters, batches, steps and rate.

  Attributes:
    terms: (output, batch, settings, task) -> {loss term: scalar}; task.loss_terms computes the task's own.
    weights: (settings, feature width) -> {loss term: weight}; the names are checked before anything trains.
    forward: (model, params, batch, key, settings) -> the output that `terms` gets, such as two ClassifierOutputs; None:
      one ClassifierOutput, the model's on the batch (steps.forward).
    rows: (suspect, settings, seed) -> the rows of all epochs. The student trains once on each row, and a teacher reads
      the same rows. None: the suspect's `train` in every epoch.
    teacher_view: (teacher's outputs, labels [N], seed) -> the outputs that the student learns from; None: no teacher.
    prepare: (suspect, settings, {models/NAME: seed}) -> [Suspect of each run], such as one with a teacher of its own;
      None: all runs get the suspect unchanged.
    augment: (suspect, settings, params, arrays, seed) -> (params, arrays) to start from, with `views` texts per
      example. Runs train together, so leaves that do not train must be the same for each seed.
    fields: (model, tokens per text) -> {name: shape per text} of the float32 arrays that `augment` adds; None: it adds
      none.
    views: texts per example.
    soft_tokens: settings -> number of soft tokens that `augment` adds beside the vocabulary; None: no soft tokens.
    adversary: (suspect, settings) -> optimizer of the soft tokens.
    from_base: whether the student is a public model (Run.base_path) instead of the attacked model.
    trains: labels of the leaves that train; if "adapter" is one of them, the student gets adapters.
    rate: multiple of `defend.learning_rate` at which the student trains.
    layout: "packed"; or "padded", with one text per row, if the terms read the padding.
  """
  terms: Callable
  weights: Callable
  forward: Callable | None = None
  rows: Callable | None = None
  teacher_view: Callable | None = None
  prepare: Callable | None = None
  augment: Callable | None = None
  fields: Callable | None = None
  views: int = 1
  soft_tokens: Callable | None = None
  adversary: Callable | None = None
  from_base: bool = False
  trains: tuple[str, ...] = trees.LORA
  rate: float = 1.0
  layout: str = "packed"


class Defense(NamedTuple):
  """One row of the table. Without any of the first four attributes it is the unchanged attacked model.

  A defense has at most one of `recipe` and `weights`. It may have `text` and `accept`, too.

  Attributes:
    recipe: recipe that distill.py trains.
    weights: (suspect, settings, {models/NAME: seed}) -> [parameters of each], made without a recipe.
    text: (suspect, settings, seed) -> (texts -> texts), a filter of the texts that the model reads. If the defense
      makes new weights, `suspect` has these.
    accept: (suspect, settings, seed) -> (texts -> [N] bool), whether the model's answer to each text is accepted.
    settings: {section of config.defense: dataclass}; the functions above get a section as `settings.SECTION`.
    mixes_base: whether it reads `Suspect.base`, which must then have the suspect's shapes and vocabulary (base.py).
    check: (settings, texts); raises InputError if the defense cannot handle one of the texts. It gets the clean test
      texts before anything trains, and all texts before anything is measured. None: the defense handles every text.
  """
  recipe: Recipe | None = None
  weights: Callable | None = None
  text: Callable | None = None
  accept: Callable | None = None
  settings: dict[str, type] = {}
  mixes_base: bool = False
  check: Callable | None = None

  @property
  def has_teacher(self) -> bool:
    """Whether it learns from the teacher."""
    return bool(self.recipe and self.recipe.teacher_view)

  @property
  def changes_suspect(self) -> bool:
    """Whether it makes new weights from those of the attacked model."""
    return self.weights is not None or bool(self.recipe and not self.recipe.from_base)
