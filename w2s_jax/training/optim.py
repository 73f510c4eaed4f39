"""Schedules; label tree -> optax.partition."""

import jax
import jax.numpy as jnp
import optax

from w2s_jax.adapters import trees


def linear_schedule(learning_rate: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
  """0 -> learning_rate over `warmup_steps`, then linearly down to 0 at `steps`."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, learning_rate, warmup_steps),
       optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1))], [warmup_steps])


@optax.inject_hyperparams          # floats go to the state, not into the program: no compilation for each student's own
def ascent(step_size: float | jax.Array, max_norm: float | jax.Array) -> optax.GradientTransformation:
  """Uphill: each row [..., D] moves by `step_size` along its gradient, if it has one; its norm stays in `max_norm`."""
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
  """AdamW with linear decay for the trainable subtree; the layers' norms and biases (label "vector") are not decayed.

  Nor are soft tokens (label "soft"): without an adversary they train like an adapter, but decay pulls a row to the zero
  embedding, which is not the absence of a token, and away from the scale of the vocabulary's rows.

  Args:
    params: the trainable leaves only (`trees.split`); nothing else gets optimizer state.
    learning_rate: peak.
    steps: of the whole stage.
    clip_norm: bound on the global norm of the trainable gradient; 0 leaves it alone.
    adversary: what moves the leaves of label "soft" instead of AdamW, `ascent`; None where there is none.
  Raises:
    ValueError: an adversary without leaves of label "soft".
  """
  schedule = linear_schedule(learning_rate, steps, warmup_steps)
  decay = {"vector": 0.0, "soft": 0.0}
  labels = trees.label_tree(params)
  present = sorted(set(jax.tree.leaves(labels)))  # sorted: hash order would compile another program each time
  rules = {label: optax.adamw(schedule, weight_decay=decay.get(label, weight_decay)) for label in present}
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  if adversary is not None and "soft" not in rules:
    raise ValueError("an adversary, but no leaves of label soft for it to move")
  if adversary is not None:
    rules["soft"] = adversary
    clip = [optax.masked(one, jax.tree.map(lambda label: label != "soft", labels)) for one in clip]
  return optax.chain(*clip, optax.partition(rules, labels))
