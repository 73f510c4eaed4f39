"""Losses against numpy on literals and against torch. B rows, C classes, D width, T tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from w2s_jax import losses

LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0], [-1.0, 0.0, 3.0], [1.0, 1.0, 1.0]], np.float32)
LABELS = np.array([0, 2, 2, 1])
TEACHER = np.array([[1.0, -1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.5], [-2.0, 1.0, 4.0]], np.float32)
STUDENT_FEATURES = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [2.0, 2.0]], np.float32)
TEACHER_FEATURES = np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 1.5], [-1.0, 0.0]], np.float32)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def rand(*shape, seed=0, scale=3.0):
  return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_cross_entropy_on_literals():
  rows = [np.log(np.exp(2) + 1 + np.exp(-1)) - 2, np.log(np.exp(0.5) + np.exp(1.5) + 1) - 0,
          np.log(np.exp(-1) + 1 + np.exp(3)) - 3, np.log(3)]
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), np.mean(rows), rtol=1e-6)
  np.testing.assert_allclose(losses.cross_entropy(np.array([[1e4, 0.0]], np.float32), np.array([1])), 1e4)


def test_distillation_on_literals():
  for temperature in (1.0, 2.0, 5.0):
    t, s = log_softmax(TEACHER / temperature), log_softmax(LOGITS / temperature)
    want = temperature**2 * (np.exp(t) * (t - s)).sum(-1).mean()
    np.testing.assert_allclose(losses.distillation(LOGITS, TEACHER, temperature), want, rtol=1e-6)
  # KL of (3/4, 1/4) from (1/2, 1/2), teacher first
  got = losses.distillation(np.zeros((1, 2), np.float32), np.log(np.array([[3.0, 1.0]], np.float32)), 1.0)
  np.testing.assert_allclose(got, 0.75 * np.log(1.5) + 0.25 * np.log(0.5), rtol=1e-6)


def test_distillation_is_zero_between_equals_and_finite_between_certainties():
  assert losses.distillation(LOGITS, LOGITS, 2.0) == 0.0
  sure = np.array([[100.0, -100.0]], np.float32)
  np.testing.assert_allclose(losses.distillation(-sure, sure, 1.0), 200.0, rtol=1e-6)


def test_feature_alignment_on_literals():
  # squared distances by hand: 1, 1 + 4, 1, 9 + 4
  assert losses.feature_alignment(STUDENT_FEATURES, TEACHER_FEATURES) == (1 + 5 + 1 + 13) / 4


def test_released_feature_alignment_on_literals():
  hidden = np.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], [[-1.0, 1.0], [2.0, 0.0], [0.0, 0.0]]], np.float32)
  teacher = np.array([[9.0, 9.0], [1.0, 1.0]], np.float32)     # only the last row counts
  # to (1, 1): 2, 1, 2 and 4, 2, 2
  np.testing.assert_allclose(losses.released_feature_alignment(hidden, teacher), (2 + 1 + 2 + 4 + 2 + 2) / 6, rtol=1e-6)


@pytest.mark.parametrize("rows,classes,width", [(1, 2, 3), (5, 2, 16), (8, 7, 33)])
def test_parity_with_torch(rows, classes, width):
  student, teacher = rand(rows, classes, seed=1), rand(rows, classes, seed=2)
  labels = np.random.default_rng(3).integers(0, classes, rows)
  a, b = rand(rows, width, seed=4), rand(rows, width, seed=5)
  s, t = torch.tensor(student), torch.tensor(teacher)
  np.testing.assert_allclose(losses.cross_entropy(student, labels), F.cross_entropy(s, torch.tensor(labels)), rtol=1e-5)
  kl = 4 * F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
  np.testing.assert_allclose(losses.distillation(student, teacher, 2.0), kl, rtol=1e-5)
  mse = F.mse_loss(torch.tensor(a), torch.tensor(b), reduction="sum") / rows
  np.testing.assert_allclose(losses.feature_alignment(a, b), mse, rtol=1e-5)


@pytest.mark.parametrize("rows,tokens,width", [(1, 1, 2), (3, 5, 4), (4, 7, 16)])
def test_released_arithmetic_equals_the_released_code_in_torch(rows, tokens, width):
  """`[-1]` of [B, D] is the last example's vector, which broadcasts to [B, T, D]. Value and gradient agree."""
  hidden, teacher = rand(rows, tokens, width, seed=1), rand(rows, width, seed=2)
  student = torch.tensor(hidden, requires_grad=True)
  last = torch.tensor(teacher)[-1]
  want = torch.square(student - last).sum(dim=-1).mean()
  want.backward()
  got, gradient = jax.value_and_grad(losses.released_feature_alignment)(jnp.asarray(hidden), teacher)
  np.testing.assert_allclose(got, want.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, student.grad, rtol=1e-5, atol=1e-7)


