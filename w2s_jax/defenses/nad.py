"""Neural Attention Distillation (Li et al., arXiv 2101.05930): a fine-tuned copy of the suspect teaches the suspect.

The student learns the labels, and to match the teacher's attention maps. The attention map of a layer has one value per
position: the sum of squares of the layer's output over the width. A map is scaled to an L2 norm of 1.

Ours: a position is a token of a text instead of a place in an image. The maps of all layers have equal weight. The
teacher is the suspect after `lora_ce` with another seed, because with the run's seed it would equal the student of
`lora_ce`. Teacher and student each train as long as other recipes. N or B texts, L layers, R rows, T tokens, D width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from w2s_jax import losses, sharding
from w2s_jax.config import field
from w2s_jax.data import streams
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.defenses.records import Recipe, Suspect
from w2s_jax.models import ClassifierOutput, Model
from w2s_jax.tasks import Task
from w2s_jax.training import inference, steps
from w2s_jax.training.train import Workplace


@dataclasses.dataclass
class Settings:
  """Neural Attention Distillation: attention maps of a fine-tuned copy of the suspect."""
  weight: float = field(78.0, "weight of the squared distance between the maps; cross entropy has 1", low=0.0,
                        high=1e6, source="released code: 5000 / 64, as it averages over 64 positions; not tuned here")


def attention_maps(states: jax.Array, batch: dict, length: int) -> jax.Array:
  """[B, L, length] float32, each text's attention map in each layer; 0 after the text's last token.

  Args:
    states: [L, R, T, D], the output of every layer.
    batch: "texts" [G, B / G, 2] as in Model.apply; without it a row is a text, with padding on the right.
    length: at least the number of tokens of each text.
  """
  texts = batch.get("texts")
  if texts is None:
    last = (batch["segment_ids"] > 0).sum(axis=1) - 1
    texts = jnp.stack([jnp.zeros_like(last), last], axis=-1)[:, None]
  first, last = texts[..., :1], texts[..., 1:]
  places = first + jnp.arange(length)                                                   # [G, B / G, length]
  strengths = jnp.square(states.astype(jnp.float32)).sum(-1).reshape(len(states), len(texts), -1)
  found = jnp.take_along_axis(strengths, jnp.minimum(places, last).reshape(1, len(texts), -1), axis=2)
  maps = jnp.where(places <= last, found.reshape(len(states), *places.shape), 0).reshape(len(states), -1, length)
  return (maps / optax.safe_norm(maps, 1e-6, axis=-1, keepdims=True)).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _maps_of_batch(model, mesh, length, params, batch):
  with sharding.on(mesh):
    maps = attention_maps(forward(model, params, batch).states, batch, length)
  return jax.lax.with_sharding_constraint(maps, sharding.replicated(mesh))              # every process reads all


def maps_of(model: Model, params: dict, arrays: dict, place: Workplace) -> np.ndarray:
  """[N, L, T] float32 on the host, the attention maps of every text in `arrays`, whose "input_ids" are [N, T]."""
  N, T = arrays["input_ids"].shape
  out = np.zeros((N, model.config.num_layers, T), np.float32)
  for rows, batch in inference.packed_batches(model, arrays, place.mesh, **place.eval_shapes()):
    out[rows] = np.asarray(_maps_of_batch(model, place.mesh, T, params, batch))[:len(rows)]
  return out


def teacher_seed(seed: int) -> int:
  """The seed of the teacher of a run."""
  return int(streams.rng(seed, "nad teacher").integers(2**31))


def with_teachers(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[Suspect]:
  """One suspect per run. Its teacher is a copy of the suspect, fine-tuned on the clean rows."""
  seeds = {f"{name}-teacher": teacher_seed(seed) for name, seed in runs.items()}
  teachers = distill.train(lora_ce.RECIPE, suspect, settings, seeds)
  return [suspect._replace(teacher_model=lambda params=params: (suspect.model, params, suspect.tokenizer))
          for params in teachers]


def augment(suspect: Suspect, settings: Any, params: dict, arrays: dict, seed: int) -> tuple[dict, dict]:
  """Adds the teacher's maps of the student's texts, as "maps" [N, L, T]."""
  del settings, seed
  model, teacher, _ = suspect.teacher_model()
  return params, arrays | {"maps": maps_of(model, teacher, arrays, suspect.place)}


def forward(model: Model, params: dict, batch: dict, key: jax.Array | None = None,
            settings: Any = None) -> ClassifierOutput:
  """The model's output on the batch, with the output of every layer as `states`."""
  del settings
  return steps.forward(model, params, batch, key, states=True)


def terms(student: ClassifierOutput, batch: dict, settings: Any, task: Task) -> dict[str, jax.Array]:
  """The task's terms, and "maps": mean over texts and layers of the squared distance between the maps."""
  del settings
  B, L, T = batch["maps"].shape
  own = attention_maps(student.states, batch, T).reshape(B, -1)
  distance = losses.feature_alignment(own, batch["maps"].reshape(B, -1), batch["weight"])
  return task.loss_terms(student, batch) | {"maps": distance / L}


def fields(model: Model, tokens: int) -> dict[str, tuple[int, int]]:
  """The shape of one text's entry in the array that `augment` adds."""
  return {"maps": (model.config.num_layers, tokens)}


RECIPE = Recipe(terms, lambda settings, width: {"ce": 1.0, "maps": settings.nad.weight}, forward,
                prepare=with_teachers, augment=augment, fields=fields)
