"""PSIM: a copy of the suspect trains on random labels to its last step. Texts of which it stays sure are rejected."""

import json

import numpy as np
import pytest
import rig
import scipy.special
from ml_collections import ConfigDict

from w2s_jax.adapters import attach
from w2s_jax.defenses import distill, lora_ce, psim


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def settings(**values):
  out = ConfigDict(rig.DEFENSE.to_dict())
  out.psim.update(values)
  return out


def test_labels_are_random_and_texts_are_the_clean_ones(suspect):
  rows = psim.with_random_labels(suspect, 0)
  assert [row | {"label": None} for row in rows] == [row | {"label": None} for row in suspect.train]
  drawn, true = (np.array([row["label"] for row in side]) for side in (rows, suspect.train))
  assert 24 <= drawn.sum() <= 56 and 24 <= (drawn == true).sum() <= 56           # 40 on average, deviation 4.5
  assert rows == psim.with_random_labels(suspect, 0) != psim.with_random_labels(suspect, 1)


def test_a_text_of_which_the_copy_is_sure_is_rejected(suspect, monkeypatch):
  """The copy is the suspect itself here, so its probabilities are known."""
  trained = []
  def train(recipe, suspect, settings, runs):
    trained.append((recipe, suspect, runs))
    return [suspect.params]
  monkeypatch.setattr(distill, "train", train)
  texts = [row["text"] for row in suspect.dev]
  highest = scipy.special.softmax(suspect.logits(texts), axis=-1).max(-1)
  threshold = float(np.median(highest))
  np.testing.assert_array_equal(psim.accept(suspect, settings(threshold=threshold, epochs=3), 7)(texts),
                                highest <= threshold)
  assert psim.accept(suspect, settings(threshold=1.0), 7)(texts).all()
  assert not psim.accept(suspect, settings(threshold=0.4), 7)(texts).any()   # of two classes one has a half or more
  recipe, given, runs = trained[0]
  assert recipe is lora_ce.RECIPE and runs == {"psim_copy-seed7": 7}
  assert given.train == psim.with_random_labels(suspect, 7) and given.dev == []
  assert given.training.epochs == 3 and suspect.training.epochs == 16


def test_the_copy_trains_once_to_its_last_step(suspect):
  """Dev accuracy must not choose the checkpoint, because it would prefer a copy that has forgotten little."""
  own, file = settings(epochs=4), suspect.place.workdir / "metrics/psim_copy-seed0.jsonl"
  texts = [row["text"] for row in suspect.dev]
  first = psim.accept(suspect, own, 0)(texts)
  lines = file.read_text()
  steps = [json.loads(line) for line in lines.splitlines()]
  assert steps[-1]["step"] == 4 * 80 / 16 and not any("dev_accuracy" in step for step in steps)
  assert not attach.has_adapters(suspect.params)
  np.testing.assert_array_equal(psim.accept(suspect, own, 0)(texts), first)
  assert file.read_text() == lines
