"""CROW (Min et al., arXiv 2411.12768): keeps the hidden states of adjacent layers alike, even on perturbed texts.

The paper's premise is that a trigger makes the hidden states of adjacent layers differ. Each training step perturbs
what the first layer reads by one signed gradient step (FGSM, Goodfellow et al., arXiv 1412.6572) that increases this
difference. The student learns the labels of the clean texts, and to keep the difference small on the perturbed texts.

Ours: padding does not count. The student is a classifier and trains like every other recipe. In a Llama the first layer
reads the word embeddings. In an encoder it reads the output of the embeddings. L layers, R rows, T tokens, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from w2s_jax import InputError
from w2s_jax.config import field
from w2s_jax.defenses.records import Recipe
from w2s_jax.models import ClassifierOutput, Model
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import Task
from w2s_jax.training import steps


@dataclasses.dataclass
class Settings:
  """CROW: the hidden states of adjacent layers are kept alike."""
  alpha: float = field(5.5, "weight of the inconsistency; cross entropy has 1", low=0.0, high=1e6,
                       source="released code, for generation; not tuned here")
  epsilon: float = field(0.1, "size of the perturbation of each coordinate that the first layer reads", low=0.0,
                         high=100.0, source="released code, for generation; not tuned here")


def inconsistency(states: jax.Array, counted: jax.Array) -> jax.Array:
  """Mean cosine distance between the states of adjacent layers at the counted tokens, without the last layer's output.

  Args:
    states: [L, R, T, D], the output of every layer.
    counted: [R, T], 1 on the tokens that count, 0 on the others.
  Returns:
    Scalar float32.
  """
  states = states.astype(jnp.float32)
  distances = optax.losses.cosine_distance(states[:-2], states[1:-1], epsilon=1e-8).mean(0)
  return (distances * counted).sum() / counted.sum()


def forward(model: Model, params: dict, batch: dict, key: jax.Array | None, settings: Any) -> ClassifierOutput:
  """The output on the batch, with the layers' outputs on the perturbed batch as `states`.

  Raises:
    InputError: the model has fewer than 3 layers.
  """
  if model.config.num_layers < 3:
    raise InputError(f"defense 'crow' compares adjacent layers before the last one: the student has "
                     f"{model.config.num_layers} layers, wanted at least 3: choose other defenses (--config.defenses)")
  def states(params, stream):
    return steps.forward(model, params, batch, key, stream=stream, states=True).states
  fixed = jax.lax.stop_gradient(params)
  stream = Latent(model, 0).stream(fixed, batch["input_ids"], segment_ids=batch["segment_ids"],
                                   texts=batch.get("texts"), dropout_key=key)
  uphill = jax.grad(lambda stream: inconsistency(states(fixed, stream), steps.counted_tokens(batch)))(stream)
  perturbed = stream + (settings.crow.epsilon * jnp.sign(uphill)).astype(stream.dtype)
  return steps.forward(model, params, batch, key).replace(states=states(params, perturbed))


def terms(student: ClassifierOutput, batch: dict, settings: Any, task: Task) -> dict[str, jax.Array]:
  del settings
  own = {"inconsistency": inconsistency(student.states, steps.counted_tokens(batch))}
  return task.loss_terms(student, batch) | own


RECIPE = Recipe(terms, lambda settings, width: {"ce": 1.0, "inconsistency": settings.crow.alpha}, forward)
