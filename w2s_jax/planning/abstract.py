"""Lowers a config's real steps on a mesh from shapes alone. No array is allocated, however large the model is.

B rows, T tokens, C classes, D feature width.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import InputError, lora, quantized, sharding
from w2s_jax.adapters import attach, soft, trees
from w2s_jax.defenses import DEFENSES, distill
from w2s_jax.models import Model, config_from_arch, config_from_hf, read_json, resolve
from w2s_jax.models.hf.load import FLOAT32
from w2s_jax.tasks import TASKS, Task
from w2s_jax.training import inference, optim, stage, steps

STEPS = 1000             # number of steps of the planned stage; it only changes the schedule's constants


def student(config: Any, **runtime: Any) -> Model:
  """The config's student, without parameters.

  Its shape comes from `student.arch` if there is one and `student.path` is not local, else from the path's config.json.

  runtime: further fields of the model's config; they override dtype, remat and lora_dropout.
  """
  c = config
  if "arch" in c.student and not os.path.exists(os.path.expanduser(c.student.path)) or not c.student.path:
    hf, make = c.student.arch.to_dict(), functools.partial(config_from_arch, knob="--config.student.arch")
  else:
    hf, make = read_json(resolve(c.student.path, c.student.base) / "config.json"), config_from_hf
  labels = {"num_labels": c.data.num_labels} if c.data.num_labels else {}
  return Model(make(hf | labels, **{"dtype": c.student.dtype, "remat": c.student.remat,
                                    "lora_dropout": c.lora.dropout} | runtime))


def params_of(config: Any, model: Model) -> dict:
  """The student's abstract parameters: kernels and embeddings in `student.dtype`, norms and heads in float32."""
  def loaded(path, leaf):
    wide = re.fullmatch(FLOAT32, "/".join(path))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if wide else config.student.dtype)
  return traverse_util.path_aware_map(loaded, model.abstract_params())


def adapted(config: Any, params: dict) -> dict:
  """Abstract params with the config's adapters, and with a quantized base if the config asks for one."""
  if config.lora.quantize:
    quantized.check(config.lora.quantize)
  def make(params):
    if config.lora.quantize:
      params = quantized.quantize_layers(params, config.lora.quantize)
    return attach.add_configured(params, config.lora, key=jax.random.key(0))
  return jax.eval_shape(make, params)


def costliest(config: Any) -> str:
  """The configured defense with the costliest step.

  Defenses that train all parameters cost most. Ties are broken by the number of views of a text, then by whether the
  defense has a forward pass of its own, then by whether it has a teacher.

  Raises:
    InputError: no configured defense trains.
  """
  names = [name for name in config.defenses if DEFENSES[name].recipe]
  if not names:
    raise InputError(f"defenses {tuple(config.defenses)}: none of them trains: set --config.defenses, or leave defend "
                     "out of --step")
  def cost(name):
    recipe = DEFENSES[name].recipe
    return "matrix" in recipe.trains, recipe.views, recipe.forward is not None, recipe.teacher_view is not None
  return max(names, key=cost)


def defense_plan(name: str, config: Any, model: Model) -> tuple[steps.StagePlan, dict]:
  """(plan of a defense's training stage, abstract parameters); InputError if the defense has no recipe."""
  recipe = DEFENSES[name].recipe
  if recipe is None:
    raise InputError(f"defense {name!r} has no training step to plan: set --step or --config.defenses")
  params, adversary = params_of(config, model), None
  if "adapter" in recipe.trains:
    params = adapted(config, params)
  if recipe.soft_tokens:
    width = traverse_util.flatten_dict(params)[(*model.vocabulary, "embedding")].shape[-1]
    rows = jax.ShapeDtypeStruct((recipe.soft_tokens(config.defense), width), jnp.float32)
    params = soft.put(model, params, rows)
    adversary = optim.ascent(1.0, 1.0)                 # any numbers: they are part of the state, not of the program
  task, runs = TASKS[config.task], {name: config.seed}
  return distill.stage_plan(recipe, task, model, config.defense, config.defend, runs, adversary), params


def poison_plan(config: Any, model: Model) -> tuple[steps.StagePlan, dict]:
  """(plan of the stage that fine-tunes on the attack's rows, abstract parameters)."""
  params, trains, rank = params_of(config, model), tuple(config.poison.trains), config.poison.lora
  if rank:
    trains = trees.LORA
    params = jax.eval_shape(lambda p: lora.add_lora(p, rank, rank, ("all-linear",), key=jax.random.key(0)), params)
  return stage.task_plan(TASKS[config.task], "poison", config.seed, model, trains, config.poison), params


def lower(name: str, config: Any, mesh: jax.sharding.Mesh, B: int, T: int,
          model: Model | None = None) -> jax.stages.Lowered:
  """Lowers one step.

  Args:
    name: "evaluate", "poison", "defend" (the costliest configured defense) or the name of a defense.
    B: examples per step; a defense with several views of a text has B rows of each view.
    T: tokens per row.
    model: the student, if the caller has it; None: see `student`.
  Raises:
    InputError: a mesh axis does not divide a leaf, or the mesh does not divide the batch.
  """
  model = model or student(config)
  sharding.check_batch(B, mesh, "--batch")
  if name == "evaluate":
    return _lower_evaluation(config, mesh, B, T, model)
  task = TASKS[config.task]
  if name == "poison":
    plan, params, teacher, fields = *poison_plan(config, model), False, None
  else:
    defense = costliest(config) if name == "defend" else name
    plan, params = defense_plan(defense, config, model)
    teacher, fields = DEFENSES[defense].recipe.teacher_view is not None, DEFENSES[defense].recipe.fields
  step, state, frozen = training_step(plan, params, mesh)
  batch = training_batch(plan, task, B, T, teacher, sharding.batch_shards(mesh) if config.data.pack else 0, fields)
  return step.lower(state, frozen, batch, jax.eval_shape(lambda: jnp.stack([jax.random.key(0)])))


def training_step(plan: steps.StagePlan, params: dict,
                  mesh: jax.sharding.Mesh) -> tuple[jax.stages.Wrapped, steps.TrainState, dict]:
  """(step of one run, abstract state, abstract frozen leaves) of a plan."""
  trainable, frozen = trees.split(params, plan.trains)
  trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
  program = steps.build(plan, trainable, frozen, STEPS, mesh)
  return program.step, steps.abstract_state(program, trainable), frozen


def training_batch(plan: steps.StagePlan, task: Task, B: int, T: int, teacher: bool, groups: int = 0,
                   fields: Callable | None = None) -> dict:
  """One run's abstract batch of B examples, with a leading axis of length 1 for the run.

  Each view of an example has a row of T tokens.

  teacher: whether the batch has the teacher's outputs.
  groups: number of groups of packed rows; 0: one text per row. A plan whose loss reads the padding never packs.
  fields: see Recipe.fields.
  """
  batch = steps.abstract_batch(plan.model, task, B * plan.views, T, teacher, soft="soft" in plan.trains,
                               groups=groups if plan.packed else 0, fields=fields)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)


def _lower_evaluation(config, mesh, B, T, model):
  params = params_of(config, model)
  places = sharding.param_shardings(params, model.shardings, mesh)
  params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)
  batch = steps.abstract_batch(model, TASKS[config.task], B, T, groups=sharding.batch_shards(mesh))
  rows = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding.batch_sharding(mesh))
          for k, v in batch.items() if k in ("input_ids", "segment_ids", "texts")}
  return inference.forward.lower(model, mesh, params, **rows)
