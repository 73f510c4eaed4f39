"""Anchors: the outputs that the student learns to match. They are the teacher's own, or a control in their place.

The controls test whether the teacher's output on an example matters, whether the example's class is enough, and
whether a teacher is needed at all. Each function takes {"teacher_logits" [N, C], "teacher_features" [N, D]}, labels [N]
int and a seed. It returns a dict of the same keys and shapes. N examples, C classes, D width.
"""

import numpy as np

from w2s_jax.data import streams


def own(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The teacher's outputs on the example itself, as in the paper's method. This is not a control."""
  del labels, seed
  return outputs


def shuffled(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The teacher's outputs on a random example of any class. One permutation serves all epochs."""
  rows = streams.rng(seed, "anchor", len(labels)).permutation(len(labels))
  return {name: values[rows] for name, values in outputs.items()}


def shuffled_within_classes(outputs: dict[str, np.ndarray], labels: np.ndarray,
                            seed: int) -> dict[str, np.ndarray]:
  """The teacher's outputs on a random example of the same class. One permutation serves all epochs."""
  rng, rows = streams.rng(seed, "anchor", len(labels)), np.arange(len(labels))
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    rows[members] = rng.permutation(members)
  return {name: values[rows] for name, values in outputs.items()}


def class_means(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The mean of the teacher's outputs over the example's class."""
  del seed
  classes, which = np.unique(labels, return_inverse=True)
  return {name: np.stack([values[labels == label].mean(axis=0) for label in classes])[which]
          for name, values in outputs.items()}


def orthogonal(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """Outputs without a teacher. Each class has a random feature direction, and a logit of 4 for itself.

  The directions of the classes are orthogonal. Their length is sqrt(D), like that of a student's features after a norm.
  """
  C, D = outputs["teacher_logits"].shape[1], outputs["teacher_features"].shape[1]
  directions = np.linalg.qr(streams.rng(seed, "anchor", D).normal(size=(D, C)))[0].T
  return {"teacher_logits": 4 * np.eye(C, dtype=np.float32)[labels],
          "teacher_features": (D**0.5 * directions).astype(np.float32)[labels]}
