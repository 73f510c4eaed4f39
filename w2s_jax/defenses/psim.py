"""PSIM (Zhao et al., arXiv 2402.12168): rejects a text if a copy trained on random labels is still sure of its class.

The copy trains through adapters on clean rows with random labels, and so becomes unsure of clean texts. No clean text
has the trigger, so the copy may stay sure of triggered texts. We use the shared trainer and its learning rate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from w2s_jax.config import field
from w2s_jax.data import streams
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.defenses.records import Suspect


@dataclasses.dataclass
class Settings:
  """PSIM: a copy trained on random labels is still sure of rejected texts."""
  threshold: float = field(0.7, "highest probability of a class that the copy may give to an accepted text", low=0.0,
                           high=1.0, source="the paper")
  epochs: int = field(1, "number of passes over the rows with random labels", low=1, high=1000,
                      source="published code")


def accept(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], np.ndarray]:
  """texts -> [N] bool: whether the copy gives no class a higher probability than the threshold.

  This function trains the copy. Its checkpoint stays in the workdir, and a second call resumes from it.
  """
  training = suspect.training.copy_and_resolve_references()
  training.epochs = settings.psim.epochs
  relabelled = suspect._replace(train=with_random_labels(suspect, seed), dev=[], training=training)
  params, = distill.train(lora_ce.RECIPE, relabelled, settings, {f"psim_copy-seed{seed}": seed})
  copy = suspect._replace(params=params)
  return lambda texts: scipy.special.softmax(copy.logits(texts), axis=-1).max(-1) <= settings.psim.threshold


def with_random_labels(suspect: Suspect, seed: int) -> list[dict]:
  """The clean training rows, each with a label drawn at random from all classes."""
  labels = streams.rng(seed, "psim").integers(suspect.model.config.num_labels, size=len(suspect.train))
  return [row | {"label": int(label)} for row, label in zip(suspect.train, labels)]
