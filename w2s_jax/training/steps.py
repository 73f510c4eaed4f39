"""The plan of a stage, and `build`, which makes its program: initial state, steps, gradient norms of single terms.

A step is `(state, frozen, batch, key) -> (state, metrics)`. It reads no config and no global, and uses no Python
randomness. It differentiates `state.params`, the trainable leaves, and only reads `frozen`. With an adversary the
metric `grad_norm` includes the gradient of the soft tokens. A batch is a dict of arrays:

  input_ids, segment_ids            [R, T]
  texts                             [G, B / G, 2] if rows hold several texts (Model.apply)
  weight                            [B], 0 on texts that pad a short batch
  label                             [B], or the other fields of the task (Task.fields)
  teacher_logits, teacher_features  [B, C] and [B, D], for distillation
  soft                              [B], 1 on texts with soft tokens, with an adversary

R rows of T tokens, B texts, G groups of texts (data/packing.py), C classes, D width.

Several runs may train together over one frozen base. State, batch, key and metrics always have a leading axis of runs,
of length 1 for a single run. Each run gives the same result as if it trained alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from w2s_jax import losses, sharding
from w2s_jax.adapters import trees
from w2s_jax.models import ClassifierOutput, Model
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import Task
from w2s_jax.training import optim

Loss = Callable[[dict, dict, dict, Any], tuple[jax.Array, dict]]


class TrainState(NamedTuple):
  step: jax.Array      # [] int32, number of finished steps
  params: Any          # the trainable leaves
  opt_state: Any


class StagePlan(NamedTuple):
  """What a stage trains, by which loss, and with which settings.

  Attributes:
    names: NAME of each run in metrics/NAME.jsonl. Checkpoints of all runs are stored under the first name.
    seeds: seed of each run's data order and dropout.
    model: the network to train; a Latent in the scan (measure/scan.py).
    loss: (trainable, frozen, batch, key) -> (scalar, {term: scalar}).
    weights: {loss term: weight}, for the terms' gradient norms.
    trains: labels (adapters/trees.py) of the leaves that train.
    settings: the stage's section of the config: `learning_rate`, `epochs`, `batch_size`, ...
    stream: name of the random stream for dropout.
    views: number of texts per example; a batch has all texts of its examples.
    packed: whether a row may hold several texts; if so, the loss must not read the padding.
    adversary: optimizer of the leaves of label "soft" (training/optim.py); None: no adversary.
  """
  names: Sequence[str]
  seeds: Sequence[int]
  model: Model | Latent
  loss: Loss
  weights: dict
  trains: Sequence[str]
  settings: Any
  stream: str = ""
  views: int = 1
  packed: bool = True
  adversary: optax.GradientTransformation | None = None


class Program(NamedTuple):
  """The compiled functions of a stage.

  Attributes:
    init: [trainable leaves of each run] -> TrainState [runs, ...], placed on the mesh. It copies the caller's leaves.
    step: (state, frozen, batch [runs, ...], keys [runs]) -> (state, {"loss", "grad_norm", each term} [runs]). It
      donates the state.
    steps: (state, frozen, batches [steps, runs, ...], keys, count) -> (state, metrics [steps, runs]): several steps in
      one dispatch. It donates the state. Only the first `count` batches change the state, so that a dispatch of fewer
      steps needs no other program.
    term_norms: (state, frozen, batch, keys) -> {"grad_norm/TERM": [runs]}, gradient norm of each weighted loss term.
  """
  init: Callable
  step: Callable
  steps: Callable
  term_norms: Callable


def build(plan: StagePlan, trainable: dict, frozen: dict, steps: int, mesh: jax.sharding.Mesh) -> Program:
  """The program of a stage of `steps` steps. It allocates nothing.

  trainable, frozen: leaves of one run. They may be abstract.
  """
  settings, rules, runs = plan.settings, plan.model.shardings, len(plan.seeds)
  tx = optim.make_optimizer(trainable, settings.learning_rate, steps, int(settings.warmup_fraction * steps),
                            settings.weight_decay, settings.clip_norm, plan.adversary)
  state_places = sharding.stacked(state_shardings(trainable, tx, rules, mesh))
  places = state_places, sharding.param_shardings(frozen, rules, mesh), mesh
  step = _make_step(plan.loss, tx, runs, *places)
  return Program(_make_init(tx, runs, state_places), step, _make_steps(step, *places),
                 _make_term_norms(plan.loss, plan.weights, runs, mesh))


def abstract_state(program: Program, trainable: dict, runs: int = 1) -> TrainState:
  """The state that `program.init` returns, as ShapeDtypeStructs."""
  return jax.eval_shape(program.init, [trainable] * runs)


def abstract_batch(model: Model, task: Task, rows: int, tokens: int, teacher: bool = False, soft: bool = False,
                   groups: int = 0, fields: Callable | None = None) -> dict:
  """A batch of one text per row, as ShapeDtypeStructs.

  Args:
    rows: number of rows, which is also the number of texts.
    tokens: tokens per row.
    teacher: whether the batch has the teacher's outputs.
    soft: whether the batch has the field `soft`.
    groups: number of groups in the layout of packed rows; 0: the layout without packing.
    fields: see Recipe.fields (defenses/records.py).
  """
  c = model.config
  shapes = {"input_ids": ((rows, tokens), "int32"), "segment_ids": ((rows, tokens), "int32"),
            "weight": ((rows,), "float32")} | {name: ((rows,), dtype) for name, dtype in task.fields.items()}
  if teacher:
    shapes |= {"teacher_logits": ((rows, c.num_labels), "float32"),
               "teacher_features": ((rows, c.feature_size), "float32")}
  if soft:
    shapes["soft"] = ((rows,), "float32")
  if fields:
    shapes |= {name: ((rows, *shape), "float32") for name, shape in fields(model, tokens).items()}
  if groups:
    shapes["texts"] = ((groups, rows // groups, 2), "int32")
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _make_init(tx, runs, places):
  def init_run(params):     # copies, because the steps donate the state and the caller keeps its parameters
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
  def init(starts):
    return _of_runs(init_run, runs)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
  return jax.jit(init, out_shardings=places)


def state_shardings(params: dict, tx: optax.GradientTransformation, rules: Sequence[tuple[str, PartitionSpec]],
                    mesh: jax.sharding.Mesh) -> TrainState:
  """NamedSharding of every leaf of one run's TrainState. Optimizer moments have the shardings of their parameters."""
  of_params = sharding.param_shardings(params, rules, mesh)
  everywhere = sharding.replicated(mesh)
  def masked(leaf):  # optax.partition puts a MaskedNode where another label's optimizer updates the leaf
    return isinstance(leaf, optax.MaskedNode)
  opt_state = optax.tree_utils.tree_map_params(
      tx, lambda leaf, place: leaf if masked(leaf) else place, jax.eval_shape(tx.init, params), of_params,
      transform_non_params=lambda _: everywhere, is_leaf=masked)
  return TrainState(everywhere, of_params, opt_state)


