"""What a stage trains, and the one function that builds its program: initial state, steps, norms of single terms.

A step is `(state, frozen, batch, key) -> (state, metrics)`: no config, no global, no Python randomness inside.
Only `state.params`, the trainable subtree, is differentiated; `frozen` is read. A batch is a dict of arrays
`input_ids`, `segment_ids` [R, T], where rows hold several texts `texts` [G, B / G, 2] (Model.apply), `weight` [B] (0 on
what fills up the batch) and, for distillation, `teacher_logits` [B, C], `teacher_features` [B, D]; with an adversary
`soft` [B], 1 on texts that have its tokens, whose gradient then is a part of the metric `grad_norm`.

Several runs train at once over one frozen base: state, batch, key and metrics have an axis of runs in front, of length
one where there is one run. Each run is what it would be alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from w2s_jax import losses, sharding
from w2s_jax.adapters import trees
from w2s_jax.models import Model
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import Task
from w2s_jax.training import optim

Loss = Callable[[dict, dict, dict, Any], tuple[jax.Array, dict]]


class TrainState(NamedTuple):
  step: jax.Array      # [] int32, steps done
  params: Any          # the trainable subtree
  opt_state: Any


class StagePlan(NamedTuple):
  """What a stage trains, by which loss, and at what rates.

  Attributes:
    names: of each run: metrics/NAME.jsonl; the first one's is the directory of all their checkpoints.
    seeds: of each run's order, dropout and other random choices.
    model: a Latent in the scan (measure/scan.py).
    loss: (trainable, frozen, batch, key) -> (scalar, {term: scalar}).
    weights: {term: float} of the loss's terms, for the norms of their gradients.
    trains: labels (adapters/trees.py) of the leaves that train.
    settings: `learning_rate`, `epochs`, `batch_size` ... : a stage's section of the config.
    stream: name of the random stream of dropout.
    views: texts of one example; a batch's examples bring all of theirs.
    packed: the loss does not read what is between the texts of a row, so that a row may hold several.
    adversary: what moves leaves of label "soft" (training/optim.py); None where there are none.
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
  """What of a stage is compiled.

  Attributes:
    init: [trainable leaves of each run] -> TrainState [runs, ...], placed on the mesh. The leaves stay the caller's.
    step: (state, frozen, batch [runs, ...], keys [runs]) -> (state, {"loss", "grad_norm", each term} [runs]); the state
      is donated.
    steps: (state, frozen, batches [steps, runs, ...], keys, count) -> (state, metrics [steps, runs]): several steps in
      one dispatch; the state is donated. The first `count` batches are taken, the others leave the state as it is, so
      that a stage's last few steps need no program of their own.
    term_norms: (state, frozen, batch, keys) -> {"grad_norm/TERM": [runs]}, of each weighted term's own gradient.
  """
  init: Callable
  step: Callable
  steps: Callable
  term_norms: Callable


def build(plan: StagePlan, trainable: dict, frozen: dict, steps: int, mesh: jax.sharding.Mesh) -> Program:
  """The program of a stage of `steps` steps; nothing is allocated, and the leaves of one run may be abstract."""
  settings, rules, runs = plan.settings, plan.model.shardings, len(plan.seeds)
  tx = optim.make_optimizer(trainable, settings.learning_rate, steps, int(settings.warmup_fraction * steps),
                            settings.weight_decay, settings.clip_norm, plan.adversary)
  state_places = sharding.stacked(state_shardings(trainable, tx, rules, mesh))
  places = state_places, sharding.param_shardings(frozen, rules, mesh), mesh
  step = _make_step(plan.loss, tx, runs, *places)
  return Program(_make_init(tx, runs, state_places), step, _make_steps(step, *places),
                 _make_term_norms(plan.loss, plan.weights, runs, mesh))


def abstract_state(program: Program, trainable: dict, runs: int = 1) -> TrainState:
  """The state that `program.init` gives, of shapes alone."""
  return jax.eval_shape(program.init, [trainable] * runs)


