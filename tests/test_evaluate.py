"""CA, ASR and intervals on written-out literals; outputs independent of how rows are batched."""

import jax
import numpy as np
import pytest

from w2s_jax import sharding
from w2s_jax.measure import metrics
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import inference
from w2s_jax.training.train import Workplace


@pytest.mark.parametrize("hits,n,low,high", [
    (0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (909, 909, 0.995792, 1.0)])
def test_wilson(hits, n, low, high):
  """The closed formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96."""
  np.testing.assert_allclose(metrics.wilson(hits, n), [low, high], atol=1e-5)
  p, z = hits / n, 1.959964
  centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  formula = np.array([centre - half, centre + half]) / (1 + z * z / n)
  np.testing.assert_allclose(metrics.wilson(hits, n), formula, atol=1e-6)


def test_no_rows_no_knowledge():
  assert metrics.wilson(0, 0) == [0.0, 1.0]


def test_three_classes():
  """ASR counts the target among rows of other classes; 1 - accuracy would count 2 -> 1 as a success too."""
  labels = np.array([0, 0, 1, 1, 1, 2, 2, 2])
  predicted = np.array([0, 1, 0, 1, 2, 0, 1, 2])
  clean = metrics.clean_metrics(predicted, labels, 0)
  assert (clean["ca"], clean["ca_n"], clean["false_rate"]) == (3 / 8, 8, 2 / 6)
  out = metrics.attack_metrics(predicted, labels, 0)
  assert (out["asr"], out["asr_n"]) == (2 / 6, 6) and out["asr_ci"] == metrics.wilson(2, 6)
  assert metrics.attack_metrics(predicted, labels, 2)["asr"] == 1 / 5


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_outputs_are_in_row_order_however_they_are_batched(devices, llama):
  model, params = llama
  rng = np.random.default_rng(0)
  lengths = rng.choice([1, 3, 4, 5, 11], 21)       # few lengths, as each compiles
  arrays = {"input_ids": rng.integers(1, 64, (21, 16)).astype(np.int32), "length": lengths}
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  logits, features = inference.outputs(model, params, arrays, mesh, batch_size=8, buckets=(4, 8, 16))
  apply = jax.jit(model.apply)
  for i in range(21):
    n = lengths[i]
    one = apply(params, arrays["input_ids"][i:i + 1, :n], np.ones((1, n), np.int32))
    np.testing.assert_allclose(logits[i], one.logits[0], atol=1e-5)
    np.testing.assert_allclose(features[i], one.features[0], atol=1e-5)
  other = inference.outputs(model, params, arrays, mesh, batch_size=16, buckets=(16,))
  np.testing.assert_allclose(logits, other[0], atol=1e-5)
  place = Workplace(CLASSIFICATION, mesh, None, "", (16,), 8)
  np.testing.assert_array_equal(place.answers(model, params, arrays), logits.argmax(-1))