def forward(model: Model | Latent, params: dict, batch: dict, key: jax.Array | None = None,
            **options: Any) -> ClassifierOutput:
  """The model's output on a batch. A key turns dropout on; `options` are further arguments of Model.apply."""
  return model.apply(params, batch["input_ids"], texts=batch.get("texts"), segment_ids=batch["segment_ids"],
                     dropout_key=key, **options)


def counted_tokens(batch: dict) -> jax.Array:
  """[R, T] float32: 1 on real tokens, 0 on padding and in rows of weight 0. Packed rows have no tokens of weight 0."""
  real = (batch["segment_ids"] > 0).astype(jnp.float32)
  return real if "texts" in batch else real * batch["weight"][:, None]


def weighted_loss(model: Model | Latent, terms: Callable, weights: dict[str, float],
                  forward: Callable = forward) -> Loss:
  """The loss (trainable, frozen, batch, key) -> (scalar, {term: scalar}): a weighted sum of terms of the output.

  Args:
    terms: (ClassifierOutput, batch) -> {term: scalar}.
    weights: {term: weight}.
    forward: (model, params, batch, key) -> ClassifierOutput.
  """
  def loss(trainable, frozen, batch, key):
    values = terms(forward(model, trees.combine(trainable, frozen), batch, key), batch)
    return sum(weights[name] * value for name, value in values.items()), values
  return loss


