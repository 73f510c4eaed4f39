"""What the controls show the student in the place of the teacher's outputs on its own text: does what the teacher says
of an example matter, does its class, does there have to be a teacher?

Each takes {"teacher_logits" [N, C], "teacher_features" [N, D]}, labels [N] int and a seed, and returns the like. N
examples, C classes, D width.
"""

import numpy as np

from w2s_jax.data import streams


def own(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """Those of the example itself: no control, but the method."""
  del labels, seed
  return outputs


def shuffled(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """Those of another example, of any class: a fixed permutation."""
  rows = streams.rng(seed, "anchor", len(labels)).permutation(len(labels))
  return {name: values[rows] for name, values in outputs.items()}


def shuffled_within_classes(outputs: dict[str, np.ndarray], labels: np.ndarray,
                            seed: int) -> dict[str, np.ndarray]:
  """Those of another example of the same class."""
  rng, rows = streams.rng(seed, "anchor", len(labels)), np.arange(len(labels))
  for label in np.unique(labels):
    mine = np.flatnonzero(labels == label)
    rows[mine] = rng.permutation(mine)
  return {name: values[rows] for name, values in outputs.items()}


def class_means(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The mean over the example's class."""
  del seed
  classes, which = np.unique(labels, return_inverse=True)
  return {name: np.stack([values[labels == label].mean(axis=0) for label in classes])[which]
          for name, values in outputs.items()}


def orthogonal(outputs: dict[str, np.ndarray], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """No teacher: for each class a random direction, orthogonal to the others', as long as a student's features are
  behind a norm (the root of D), and a logit of 4 for the class."""
  C, D = outputs["teacher_logits"].shape[1], outputs["teacher_features"].shape[1]
  directions = np.linalg.qr(streams.rng(seed, "anchor", D).normal(size=(D, C)))[0].T
  return {"teacher_logits": 4 * np.eye(C, dtype=np.float32)[labels],
          "teacher_features": (D**0.5 * directions).astype(np.float32)[labels]}
