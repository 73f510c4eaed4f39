"""One stage of training: splits parameters by label, feeds batches of few shapes, trains, keeps the best leaves."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax import sharding
from w2s_jax.adapters import trees
from w2s_jax.data import batches, packing
from w2s_jax.models import Model
from w2s_jax.tasks import Task
from w2s_jax.training import steps, train

LOG = logging.getLogger(__name__)


def train_stage(plan: steps.StagePlan, starts: list[dict], arrays: list[dict], dev: dict | None,
                place: train.Workplace) -> list[dict]:
  """Trains every run of a plan and returns each run's parameters at its best step by dev accuracy.

  Args:
    plan: what to train, and how.
    starts: initial parameters of each run. The leaves that do not train must be equal in all runs.
    arrays: training arrays of each run, in the format of data/batches.py.
    dev: arrays of the dev rows whose accuracy chooses the checkpoint; None keeps the last step.
    place: see train.Workplace.
  """
  num_examples = len(arrays[0]["length"]) // plan.views
  total = total_steps(plan.settings, num_examples)
  parts = [trees.split(params, plan.trains) for params in starts]
  trainable = [jax.tree.map(lambda x: x.astype("float32"), t) for t, _ in parts]  # bf16 would round most updates away
  frozen = parts[0][1]
  program = steps.build(plan, trainable[0], frozen, total, place.mesh)
  def dev_accuracy(trained):
    runs = [jax.tree.map(lambda x, i=i: x[i], trained) for i in range(len(plan.seeds))]
    return [place.task.is_correct(place.answers(plan.model, trees.combine(run, frozen), dev), dev).mean()
            for run in runs]
  place = place._replace(
      term_norms_every=place.term_norms_every if len(plan.weights) > 1 else 0,     # a single term's norm is grad_norm
      steps_per_dispatch=place.steps_per_dispatch if plan.packed else 1)
  fitted = train.fit(plan.names, program, program.init(trainable), frozen, _feed(plan, parts[0], arrays, total, place),
                     max(1, total // plan.settings.evaluations), place, dev_accuracy if dev else None)
  for name, (_, chosen) in zip(plan.names, fitted):
    LOG.info(f"{name}: {total} steps in {chosen.seconds:.0f} s, " + (
        f"dev accuracy {chosen.dev_accuracy:.4f} at step {chosen.step}" if dev else "last step kept"))
  return [trees.combine(trained, frozen) for trained, _ in fitted]


def task_plan(task: Task, name: str, seed: int, model: Model, trains: Sequence[str], settings: Any,
              stream: str = "") -> steps.StagePlan:
  """The plan of one run on the task's own loss, without a teacher; `stream` defaults to `name`."""
  weights = dict.fromkeys(task.terms, 1.0)
  loss = steps.weighted_loss(model, task.loss_terms, weights)
  return steps.StagePlan((name,), (seed,), model, loss, weights, trains, settings, stream or name)


def total_steps(settings: Any, num_examples: int) -> int:
  """Number of steps of a stage over `num_examples` examples."""
  total = settings.epochs * batches.steps_per_epoch(num_examples, settings.batch_size)
  return min(total, settings.max_steps) if settings.max_steps else total


def _feed(plan, parts, arrays, total, place):
  """The stage's batches. Runs that train together, and steps of one dispatch, share a batch shape."""
  shards, pad = sharding.batch_shards(place.mesh), plan.model.config.pad_token_id or 0
  num_examples, size = len(arrays[0]["length"]) // plan.views, plan.settings.batch_size
  if plan.packed and place.pack:
    makers = packing.packers(zip(arrays, plan.seeds), size, place.buckets, shards, total, _flops_per_token(*parts), pad,
                              place.steps_per_dispatch, plan.views)
  else:
    makers = [functools.partial(batches.make_batch, own, batch_size=size * plan.views, buckets=place.buckets)
              for own in arrays]
  stack = functools.partial(packing.stack, groups=shards, pad_token_id=pad)
  def stream(make, seed, step):
    return batches.train_batches(num_examples, size,
                                 lambda rows: make(batches.texts_of(rows, num_examples, plan.views)), seed, step)
  def batches_from(step):
    return map(stack, zip(*(stream(make, seed, step) for make, seed in zip(makers, plan.seeds))))
  keys = jnp.stack([stream_key(seed, plan.stream) for seed in plan.seeds])
  return train.Feed(total, batches_from, stack, keys)


def _flops_per_token(trainable, frozen):
  """FLOPs of a step per token. Per parameter of the layers: 2 forward, 2 backward, and 2 more if it is trainable."""
  trainable_size, frozen_size = (sum(leaf.size for leaf in jax.tree.leaves(part.get("layers", {})))
                                 for part in (trainable, frozen))
  return 6 * trainable_size + 4 * frozen_size


def stream_key(seed: int, name: str) -> jax.Array:
  """The key of a named random stream. It does not depend on the defense, so all defenses start from equal adapters."""
  return jax.random.fold_in(jax.random.key(seed), int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
