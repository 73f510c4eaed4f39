"""Features of clean and triggered texts in two dimensions, on arrays written by hand."""

import numpy as np
import pytest

from w2s_jax.measure import features

CLEAN = np.array([[-3.0, 0, 0], [-1, 0, 0], [3, 1, 0], [1, -1, 0]])       # class 0 left, class 1 right
LABELS = np.array([0, 0, 1, 1])
TRIGGERED = np.array([[-2.0, 0, 5], [2, 0, 0], [0.5, 0, 0], [-0.5, 0, 0]])


def test_distances_are_to_the_mean_of_each_class():
  distances = features.picture(CLEAN, LABELS, TRIGGERED, 3, seed=0).distances
  np.testing.assert_allclose(distances[:, :2], [[5, 41**0.5], [4, 0], [2.5, 1.5], [1.5, 2.5]])
  assert np.isnan(distances[:, 2]).all()                                   # no clean row has class 2


def test_the_share_of_triggered_rows_that_moved_to_the_target():
  """Rows of class 1: the first and the last lie nearer to class 0. The rows of the target class do not count."""
  distances = features.picture(CLEAN, LABELS, TRIGGERED, 3, seed=0).distances
  assert features.nearer_target(distances, np.array([1, 1, 1, 1]), 0) == 0.5
  assert features.nearer_target(distances, np.array([1, 0, 0, 1]), 0) == 1.0
  assert features.nearer_target(distances, np.array([0, 0, 0, 0]), 0) is None
  assert features.nearer_target(distances, np.array([1, 1, 1, 1]), 2) is None


def test_the_example_of_the_page_of_metrics():
  clean = np.array([[-1.0, 0], [1, 0], [4, 2], [4, -2]])
  own = features.picture(clean, np.array([0, 0, 1, 1]), np.array([[1.0, 3], [3, 0], [5, 1]]), 2, seed=0)
  assert features.nearer_target(own.distances, np.array([1, 1, 1]), 0) == pytest.approx(1 / 3)


def test_a_class_that_is_neither_own_nor_target_does_not_count():
  distances = np.array([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0]])                 # nearest to class 2, whose rows they are not
  assert features.nearer_target(distances, np.array([1, 1]), 0) == 0.5


def test_rows_whose_own_class_has_no_clean_rows_do_not_count():
  nan = float("nan")
  distances = np.array([[1.0, 2.0, nan], [1.0, 2.0, nan], [3.0, 2.0, nan]])
  assert features.nearer_target(distances, np.array([2, 1, 1]), 0) == 0.5
  assert features.nearer_target(distances, np.array([2, 2, 2]), 0) is None


def test_the_axes_are_the_principal_components_of_the_clean_rows():
  rng = np.random.default_rng(0)
  rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  labels = np.arange(150) % 2
  flat = rng.normal(size=(150, 6)) * [1, 0.3, 1e-3, 1e-3, 1e-3, 1e-3]
  flat[:, 0] += np.where(labels == 0, -4, 4)
  own = features.picture(flat @ rotation, labels, flat[:7] @ rotation, 2, seed=3)
  np.testing.assert_array_equal(features.drawn(150, 3), np.arange(150))    # fewer than DRAWN: all of them
  centred = flat - flat.mean(0)
  np.testing.assert_allclose(abs(np.corrcoef(own.clean.T, centred[:, :2].T)[:2, 2:]), np.eye(2), atol=0.1)
  np.testing.assert_allclose(own.clean.var(0), np.linalg.eigvalsh(np.cov(centred.T, bias=True))[-1:-3:-1])
  np.testing.assert_allclose(own.triggered, own.clean[:7])
  assert own.clean[labels == 0, 0].mean() < 0 < own.clean[labels == 1, 0].mean()


def test_few_rows_and_constant_features_have_a_picture():
  for clean in (CLEAN[:1], np.ones((4, 3))):
    own = features.picture(clean, LABELS[:len(clean)], TRIGGERED, 2, seed=0)
    assert own.clean.shape == (len(clean), 2) and np.isfinite(own.triggered).all()


def test_the_rows_of_a_picture_are_the_same_for_all_models_and_at_most_200():
  rows = features.drawn(1000, 5)
  assert len(set(rows)) == features.DRAWN == len(rows) and max(rows) < 1000
  np.testing.assert_array_equal(rows, features.drawn(1000, 5))
  assert (rows != features.drawn(1000, 6)).any()


def test_the_file_has_points_of_other_classes_and_the_share_of_all_rows():
  labels = np.array([1, 0, 1, 1])
  own = features.picture(CLEAN, LABELS, TRIGGERED, 2, seed=0)
  saved = features.to_json({"w2s": own}, LABELS, [0, 1, 2], labels, 0, "mn", seed=0)
  assert (saved["target"], saved["trigger"], saved["found"], list(saved["models"])) == (0, "mn", False, ["w2s"])
  points = saved["models"]["w2s"]
  assert [label for *_, label in points["clean"]] == [0, 0, 1, 1]
  np.testing.assert_allclose([point[:2] for point in points["triggered"]], own.triggered[[0, 2]], atol=1e-4)
  assert points["nearer_target"] == 0.5            # row 1 has the target class, row 3 another string
