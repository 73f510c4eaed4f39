"""What a defense is given, and what it may be: three functions, or a recipe for the shared trainer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.adapters import trees
from w2s_jax.data import tokenization
from w2s_jax.models import Model
from w2s_jax.training.train import Workplace


class Suspect(NamedTuple):
  """All that a defense may see: the attacked model and clean rows. No row with a trigger is among them.

  Of a recipe with `from_base` it is the public base that stands in the attacked model's place.

  Attributes:
    model, params, tokenizer: of the attacked model.
    train, dev: clean rows {"text", "label"}.
    teacher: (rows, keep=True) -> {"teacher_logits" [N, C], "teacher_features" [N, D]} of their texts; computed once for
      the same texts and kept in files, unless keep is False.
    avoid: strings that ASR is measured with: random insertions must not hit one.
    training: how long every defense may train and how fast: the section `defend` of the config.
    lora: the shape of every defense's adapters: the section `lora`.
    max_length: tokens at which texts are cut.
    place: devices, directory and shapes (training/train.py).
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

  def encode(self, rows: list) -> dict:
    return self.place.task.encode(self.tokenizer, rows, self.max_length)

  def logits(self, texts: list[str]) -> np.ndarray:
    """[N, C] float32 of the attacked model, in text order."""
    arrays = tokenization.encode(self.tokenizer, texts, self.max_length)
    return self.place.logits(self.model, self.params, arrays)


class Recipe(NamedTuple):
  """A defense that the shared trainer runs (distill.py): same adapters, batches, steps and rate as every other one.

  Attributes:
    terms: (ClassifierOutput, batch, settings, task) -> {term: scalar}; task.loss_terms gives those of the task itself.
    weights: (settings, feature width) -> {term: weight}, of the very terms; checked before anything trains.
    rows: (suspect, settings, seed) -> rows that stand for all epochs, each trained on once; the teacher reads them too.
      None: the suspect's `train` in every epoch.
    teacher_view: (teacher's outputs, labels [N], seed) -> what the student is shown of them; None: no teacher.
    augment: (suspect, settings, params, arrays, seed) -> (params, arrays) with `views` texts of each example.
    views: texts of one example.
    soft_tokens: settings -> number of soft tokens that `augment` puts beside the vocabulary; None: none.
    ascent: (suspect, settings) -> optimizer of the soft tokens.
    from_base: it is given the public base of the attacked model in the place of that model.
    trains: labels of the leaves that train; with "adapter" among them the student gets adapters.
    rate: times `defend.learning_rate`, at which it trains.
    layout: "packed", or "padded" where the terms read what is between the texts of a batch.
  """
  terms: Callable
  weights: Callable
  rows: Callable | None = None
  teacher_view: Callable | None = None
  augment: Callable | None = None
  views: int = 1
  soft_tokens: Callable | None = None
  ascent: Callable | None = None
  from_base: bool = False
  trains: tuple[str, ...] = trees.LORA
  rate: float = 1.0
  layout: str = "packed"


class Defense(NamedTuple):
  """One row of the table: at least one of the first four, or none of them, which leaves the attacked model as it is.

  Attributes:
    recipe: trained by distill.py.
    weights: (suspect, settings, {models/NAME: seed}) -> [parameters of each], by any other way.
    text: (suspect, settings, seed) -> (texts -> texts), before the model.
    accept: (suspect, settings, seed) -> (texts -> [N] bool), around the model: the others are rejected.
    settings: {section of config.defense: dataclass}, what the functions above get as `settings.SECTION`.
  """
  recipe: Recipe | None = None
  weights: Callable | None = None
  text: Callable | None = None
  accept: Callable | None = None
  settings: dict[str, type] = {}

  @property
  def has_teacher(self) -> bool:
    """Whether it learns from the teacher."""
    return bool(self.recipe and self.recipe.teacher_view)

  @property
  def changes_suspect(self) -> bool:
    """Whether it makes new weights out of the attacked model's."""
    return self.weights is not None or bool(self.recipe and not self.recipe.from_base)
