"""Schedules; label tree -> optax.partition."""

import jax
import optax

from w2s_jax import lora


def linear_schedule(learning_rate, steps, warmup_steps=0):
  """0 -> learning_rate over `warmup_steps`, then linearly down to 0 at `steps`."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, learning_rate, warmup_steps),
       optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1))], [warmup_steps])


def make_optimizer(params, learning_rate, steps, warmup_steps=0, weight_decay=0.01, clip_norm=0.0):
  """AdamW with linear decay for the trainable subtree; the layers' norms and biases (label "vector") are not decayed.

  Args:
    params: nested dict of the trainable leaves only (`lora.split`); nothing else gets optimizer state.
    learning_rate: peak.
    steps: of the whole stage.
    clip_norm: bound on the global norm of the trainable gradient; 0 leaves it alone.
  Returns:
    optax.GradientTransformation.
  """
  schedule = linear_schedule(learning_rate, steps, warmup_steps)
  decay = {"vector": 0.0}
  labels = lora.label_tree(params)
  present = sorted(set(jax.tree.leaves(labels)))  # sorted: hash order would compile another program each time
  adamw = {label: optax.adamw(schedule, weight_decay=decay.get(label, weight_decay)) for label in present}
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  return optax.chain(*clip, optax.partition(adamw, labels))


