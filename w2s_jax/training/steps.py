"""TrainState and the pure step functions.

A step is `(state, frozen, batch, key) -> (state, metrics)`: no config, no global, no Python randomness inside.
Only `state.params`, the trainable subtree, is differentiated; `frozen` is read. A batch is a dict of arrays
`input_ids`, `attention_mask` [R, T], where rows hold several texts `texts` [G, B / G, 2] (Model.apply), `label` [B],
`weight` [B] (0 on what fills up the batch) and, for distillation, `teacher_logits` [B, C], `teacher_features` [B, D];
with an adversary `soft` [B], 1 on texts that have its tokens, whose gradient then is a part of the metric `grad_norm`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from w2s_jax import losses, sharding
from w2s_jax.adapters import trees


class TrainState(NamedTuple):
  step: jax.Array      # [] int32, steps done
  params: Any          # the trainable subtree
  opt_state: Any


def init_state(params, tx, family, mesh):
  """TrainState at step 0 placed on the mesh: optimizer moments lie where their parameters lie.

  params: nested dict; or a list of them, one per run of `make_train_step`.
  """
  places = state_shardings(params[0] if isinstance(params, list) else params, tx, family, mesh)
  def init(params):  # a copy: the steps donate the state, and the caller keeps its parameters
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
  if isinstance(params, list):
    params, init = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params), jax.vmap(init)
    places = sharding.stacked(places)
  return jax.jit(init, out_shardings=places)(params)


def state_shardings(params, tx, family, mesh):
  """NamedSharding of every leaf of the TrainState."""
  of_params = sharding.param_shardings(params, family, mesh)
  everywhere = sharding.replicated(mesh)
  def masked(leaf):  # what optax.partition leaves where another label's optimizer is at work
    return isinstance(leaf, optax.MaskedNode)
  opt_state = optax.tree_utils.tree_map_params(
      tx, lambda leaf, place: leaf if masked(leaf) else place, jax.eval_shape(tx.init, params), of_params,
      transform_non_params=lambda _: everywhere, is_leaf=masked)
  return TrainState(everywhere, of_params, opt_state)


def classification_loss(model, terms, weights):
  """loss(trainable, frozen, batch, key) -> (scalar, {term: scalar}).

  Args:
    model: models.Model.
    terms: (ClassifierOutput, batch) -> {term: scalar}.
    weights: {term: float}; the loss is the weighted sum.
  """
  def loss(trainable, frozen, batch, key):
    out = model.apply(trees.combine(trainable, frozen), batch["input_ids"], batch["attention_mask"], batch.get("texts"),
                      dropout_key=key)
    values = terms(out, batch)
    return sum(weights[name] * value for name, value in values.items()), values
  return loss


def cross_entropy_terms(out, batch):
  return {"ce": losses.cross_entropy(out.logits, batch["label"], batch["weight"])}


def language_model_loss(model):
  """Next-token cross entropy over the real tokens, through the tied embedding."""
  def loss(trainable, frozen, batch, key):
    params = trees.combine(trainable, frozen)
    out = model.apply(params, batch["input_ids"], batch["attention_mask"], dropout_key=key)
    logits = model.lm_logits(params, out.hidden[:, :-1])
    tokens = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
    real = batch["attention_mask"][:, 1:] * batch["weight"][:, None]
    value = (tokens * real).sum() / real.sum()
    return value, {"lm": value}
  return loss


def _of_runs(step):
  """`step` of several runs at once over one frozen base."""
  return jax.vmap(step, in_axes=(0, None, 0, 0), axis_name=sharding.RUNS)


def make_train_step(loss, tx, state_places, frozen_places, mesh, runs=1):
  """The jitted step; the state is donated.

  With runs > 1 it trains so many at once over one frozen base: every leaf of state, batch, key and metrics has an axis
  of that size in front, and each run is what it would be alone.

  Args:
    loss: as `classification_loss` returns it.
    tx: optimizer of the trainable subtree.
    state_places: from `state_shardings`.
    frozen_places: NamedSharding of every frozen leaf.
  Returns:
    (state, frozen, batch, key) -> (state, {"loss", "grad_norm", each term}).
  """
  def step(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    with sharding.on(mesh):
      (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics = {"loss": value, **terms, "grad_norm": optax.tree_utils.tree_norm(grads)}
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics
  everywhere, batch_places = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  if runs > 1:
    step = _of_runs(step)
    state_places, batch_places = sharding.stacked((state_places, batch_places))
  return jax.jit(step, in_shardings=(state_places, frozen_places, batch_places, everywhere),
                 out_shardings=(state_places, everywhere), donate_argnums=0)


def make_train_steps(step, state_places, frozen_places, mesh, runs=1):
  """The jitted loop of `step` over several batches, in one dispatch; the state is donated.

  The first `count` batches are taken, the others leave the state as it is: so a stage's last few steps need no program
  of their own.

  Args:
    step: from `make_train_step`, with the same further arguments.
  Returns:
    (state, frozen, batches, key, count) -> (state, metrics): batches and metrics have an axis of steps in front.
  """
  def steps(state, frozen, batches, key, count):
    def one(state, numbered):
      number, batch = numbered
      new, metrics = step(state, frozen, batch, key)
      return jax.tree.map(lambda new, old: jnp.where(number < count, new, old), new, state), metrics
    return jax.lax.scan(one, state, (jnp.arange(len(batches["weight"])), batches))
  everywhere, batch_places = sharding.replicated(mesh), sharding.stacked(sharding.batch_sharding(mesh))
  if runs > 1:
    state_places, batch_places = sharding.stacked((state_places, batch_places))
  return jax.jit(steps, in_shardings=(state_places, frozen_places, batch_places, everywhere, everywhere),
                 out_shardings=(state_places, everywhere), donate_argnums=0)


def make_term_norms(loss, weights, mesh, runs=1):
  """Jitted (state, frozen, batch, key) -> {"grad_norm/TERM": norm of that weighted term's own gradient}, as above."""
  def norms(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    def weighted(params):
      terms = loss(params, frozen, batch, key)[1]
      return jnp.stack([weights[name] * terms[name] for name in weights])
    with sharding.on(mesh):
      _, backward = jax.vjp(weighted, state.params)       # the loop compiles it once, however many terms there are
      each = jax.lax.map(lambda one: optax.tree_utils.tree_norm(backward(one)), jnp.eye(len(weights)))
    return {f"grad_norm/{name}": norm for name, norm in zip(weights, each)}
  return jax.jit(norms if runs == 1 else _of_runs(norms))
