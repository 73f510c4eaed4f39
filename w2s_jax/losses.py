"""Losses and log-odds. B rows, C classes, D feature width, T tokens.

`weights` [B] is 1 on real rows and 0 on rows that pad a short batch. None counts every row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def row_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
  """Mean of the values [B] over the rows that count, a float32 scalar."""
  values = values.astype(jnp.float32)
  return values.mean() if weights is None else (values * weights).sum() / weights.sum()


def _check(name, student, teacher):
  if student.shape != teacher.shape:
    raise ValueError(f"{name}: student {student.shape} and teacher {teacher.shape} must have one shape: pair each "
                     "example with its own teacher output (widen the teacher's head to the student's width)")


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Mean cross entropy.

  Args:
    logits: [B, C] float.
    labels: [B] int.
    weights: [B] or None.
  Returns:
    Scalar float32, in nats.
  """
  return row_mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels), weights)


def distillation(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float,
                 weights: jax.Array | None = None) -> jax.Array:
  """Batch mean of T^2 * KL(teacher || student) of the softened distributions (Hinton et al., arXiv 1503.02531).

  Args:
    student_logits: [B, C] float.
    teacher_logits: [B, C] float, constant with respect to the gradient.
    temperature: T > 0; logits are divided by it.
    weights: [B] or None.
  Returns:
    Scalar float32, in nats times T^2.
  Raises:
    ValueError: shapes differ.
  """
  _check("distillation", student_logits, teacher_logits)
  student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature)
  return temperature**2 * row_mean(optax.losses.kl_divergence_with_log_targets(student, teacher), weights)


def feature_alignment(student_features: jax.Array, teacher_features: jax.Array,
                      weights: jax.Array | None = None) -> jax.Array:
  """Mean squared Euclidean distance between paired features (feature-alignment loss of the paper).

  Args:
    student_features: [B, D] float, pooled after the final norm.
    teacher_features: [B, D] float, constant with respect to the gradient.
    weights: [B] or None.
  Returns:
    Scalar float32: squared distance summed over D, averaged over B.
  Raises:
    ValueError: the shapes differ. The released code broadcasts them silently, which is a bug.
  """
  _check("feature_alignment", student_features, teacher_features)
  gap = student_features.astype(jnp.float32) - jax.lax.stop_gradient(teacher_features).astype(jnp.float32)
  return row_mean(jnp.square(gap).sum(-1), weights)


def released_feature_alignment(student_hidden: jax.Array, teacher_features: jax.Array,
                               weights: jax.Array | None = None) -> jax.Array:
  """The released code's feature loss. It pulls every token, padding included, to the last row's teacher feature.

  Args:
    student_hidden: [B, T, D] float, all tokens after the final norm.
    teacher_features: [B, D] float; only the last real row is used.
    weights: [B] or None; real rows must come first.
  Returns:
    Scalar float32: squared distance summed over D, averaged over B and T.
  """
  last = -1 if weights is None else weights.sum().astype(jnp.int32) - 1
  target = jax.lax.stop_gradient(teacher_features)[last].astype(jnp.float32)
  return row_mean(jnp.square(student_hidden.astype(jnp.float32) - target).sum(-1).mean(-1), weights)


def next_token(logits: jax.Array, input_ids: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of every token except a row's first, and a mask of the tokens that count. R rows, V vocabulary.

  A token counts if it is not padding and the token before it belongs to the same text.

  Args:
    logits: [R, T - 1, V] predictions of tokens 2 to T.
    input_ids: [R, T] int.
    segment_ids: [R, T] int: 0 on padding, elsewhere the number of the token's text, which ascends along a row.
  Returns:
    (cross entropy [R, T - 1] in nats, mask [R, T - 1] float32 of 0 and 1).
  """
  values = optax.losses.softmax_cross_entropy_with_integer_labels(logits, input_ids[:, 1:])
  counted = (segment_ids[:, 1:] > 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
  return values, counted.astype(jnp.float32)


def log_odds(logits: jax.Array | np.ndarray, classes: jax.Array | np.ndarray) -> jax.Array:
  """Log-odds log(p / (1 - p)) of each row's class, [N] float32 in nats, from logits [N, C] and classes [N] int."""
  logits = logits.astype(jnp.float32)
  own = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
  return jnp.where(own, logits, 0).sum(-1) - jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
