"""A model as a user gets it: loaded from its directory, with its defense's text filter and acceptance test."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from w2s_jax import results
from w2s_jax.adapters import attach
from w2s_jax.defenses import DEFENSES
from w2s_jax.measure import features, scan
from w2s_jax.measure.features import Picture
from w2s_jax.models import Model
from w2s_jax.training import inference


class Reading(NamedTuple):
  """The answers of one model.

  Attributes:
    clean: [N] int, predicted class of each clean test row; results.REJECTED if the defense rejects it.
    triggered: [M] int, predicted class, or results.REJECTED, of each row with a trigger.
    rejects: whether the defense can reject texts.
    scan: the scan's findings per class (measure/scan.py); [] if the model is not scanned.
    picture: projected features of the clean and of the triggered rows (measure/features.py); None without triggered
      rows.
  """
  clean: np.ndarray
  triggered: np.ndarray
  rejects: bool = False
  scan: list = []
  picture: Picture | None = None


class Deployed(NamedTuple):
  """A loaded model with the text filter and the acceptance test of its defense (defenses/records.py), if it has any."""
  model: Model
  params: dict
  tokenizer: Any
  text: Callable[[list[str]], list[str]] | None = None
  accept: Callable[[list[str]], np.ndarray] | None = None


def deploy(run: Any, name: str) -> Deployed:
  """Loads models/NAME, with the text filter and the acceptance test of its defense.

  If the defense makes no weights, the attacked model is loaded instead.
  """
  defense_name, seed = run.defended().get(name, (None, None))
  defense = DEFENSES.get(defense_name)
  has_weights = defense is None or defense.recipe or defense.weights
  if defense is None or not (defense.text or defense.accept):
    return Deployed(*run.load(name if has_weights else run.source.attacked))
  suspect, settings = run.suspect_of(run.load(name)) if has_weights else run.suspect(defense), run.config.defense
  return Deployed(*suspect[:3], *(bind and bind(suspect, settings, seed) for bind in (defense.text, defense.accept)))


def read(run: Any, name: str, triggered: list) -> Reading:
  """The answers of models/NAME to the clean test rows and to `triggered`, the rows with a trigger.

  Raises:
    FloatingPointError: a feature is not finite.
  """
  deployed = deploy(run, name)
  findings = []
  # The scan applies no filter and no acceptance test. It runs a model from hidden states, which virtual tokens forbid.
  unscannable = deployed.text or deployed.accept or attach.has_virtual_tokens(deployed.params)
  if "scan" in run.source.stages and not unscannable:
    findings = scan.reading(run, name, deployed[:3])
  clean, clean_features = _outputs(run, deployed, run.rows["test"])
  if not triggered:
    return Reading(clean, np.zeros(0, int), deployed.accept is not None, findings)
  turned, triggered_features = _outputs(run, deployed, triggered)
  if not (np.isfinite(clean_features).all() and np.isfinite(triggered_features).all()):
    raise FloatingPointError(f"models/{name} has features that are not finite: set --config.student.dtype=float32")
  c = run.config
  picture = features.picture(clean_features, run.labels("test"), triggered_features, c.data.num_labels, c.seed)
  return Reading(clean, turned, deployed.accept is not None, findings, picture)


def answers(run: Any, deployed: Deployed, rows: list) -> np.ndarray:
  """[N] int: predicted class of each row, or results.REJECTED."""
  return _outputs(run, deployed, rows)[0]


def _outputs(run, deployed, rows):
  """([N] int answers, [N, D] float32 features) of the rows. Rejected rows also have features."""
  if deployed.text:
    texts = deployed.text([row["text"] for row in rows])
    rows = [row | {"text": text} for row, text in zip(rows, texts)]
  arrays = run.encode(deployed.tokenizer, rows, run.config.data.max_length)
  logits, pooled = inference.outputs(deployed.model, deployed.params, arrays, run.mesh, **run.place.eval_shapes())
  predicted = run.task.predict(logits)
  if deployed.accept:
    predicted = np.where(deployed.accept([row["text"] for row in rows]), predicted, results.REJECTED)
  return predicted, pooled
