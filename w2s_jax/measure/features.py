"""Pooled features of clean and triggered texts: the share that has moved to the target class, and a picture.

A backdoor moves the features of triggered texts towards those of the target class. If a defense works, triggered texts
stay near their own class. The picture shows the first two principal components of at most 200 of the model's clean
texts.

N clean rows, M triggered rows, K clean rows in the picture, C classes, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from w2s_jax.data import streams

FILE = "features.json"
DRAWN = 200              # largest number of clean rows in a picture, and largest number of triggered rows


class Picture(NamedTuple):
  """The features of one model, reduced to two principal components and to distances.

  Attributes:
    clean: [K, 2] float, the clean rows that `drawn` chooses, on the principal components of these rows.
    triggered: [M, 2] float, all triggered rows on the same components.
    distances: [M, C] float, Euclidean distance in D dimensions from a triggered row to the mean of the clean rows of
      each class; nan for a class without rows.
  """
  clean: np.ndarray
  triggered: np.ndarray
  distances: np.ndarray


def drawn(count: int, seed: int) -> np.ndarray:
  """Indices, out of `count` rows, of the rows in the picture. Every model of a run gets the same rows."""
  return np.sort(streams.rng(seed, "rows of the picture").permutation(count)[:DRAWN])


def picture(clean: np.ndarray, labels: np.ndarray, triggered: np.ndarray, num_labels: int, seed: int) -> Picture:
  """The Picture of a model.

  Args:
    clean: [N, D] float, features of the clean rows.
    labels: [N] int, their classes.
    triggered: [M, D] float, features of the triggered rows.
    num_labels: C.
    seed: the run's seed, which chooses the K rows.
  """
  distances = np.full((len(triggered), num_labels), np.nan)
  for label in set(labels.tolist()):
    distances[:, label] = np.linalg.norm(triggered - clean[labels == label].mean(0), axis=1)
  rows = drawn(len(clean), seed)
  origin = clean[rows].mean(0)
  _, _, components = np.linalg.svd(clean[rows] - origin, full_matrices=False)
  axes = np.zeros((2, clean.shape[1]))
  axes[:len(components[:2])] = components[:2]                     # a single row has only one component
  first = clean[labels == labels.min()].mean(0) - origin
  axes *= np.where(axes @ first > 0, -1, 1)[:, None]      # signs are arbitrary; the lowest class goes to the lower left
  return Picture((clean[rows] - origin) @ axes.T, (triggered - origin) @ axes.T, distances)


def nearer_target(distances: np.ndarray, labels: np.ndarray, target: int) -> float | None:
  """Fraction of triggered rows of other classes that are nearer to the target class's mean than to their own class's.

  Rows whose own class has no clean rows do not count.

  Args:
    distances: [M, C], see Picture.
    labels: [M] int, the rows' true classes.
    target: the target label.
  Returns:
    None if no row is left, or if the target class has no clean rows.
  """
  own = distances[np.arange(len(labels)), labels]
  rows = np.flatnonzero((labels != target) & ~np.isnan(own))
  if not len(rows) or np.isnan(distances[rows, target]).any():
    return None
  return float((distances[rows, target] < own[rows]).mean())


def to_json(pictures: dict[str, Picture], clean_labels: np.ndarray, rows: Sequence[int], labels: np.ndarray,
            target: int, trigger: str, seed: int, found: bool = False) -> dict[str, Any]:
  """The contents of features.json, which the report draws.

  Args:
    pictures: {NAME of models/NAME: Picture}.
    clean_labels: [N] int, classes of the clean rows.
    rows: indices of the triggered rows that have the trigger to show.
    labels: [M] int, true classes of the triggered rows.
    target: the trigger's target label.
    trigger: the inserted string; the attack's name if the attack inserts no string.
    seed: the run's seed.
    found: whether the search found the string. Such a string need not be a trigger.
  """
  others = np.array([row for row in rows if labels[row] != target], int)
  shown = others[drawn(len(others), seed)]
  clean_labels = clean_labels[drawn(len(clean_labels), seed)]
  return {"target": target, "trigger": trigger, "found": found, "models": {
      name: {"clean": _points(own.clean, clean_labels), "triggered": _points(own.triggered[shown], labels[shown]),
             "nearer_target": nearer_target(own.distances[others], labels[others], target)}
      for name, own in pictures.items()}}


def _points(points, labels):
  return [[round(float(x), 4), round(float(y), 4), int(label)] for (x, y), label in zip(points, labels)]
