"""The trainer of every recipe. It trains the leaves that `Recipe.trains` names; by default adapters and head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from w2s_jax import InputError, sharding
from w2s_jax.adapters import attach, trees
from w2s_jax.data import insertions
from w2s_jax.defenses.records import Defense, Recipe, Suspect
from w2s_jax.models import Model
from w2s_jax.tasks import Task
from w2s_jax.training import stage, steps


def train(recipe: Recipe, suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The trained parameters, with their adapters, of each run {models/NAME: seed}.

  Dev accuracy chooses each run's checkpoint; without dev rows the last step is kept.

  Several runs train as one program over one frozen base. A recipe whose loss reads the padding must have a single run,
  because stacking pads each batch to the longest text of all runs.

  Raises:
    InputError: see `check`. The stages check the recipe before anything trains.
  """
  check(next(iter(runs)), recipe, suspect.place.task, suspect.model, settings, suspect.lora)
  suspects = recipe.prepare(suspect, settings, runs) if recipe.prepare else [suspect] * len(runs)
  initial, arrays = zip(*(_start(recipe, own, settings, seed) for own, seed in zip(suspects, runs.values())))
  adversary = recipe.adversary(suspect, settings) if recipe.adversary else None
  plan = stage_plan(recipe, suspect.place.task, suspect.model, settings, suspect.training, runs, adversary)
  dev = suspect.encode(suspect.dev) if suspect.dev else None
  trained = stage.train_stage(plan, list(initial), list(arrays), dev, suspect.place)
  if recipe.adversary:
    trained = [trees.split(params, ("soft",))[1] for params in trained]
  if "matrix" in recipe.trains:
    trained = [_in_dtypes_of(start, params) for start, params in zip(initial, trained)]
  return trained


def _in_dtypes_of(start, params):
  """Casts `params` to the dtypes of `start`, because full fine-tuning trains in float32 at any dtype of the model."""
  return jax.tree.map(lambda before, after: after.astype(before.dtype), start, params)


def cleaned(defense: Defense, suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The parameters of each run {models/NAME: seed} of a defense that makes new weights."""
  return train(defense.recipe, suspect, settings, runs) if defense.recipe else defense.weights(suspect, settings, runs)


def stage_plan(recipe: Recipe, task: Task, model: Model, settings: Any, training: Any, runs: dict[str, int],
               adversary: optax.GradientTransformation | None = None) -> steps.StagePlan:
  """The plan of a recipe's training stage, for training and for `w2s_jax.plan`."""
  weights = recipe.weights(settings, model.config.feature_size)
  terms = functools.partial(recipe.terms, settings=settings, task=task)
  loss = steps.weighted_loss(model, terms, weights, _forward(recipe, settings))
  soft = ("soft",) if recipe.soft_tokens else ()
  training = training.copy_and_resolve_references()
  training.learning_rate *= recipe.rate
  if recipe.rows:
    training.epochs = 1                                # the recipe's rows are those of all epochs
  return steps.StagePlan(tuple(runs), tuple(runs.values()), model, loss, weights, (*recipe.trains, *soft), training,
                         "defend", recipe.views, recipe.layout == "packed", adversary)


def _forward(recipe, settings):
  return functools.partial(recipe.forward, settings=settings) if recipe.forward else steps.forward


def _start(recipe, suspect, settings, seed):
  """(parameters, training arrays) of one run."""
  params = suspect.params
  if "adapter" in recipe.trains:
    places = functools.partial(sharding.param_shardings, rules=suspect.model.shardings, mesh=suspect.place.mesh)
    params = attach.add_configured(params, suspect.lora, key=stage.stream_key(seed, "lora"), places=places)
  rows = recipe.rows(suspect, settings, seed) if recipe.rows else suspect.train
  arrays = suspect.encode(insertions.with_rare_words(rows, suspect.training.insert_words, suspect.avoid, seed))
  if recipe.teacher_view:
    arrays |= recipe.teacher_view(suspect.teacher(rows), arrays.get("label"), seed)
  return recipe.augment(suspect, settings, params, arrays, seed) if recipe.augment else (params, arrays)


def check(name: str, recipe: Recipe, task: Task, model: Model, settings: Any, lora: Any = None) -> None:
  """Raises InputError unless loss terms and weights have the same names and each term is a scalar float32.

  It allocates nothing.

  lora: section `lora` of the config, for the student's adapters; None: without them.
  """
  weights = recipe.weights(settings, model.config.feature_size)
  batch = steps.abstract_batch(model, task, 2, 4, recipe.teacher_view is not None, bool(recipe.soft_tokens),
                               fields=recipe.fields)
  def terms(params, batch):
    if lora and "adapter" in recipe.trains:
      params = attach.add_configured(params, lora, key=jax.random.key(0))
    out = _forward(recipe, settings)(model, params, batch, None)
    return recipe.terms(out, batch, settings=settings, task=task)
  shapes = jax.eval_shape(terms, model.abstract_params(), batch)
  if set(shapes) != set(weights):
    raise InputError(f"defense {name!r} has loss terms {', '.join(sorted(shapes))} and weights of "
                     f"{', '.join(sorted(weights))}: give each term one weight (defenses/{name}.py)")
  if odd := [term for term, value in shapes.items() if value.shape or value.dtype != jnp.float32]:
    raise InputError(f"defense {name!r}: the loss term {odd[0]} is {shapes[odd[0]].dtype}{list(shapes[odd[0]].shape)}, "
                     f"wanted a scalar float32 (defenses/{name}.py)")
