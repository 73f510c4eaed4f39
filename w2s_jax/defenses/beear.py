"""BEEAR (Zeng et al., EMNLP 2024, arXiv 2406.17092): learns the labels against one perturbation shared by all texts.

The paper's premise is that a trigger moves the hidden states of all texts in about the same direction. The inner level
of each step searches for a shared perturbation of one layer's output that causes the unwanted behavior. The outer
level trains the student to answer as wanted with this perturbation, and to stay right on the clean texts.

Ours: the student is a classifier. The unwanted behavior is any wrong label. So the perturbation increases the cross
entropy of the true labels, and has no target class. It is one vector, added to every real token. The paper perturbs a
few tokens, each by a vector of its own. Ours starts at zero in each step and takes gradient steps of a fixed length,
where the paper uses Adam. R rows, T tokens, D width.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax import InputError, losses
from w2s_jax.config import field
from w2s_jax.defenses.records import Recipe
from w2s_jax.models import ClassifierOutput, Model
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import Task
from w2s_jax.training import steps


@dataclasses.dataclass
class Settings:
  """BEEAR: the hidden states are perturbed by one vector for all texts, and the labels are learned against it."""
  depth: float = field(0.28, "layers up to the perturbation, as a fraction of all layers, rounded up", low=0.01,
                       high=0.99, source="the paper: layer 9 of 32")
  ascents: int = field(3, "number of gradient steps that find the perturbation, in each training step", low=1,
                       source="ours; not tuned")
  size: float = field(0.5, "total length of these gradient steps, which bounds the perturbation's norm", low=0.0,
                      high=100.0, unit="mean norms of a hidden state", source="ours; not tuned")
  weight: float = field(0.5, "weight of the cross entropy with the perturbation; that of the clean texts is 1 - weight",
                        low=0.0, high=1.0, source="ours; not tuned")


def perturbed(model: Latent, params: dict, batch: dict, key: jax.Array | None, stream: jax.Array,
              delta: jax.Array) -> ClassifierOutput:
  """The output of the layers that read `stream` [R, T, D], with `delta` [D] added to every real token."""
  added = jnp.where((batch["segment_ids"] > 0)[..., None], delta, 0).astype(stream.dtype)
  return steps.forward(model, params, batch, key, stream=stream + added)


def perturbation(model: Latent, params: dict, batch: dict, key: jax.Array | None, stream: jax.Array,
                 settings: Any) -> jax.Array:
  """[D] float32, a vector that increases the batch's cross entropy if it is added to every real token of `stream`."""
  norms = jnp.linalg.norm(stream.astype(jnp.float32), axis=-1)
  length = settings.beear.size / settings.beear.ascents * jnp.average(norms, weights=steps.counted_tokens(batch))
  def cross_entropy(delta):
    logits = perturbed(model, params, batch, key, stream, delta).logits
    return losses.cross_entropy(logits, batch["label"], batch["weight"])
  def ascend(_, delta):
    uphill = jax.grad(cross_entropy)(delta)
    return delta + length * uphill / jnp.maximum(jnp.linalg.norm(uphill), 1e-30)       # the gradient may be zero
  return jax.lax.fori_loop(0, settings.beear.ascents, ascend, jnp.zeros(stream.shape[-1]))


def forward(model: Model, params: dict, batch: dict, key: jax.Array | None,
            settings: Any) -> tuple[ClassifierOutput, ClassifierOutput]:
  """The output on the batch, without and with the perturbation.

  Raises:
    InputError: no layer reads the perturbation.
  """
  num_layers = model.config.num_layers
  below = math.ceil(settings.beear.depth * num_layers)
  if below == num_layers:
    raise InputError(f"defense 'beear' perturbs the output of layer {below} of the student's {num_layers}, wanted one "
                     "before the last: lower --config.defense.beear.depth, or choose other defenses "
                     "(--config.defenses)")
  clean = steps.forward(model, params, batch, key, states=True)
  above, stream = Latent(model, below), clean.states[below - 1]
  fixed = jax.lax.stop_gradient((params, stream))
  delta = perturbation(above, fixed[0], batch, key, fixed[1], settings)
  return clean, perturbed(above, params, batch, key, stream, delta)


def terms(student: tuple[ClassifierOutput, ClassifierOutput], batch: dict, settings: Any,
          task: Task) -> dict[str, jax.Array]:
  """The task's terms on the clean texts, and as `perturbed_TERM` with the perturbation."""
  del settings
  clean, moved = (task.loss_terms(out, batch) for out in student)
  return clean | {f"perturbed_{name}": value for name, value in moved.items()}


def weights(settings: Any, width: int) -> dict[str, float]:
  del width
  return {"ce": 1 - settings.beear.weight, "perturbed_ce": settings.beear.weight}


RECIPE = Recipe(terms, weights, forward)