def abstract_batch(model: Model, task: Task, rows: int, tokens: int, teacher: bool = False, soft: bool = False,
                   groups: int = 0) -> dict:
  """A batch of one text a row, of shapes alone.

  Args:
    teacher: with the teacher's outputs.
    soft: with the field that tells which texts have soft tokens.
    groups: of the rows, where it is laid out as packed rows are; 0: a row is a text.
  """
  c = model.config
  shapes = {"input_ids": ((rows, tokens), "int32"), "segment_ids": ((rows, tokens), "int32"),
            "weight": ((rows,), "float32")} | {name: ((rows,), dtype) for name, dtype in task.fields.items()}
  if teacher:
    shapes |= {"teacher_logits": ((rows, c.num_labels), "float32"),
               "teacher_features": ((rows, c.feature_size), "float32")}
  if soft:
    shapes["soft"] = ((rows,), "float32")
  if groups:
    shapes["texts"] = ((groups, rows // groups, 2), "int32")
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _make_init(tx, runs, places):
  def one(params):     # a copy: the steps donate the state, and the caller keeps its parameters
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
  def init(starts):
    return _of_runs(one, runs)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
  return jax.jit(init, out_shardings=places)


def state_shardings(params: dict, tx: optax.GradientTransformation, rules: Sequence[tuple[str, PartitionSpec]],
                    mesh: jax.sharding.Mesh) -> TrainState:
  """NamedSharding of every leaf of one run's TrainState: optimizer moments lie where their parameters lie."""
  of_params = sharding.param_shardings(params, rules, mesh)
  everywhere = sharding.replicated(mesh)
  def masked(leaf):  # what optax.partition leaves where another label's optimizer is at work
    return isinstance(leaf, optax.MaskedNode)
  opt_state = optax.tree_utils.tree_map_params(
      tx, lambda leaf, place: leaf if masked(leaf) else place, jax.eval_shape(tx.init, params), of_params,
      transform_non_params=lambda _: everywhere, is_leaf=masked)
  return TrainState(everywhere, of_params, opt_state)


def weighted_loss(model: Model | Latent, terms: Callable, weights: dict[str, float]) -> Loss:
  """loss(trainable, frozen, batch, key) -> (scalar, {term: scalar}), of terms that are read off the output.

  Args:
    terms: (ClassifierOutput, batch) -> {term: scalar}.
    weights: of each term; the loss is the weighted sum.
  """
  def loss(trainable, frozen, batch, key):
    out = model.apply(trees.combine(trainable, frozen), batch["input_ids"], texts=batch.get("texts"),
                      segment_ids=batch["segment_ids"], dropout_key=key)
    values = terms(out, batch)
    return sum(weights[name] * value for name, value in values.items()), values
  return loss


def language_model_loss(model: Model) -> Loss:
  """Mean next-token cross entropy, through the tied embedding.

  What fills up a batch counts nothing: a row of weight 0; in packed rows it has no tokens.
  """
  def loss(trainable, frozen, batch, key):
    params = trees.combine(trainable, frozen)
    segments, texts = batch["segment_ids"], batch.get("texts")
    out = model.apply(params, batch["input_ids"], texts=texts, segment_ids=segments, dropout_key=key)
    logits = model.lm_logits(params, out.hidden[:, :-1])
    tokens, counted = losses.next_token(logits, batch["input_ids"], segments)
    if texts is None:
      counted *= batch["weight"][:, None]
    value = (tokens * counted).sum() / counted.sum()
    return value, {"lm": value}
  return loss


def _of_runs(function, runs, shared=()):
  """`function` of one run as one of several, whose arguments and results have an axis of runs in front.

  The axis of a single run is taken off and put back: cuDNN's attention has no rule for vmap over our masks
  (layers.attention_kernel). On CPUs an axis of one costs nothing (docs/benchmarks.md).

  Args:
    shared: places of the arguments that all runs share.
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
    def one(state, numbered):
      number, batch = numbered
      new, metrics = step(state, frozen, batch, keys)
      return jax.tree.map(lambda new, old: jnp.where(number < count, new, old), new, state), metrics
    return jax.lax.scan(one, state, (jnp.arange(len(batches["weight"])), batches))
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
      _, backward = jax.vjp(weighted, state.params)       # the loop compiles it once, however many terms there are
      of_terms = jax.lax.map(lambda one: optax.tree_utils.tree_norm(backward(one)), jnp.eye(len(weights)))
    return {f"grad_norm/{name}": norm for name, norm in zip(weights, of_terms)}
  return jax.jit(_of_runs(norms, runs, shared=(1,)))