def language_model_loss(model: Model) -> Loss:
  """The loss for next-token prediction: mean cross entropy of `counted_tokens`, with logits from `Model.lm_logits`."""
  def loss(trainable, frozen, batch, key):
    params = trees.combine(trainable, frozen)
    logits = model.lm_logits(params, forward(model, params, batch, key).hidden[:, :-1])
    tokens, counted = losses.next_token(logits, batch["input_ids"], batch["segment_ids"])
    counted *= counted_tokens(batch)[:, 1:]
    value = (tokens * counted).sum() / counted.sum()
    return value, {"lm": value}
  return loss


def _of_runs(function, runs, shared=()):
  """Maps a `function` of one run over a leading axis of runs in its arguments and results.

  For a single run the axis is removed and restored instead of vmapped, because the vmap rule of cuDNN's attention
  fails on our masks (layers.attention_kernel). On CPUs vmap over an axis of length 1 is free (docs/benchmarks.md).

  Args:
    shared: indices of the arguments that all runs share.
  """
  if runs == 1:
    def alone(*args):
      own = (arg if i in shared else jax.tree.map(lambda x: x[0], arg) for i, arg in enumerate(args))
      return jax.tree.map(lambda x: x[None], function(*own))
    return alone
  def axes(*args):
    return tuple(None if i in shared else 0 for i in range(len(args)))
  return lambda *args: jax.vmap(function, in_axes=axes(*args), axis_name=sharding.RUNS)(*args)


def _make_step(loss, tx, runs, state_places, frozen_places, mesh):
  def step(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    with sharding.on(mesh):
      (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": value, **terms, "grad_norm": optax.tree_utils.tree_norm(grads)}
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics
  everywhere, batch_places = sharding.replicated(mesh), sharding.stacked(sharding.batch_sharding(mesh))
  return jax.jit(_of_runs(step, runs, shared=(1,)), donate_argnums=0, out_shardings=(state_places, everywhere),
                 in_shardings=(state_places, frozen_places, batch_places, everywhere))


def _make_steps(step, state_places, frozen_places, mesh):
  def steps(state, frozen, batches, keys, count):
    def counted_step(state, numbered):
      number, batch = numbered
      new, metrics = step(state, frozen, batch, keys)
      return jax.tree.map(lambda new, old: jnp.where(number < count, new, old), new, state), metrics
    return jax.lax.scan(counted_step, state, (jnp.arange(len(batches["weight"])), batches))
  everywhere = sharding.replicated(mesh)
  batch_places = sharding.stacked(sharding.stacked(sharding.batch_sharding(mesh)))
  return jax.jit(steps, in_shardings=(state_places, frozen_places, batch_places, everywhere, everywhere),
                 out_shardings=(state_places, everywhere), donate_argnums=0)


def _make_term_norms(loss, weights, runs, mesh):
  def norms(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    def weighted(params):
      terms = loss(params, frozen, batch, key)[1]
      return jnp.stack([weights[name] * terms[name] for name in weights])
    with sharding.on(mesh):
      _, backward = jax.vjp(weighted, state.params)       # lax.map compiles it once for any number of terms
      of_terms = jax.lax.map(lambda unit: optax.tree_utils.tree_norm(backward(unit)), jnp.eye(len(weights)))
    return {f"grad_norm/{name}": norm for name, norm in zip(weights, of_terms)}
  return jax.jit(_of_runs(norms, runs, shared=(1,)))