def calls(rows=4):
  """{name: function of weights} on the first `rows` of the literals."""
  hidden = rand(4, 3, 2, seed=7)[:rows]
  return {
      "cross_entropy": lambda w: losses.cross_entropy(LOGITS[:rows], LABELS[:rows], w),
      "distillation": lambda w: losses.distillation(LOGITS[:rows], TEACHER[:rows], 2.0, w),
      "feature_alignment": lambda w: losses.feature_alignment(STUDENT_FEATURES[:rows], TEACHER_FEATURES[:rows], w),
      "released_feature_alignment": lambda w: losses.released_feature_alignment(hidden, TEACHER_FEATURES[:rows], w)}


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("real", [1, 2, 3, 4])
def test_filler_rows_do_not_count(name, real):
  weights = np.array([1.0] * real + [0.0] * (4 - real), np.float32)
  np.testing.assert_allclose(calls()[name](weights), calls(real)[name](None), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scalar_float32_computed_in_float32(dtype):
  """Low-precision inputs are widened before any arithmetic, so the value is that of the same inputs in float64."""
  a, b = jnp.asarray(rand(6, 5, seed=1), dtype), jnp.asarray(rand(6, 5, seed=2), dtype)
  labels = np.array([0, 1, 2, 3, 4, 0])
  A, B = np.asarray(a, np.float64), np.asarray(b, np.float64)
  s, t = log_softmax(A / 2), log_softmax(B / 2)
  for got, want in (
      (losses.cross_entropy(a, labels), -log_softmax(A)[np.arange(6), labels].mean()),
      (losses.distillation(a, b, 2.0), 4 * (np.exp(t) * (t - s)).sum(-1).mean()),
      (losses.feature_alignment(a, b), np.square(A - B).sum(-1).mean()),
      (losses.released_feature_alignment(a[:, None], b), np.square(A - B[-1]).sum(-1).mean())):
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_shapes_that_would_broadcast_are_refused():
  """The message has the loss, both shapes and what to do."""
  hidden = np.zeros((4, 5, 2), np.float32)
  with pytest.raises(ValueError, match=r"feature_alignment.*\(4, 5, 2\).*\(2,\).*own teacher output"):
    losses.feature_alignment(hidden, TEACHER_FEATURES[-1])
  with pytest.raises(ValueError, match=r"feature_alignment.*\(4, 2\).*\(1, 2\)"):
    losses.feature_alignment(STUDENT_FEATURES, TEACHER_FEATURES[:1])
  with pytest.raises(ValueError, match=r"distillation.*\(4, 3\).*\(4, 1\)"):
    losses.distillation(LOGITS, TEACHER[:, :1], 2.0)


def test_the_teacher_gets_no_gradient_and_the_student_does():
  hidden = rand(4, 3, 2, seed=7)
  for loss, student, teacher in (
      (lambda s, t: losses.distillation(s, t, 2.0), LOGITS, TEACHER),
      (losses.feature_alignment, STUDENT_FEATURES, TEACHER_FEATURES),
      (losses.released_feature_alignment, hidden, TEACHER_FEATURES)):
    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_array_equal(to_teacher, np.zeros_like(teacher))
    assert np.linalg.norm(to_student) > 0.1
  # by hand: d/ds mean ||s - t||^2 = 2 (s - t) / B
  np.testing.assert_allclose(jax.grad(losses.feature_alignment)(STUDENT_FEATURES, TEACHER_FEATURES),
                             2 * (STUDENT_FEATURES - TEACHER_FEATURES) / 4, rtol=1e-6)


def test_log_odds():
  p = np.array([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
  got = losses.log_odds(np.log(p) + 7.0, np.array([2, 0]))
  np.testing.assert_allclose(got, np.log([0.5 / 0.5, 0.9 / 0.1]), atol=1e-6)
