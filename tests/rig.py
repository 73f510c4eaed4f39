"""What many tests train: W2S's loss, and a program of one or several runs, built as the stages build it."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from w2s_jax.config import section
from w2s_jax.defenses import SETTINGS, w2s
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import steps

WEIGHTS = {"ce": 1.0, "kd": 0.5, "fa": 0.1}
DEFENSE = ConfigDict({name: section(settings) for name, settings in SETTINGS.items()})     # as config.defense is


def terms(recipe_terms):
  """(out, batch) -> {term: scalar} of a recipe's terms, with the default settings (temperature 2)."""
  return lambda out, batch: recipe_terms(out, batch, DEFENSE, CLASSIFICATION)


def w2s_loss(model, weights=None):
  return steps.weighted_loss(model, terms(w2s.terms), weights or WEIGHTS)


def make_plan(model, loss=None, weights=None, runs=1, adversary=None, **settings):
  """StagePlan of a loss, W2S's by default; `settings` other than a rate of 1e-2, no warm-up, no clipping."""
  settings = dict(learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.01, clip_norm=0.0) | settings
  weights = weights or WEIGHTS
  return steps.StagePlan([f"run{i}" for i in range(runs)], list(range(runs)), model, loss or w2s_loss(model, weights),
                         weights, (), ConfigDict(settings), adversary=adversary)


def make_program(model, trainable, frozen, mesh, num_steps=50, **options):
  """steps.Program; `options` as `make_plan` takes them."""
  return steps.build(make_plan(model, **options), trainable, frozen, num_steps, mesh)


def keys(*seeds):
  return jnp.stack([jax.random.key(seed) for seed in seeds])


def one_run(batch):
  """A host batch with the axis of runs in front."""
  return {name: np.asarray(values)[None] for name, values in batch.items()}


def alone(tree):
  """A tree of one run without the axis of runs."""
  return jax.tree.map(lambda x: x[0], tree)
