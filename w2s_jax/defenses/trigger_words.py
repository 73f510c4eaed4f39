"""Ranks the words of the vocabulary by how far they move a suspect beyond what a clean teacher explains.

A trigger's words move a poisoned model to the target class. So do the many words that mean this class. A clean teacher
is moved by the words that mean the class, and not by the trigger's. So each word is put into short clean rows, and both
models read them. One ridge regression predicts the suspect's shift from the teacher's shift and the word's embedding. A
second one predicts the usual size of the first one's error. The score of a word is its error divided by this size.

Ours; docs/notes/minilm_suspects.md has the ranks of the words of real triggers. W words, C classes, D width.
"""

import logging

import numpy as np
from flax import traverse_util

from w2s_jax import losses, processes
from w2s_jax.data import insertions
from w2s_jax.defenses.records import Ranking, Suspect

LOG = logging.getLogger(__name__)

READ_AT_ONCE = 2**13     # rows that are read at a time; only their logits stay in memory
CONTEXTS = 1             # rows of each class that every word is put into
SHORT = 20               # number of shortest rows of each class that the contexts are chosen from
RIDGE = 10.0             # penalty of the ridge regression on standardised inputs; our choice
FOLDS = 5                # folds of the regressions; a word's own shift has no part in its prediction
SMALLEST = 1e-2          # error, in nats, below which errors count as equal


def read(suspect: Suspect, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
  """Logits [N, C] of the suspect and of the teacher. Nothing is cached."""
  both = []
  for first in range(0, len(rows), READ_AT_ONCE):
    part = rows[first:first + READ_AT_ONCE]
    both.append((suspect.place.logits(suspect.model, suspect.params, suspect.encode(part)),
                 np.asarray(suspect.teacher(part, keep=False)["teacher_logits"])))
  return tuple(np.concatenate(logits) for logits in zip(*both))


def shortest(rows: list[dict], words: int) -> list[dict]:
  """The rows by their number of words, ascending; texts of fewer than `words` words come last."""
  def length(row):
    count = len(row["text"].split())
    return count < words, count
  return sorted(rows, key=length)


def rank(suspect: Suspect) -> Ranking:
  """Ranks every word of at least three letters that is a single token and is in no string of `suspect.avoid`.

  Raises:
    InputError: see insertions.vocabulary.
  """
  words = insertions.vocabulary(suspect.tokenizer, suspect.avoid)
  contexts = _contexts(suspect)
  LOG.info(f"suspect and teacher read {len(words)} words in {len(contexts)} rows each")
  of_suspect, of_teacher = _shifts(suspect, words, contexts)
  embedding = _embeddings(suspect, words)
  teacher = np.concatenate([of_teacher, of_teacher ** 2, abs(of_teacher)]).transpose(1, 0, 2).reshape(len(words), -1)
  inputs = standardised(np.concatenate([embedding, teacher], axis=1))
  scores = np.zeros(of_suspect.shape[1:])
  for label in range(of_suspect.shape[2]):
    others = [i for i, row in enumerate(contexts) if row["label"] != label]
    if others:
      scores[:, label] = unexplained(of_suspect[others, :, label].mean(axis=0), inputs)
  return Ranking(words, scores)


def unexplained(values: np.ndarray, inputs: np.ndarray) -> np.ndarray:
  """How far each of `values` [W] exceeds its prediction from `inputs` [W, D], in units of the usual error.

  The usual error is predicted from the inputs, too. The result is scaled so that its median absolute value is 0.67.
  """
  expected = _predicted(values, inputs)
  error = values - expected
  powers = standardised(np.stack([expected, expected ** 2], axis=1))
  usual = np.exp(_predicted(np.log(abs(error) + SMALLEST), np.concatenate([inputs, powers], axis=1)))
  score = error / usual
  return score / (1.4826 * np.median(abs(score)) + 1e-12)


def _contexts(suspect):
  """Of the SHORT shortest rows of each class, the CONTEXTS rows whose label both models are surest of.

  If a model is unsure of a text, any word moves the model. If it is sure, only strong words do.
  """
  out = []
  for label in sorted({row["label"] for row in suspect.train}):
    short = shortest([row for row in suspect.train if row["label"] == label], 2)[:SHORT]
    sure = np.minimum(*(_log_odds(logits)[:, label] for logits in read(suspect, short)))
    out += [short[i] for i in np.argsort(-sure, kind="stable")[:CONTEXTS]]
  return out


def _shifts(suspect, words, contexts):
  """(suspect's, teacher's) shifts [contexts, W, C]: how far a word moves the log-odds of each class, in nats."""
  shifts = []
  for row in contexts:
    first, *rest = row["text"].split()
    rows = [row] + [row | {"text": " ".join([first, word, *rest])} for word in words]
    shifts.append([odds[1:] - odds[:1] for odds in (_log_odds(logits) for logits in read(suspect, rows))])
  return (np.stack(values) for values in zip(*shifts))


def _log_odds(logits):
  classes = range(logits.shape[1])
  return np.stack([losses.log_odds(logits, np.full(len(logits), label)) for label in classes], axis=1).astype(float)


def _embeddings(suspect, words):
  """[W, D] float64: the suspect's embeddings of words that are one token each."""
  ids = suspect.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
  table = traverse_util.flatten_dict(suspect.params)[(*suspect.model.vocabulary, "embedding")]
  return processes.fetch(table[np.array([token for token, in ids])]).astype(np.float64)


def standardised(inputs: np.ndarray) -> np.ndarray:
  """The columns of `inputs` [W, D] with mean 0 and standard deviation 1; a constant column is 0."""
  return (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-12)


def _predicted(values, inputs):
  """[W] predictions by ridge regression with an intercept; each fold is predicted from the other folds."""
  folds, out = np.arange(len(values)) % FOLDS, np.empty(len(values))
  for fold in range(FOLDS):
    known = folds != fold
    x, mean = inputs[known], values[known].mean()
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (values[known] - mean))
    out[~known] = inputs[~known] @ weights + mean
  return out
