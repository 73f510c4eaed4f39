"""The learning-rate schedule, and an optimizer for each label of the trainable leaves."""

import jax
import jax.numpy as jnp
import optax

from w2s_jax.adapters import trees


def linear_schedule(learning_rate: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
  """Rises linearly from 0 to `learning_rate` over `warmup_steps`, then decays linearly to 0 at `steps`."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, learning_rate, warmup_steps),
       optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1))], [warmup_steps])


@optax.inject_hyperparams          # floats lie in the state, so that one compiled program serves all values
def ascent(step_size: float | jax.Array, max_norm: float | jax.Array) -> optax.GradientTransformation:
  """Gradient ascent: each row [..., D] moves by the length `step_size` along its gradient.

  `max_norm` bounds the row's norm after the step. A row whose gradient is 0 makes no step.
  """
  def update(grads, state, params):
    def move(gradient, row):
      def norm(x):
        return jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
      new = row + step_size * gradient / norm(gradient)
      return new * jnp.minimum(1.0, max_norm / norm(new)) - row
    return jax.tree.map(move, grads, params), state
  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make_optimizer(params: dict, learning_rate: float, steps: int, warmup_steps: int = 0, weight_decay: float = 0.01,
                   clip_norm: float = 0.0,
                   adversary: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
  """AdamW with linear learning-rate decay for the trainable leaves.

  Layer norms and biases (label "vector") and soft tokens (label "soft") have no weight decay. Decay would pull soft
  tokens to zero, away from the scale of the vocabulary's embeddings, and a zero embedding is not the same as no token.

  Args:
    params: the trainable leaves only (`trees.split`); no other leaf gets optimizer state.
    learning_rate: peak learning rate.
    steps: number of steps of the whole stage.
    warmup_steps: number of steps in which the rate rises.
    clip_norm: bound on the global norm of the gradient, without soft tokens if there is an adversary; 0: no bound.
    adversary: optimizer of the leaves of label "soft" (`ascent`); None: AdamW.
  Raises:
    ValueError: an adversary without leaves of label "soft".
  """
  schedule = linear_schedule(learning_rate, steps, warmup_steps)
  decay = {"vector": 0.0, "soft": 0.0}
  labels = trees.label_tree(params)
  present = sorted(set(jax.tree.leaves(labels)))  # a set's order, and the program with it, may differ between processes
  rules = {label: optax.adamw(schedule, weight_decay=decay.get(label, weight_decay)) for label in present}
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if adversary is not None and "soft" not in rules:
    raise ValueError("an adversary, but no leaves of label soft for it to move")
  if adversary is not None:
    rules["soft"] = adversary
    clip = [optax.masked(transform, jax.tree.map(lambda label: label != "soft", labels)) for transform in clip]
  return optax.chain(*clip, optax.partition(rules, labels))
