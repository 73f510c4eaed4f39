"""A config's real steps on a mesh, of shapes alone: nothing is allocated, whatever the model's size.

B rows, T tokens, C classes, D feature width.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import lora, quantized, sharding
from w2s_jax.adapters import trees
from w2s_jax.defenses import w2s
from w2s_jax.models import Model, config_from_hf, read_json, resolve
from w2s_jax.models.hf.load import FLOAT32
from w2s_jax.training import inference, optim, steps

STEPS = ("defend", "poison", "evaluate")


def student(config, **runtime):
  """The config's student: of the directory `student.path`; where that is none, or a hub id, of `student.arch`."""
  c = config
  if "arch" in c.student and not Path(c.student.path).expanduser().is_dir() or not c.student.path:
    hf = c.student.arch.to_dict()
  else:
    hf = read_json(resolve(c.student.path) / "config.json")
  labels = {"num_labels": c.data.num_labels} if c.data.num_labels else {}
  return Model(config_from_hf(hf | labels, **{"dtype": c.student.dtype, "remat": c.student.remat,
                                              "lora_dropout": c.lora.dropout} | runtime))


def params_of(config, model):
  """The student's parameters as they are loaded: kernels and embeddings in `student.dtype`, norms and heads float32."""
  def loaded(path, leaf):
    wide = re.fullmatch(FLOAT32, "/".join(path))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if wide else config.student.dtype)
  return traverse_util.path_aware_map(loaded, model.abstract_params())


def adapted(config, params):
  """With adapters, over a quantized base where the config wants one."""
  if config.lora.quantize:
    quantized.check(config.lora.quantize)
  def make(params):
    if config.lora.quantize:
      params = quantized.quantize_layers(params, config.lora.quantize)
    return lora.add_lora(params, config.lora.rank, config.lora.alpha, tuple(config.lora.targets),
                         key=jax.random.key(0))
  return jax.eval_shape(make, params)


def batch(model, B, T, distillation):
  """Rows of one text each, as steps.py takes them."""
  c = model.config
  shapes = {"input_ids": ((T,), "int32"), "attention_mask": ((T,), "int32"), "label": ((), "int32"),
            "weight": ((), "float32")}
  if distillation:
    shapes |= {"teacher_logits": ((c.num_labels,), "float32"), "teacher_features": ((c.feature_size,), "float32")}
  return {name: jax.ShapeDtypeStruct((B, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def train_step(model, params, labels, terms, weights, learning_rate, mesh):
  """(step, its state, frozen leaves) of a stage that trains the leaves of these labels."""
  family = model.config.family
  trainable, frozen = trees.split(params, labels)
  trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
  tx = optim.make_optimizer(trainable, learning_rate, 1000)
  step = steps.make_train_step(steps.classification_loss(model, terms, weights), tx,
                               steps.state_shardings(trainable, tx, family, mesh),
                               sharding.param_shardings(frozen, family, mesh), mesh)
  state = jax.eval_shape(lambda p: steps.TrainState(jnp.zeros((), jnp.int32), p, tx.init(p)), trainable)
  return step, state, frozen


def defend_step(config, model, mesh):
  """As `train_step`, of the distillation of adapters and head."""
  terms = functools.partial(w2s.terms, temperature=config.defend.temperature)
  weights = w2s.loss_weights(config.defend.weights, model.config.feature_size)
  return train_step(model, adapted(config, params_of(config, model)), trees.LORA, terms, weights,
                    config.defend.learning_rate, mesh)


def lower(name, config, mesh, B, T, model=None):
  """The lowered step `name`, one of STEPS, of B rows of T tokens.

  Raises:
    InputError: a mesh axis does not divide a leaf, or the mesh the batch.
  """
  model = model or student(config)
  sharding.check_batch(B, mesh, "--batch")
  key = jax.eval_shape(lambda: jax.random.key(0))
  if name == "evaluate":
    params = params_of(config, model)
    places = sharding.param_shardings(params, model.config.family, mesh)
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)
    rows = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding.batch_sharding(mesh))
            for k, v in batch(model, B, T, False).items() if k in ("input_ids", "attention_mask")}
    return inference.forward.lower(model, mesh, params, **rows, texts=None)
  if name == "poison":
    step, state, frozen = train_step(model, params_of(config, model), tuple(config.poison.trains),
                                     steps.cross_entropy_terms, {"ce": 1.0}, config.poison.learning_rate, mesh)
  else:
    step, state, frozen = defend_step(config, model, mesh)
  return step.lower(state, frozen, batch(model, B, T, name == "defend"), key)
