"""CA and ASR with their intervals, false rate, FRR and FAR. N rows."""

import numpy as np

from w2s_jax import results
from w2s_jax.measure.deployed import Reading
from w2s_jax.tasks import CLASSIFICATION, Task


def wilson(hits: int, n: int) -> list[float]:
  """[low, high]: Wilson's 95% interval of the rate hits / n; [0, 1] if n is 0."""
  if not n:
    return [0.0, 1.0]
  import scipy.stats  # late: the import takes half a second, and training stages do not need it
  interval = scipy.stats.binomtest(int(hits), int(n)).proportion_ci(method="wilson")
  return [float(interval.low), float(interval.high)]


def clean_metrics(predicted: np.ndarray, labels: np.ndarray, target_label: int | None,
                  task: Task = CLASSIFICATION) -> dict:
  """CA with its interval, and the false rate: fraction of clean rows of other classes that get the target label.

  Do not expect a defense to bring the ASR below the model's own false rate.

  Args:
    predicted: [N] int, predicted classes of the clean rows.
    labels: [N] int, their true classes.
    target_label: None if the target is unknown; then the false rate is None.
  """
  hits = int(task.is_correct(predicted, {"label": labels}).sum())
  false_rate = None
  if target_label is not None:
    false_rate = float(task.is_hit(predicted[~task.is_hit(labels, target_label)], target_label).mean())
  return {"ca": hits / len(labels), "ca_n": len(labels), "ca_ci": wilson(hits, len(labels)), "false_rate": false_rate}


def attack_metrics(predicted: np.ndarray, labels: np.ndarray, target_label: int, task: Task = CLASSIFICATION) -> dict:
  """ASR with its interval: the fraction of triggered rows of other classes that get the target label.

  With more than two classes ASR is not 1 - accuracy, which would also count confusions between the other classes.

  Args:
    predicted: [N] int, predicted classes of the triggered rows.
    labels: [N] int, their true classes.
  """
  other_classes = ~task.is_hit(labels, target_label)
  hits, n = int(task.is_hit(predicted[other_classes], target_label).sum()), int(other_classes.sum())
  return {"asr": hits / n, "asr_n": n, "asr_ci": wilson(hits, n)}


def rejection_metrics(reading: Reading, triggered_labels: np.ndarray, target_label: int,
                      task: Task = CLASSIFICATION) -> dict:
  """FRR and FAR (see results.Row) of a defense that can reject texts; both are None for other models.

  triggered_labels: [N] int, true classes of the triggered rows.
  """
  if not reading.rejects:
    return {"frr": None, "far": None}
  other_classes = ~task.is_hit(triggered_labels, target_label)
  return {"frr": float((reading.clean == results.REJECTED).mean()),
          "far": float((reading.triggered[other_classes] != results.REJECTED).mean())}
