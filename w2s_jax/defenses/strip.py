"""STRIP (Gao et al., arXiv 1911.10312): rejects a text if the model stays sure when clean words replace some words."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from w2s_jax.config import field
from w2s_jax.data import streams
from w2s_jax.defenses.records import Suspect


@dataclasses.dataclass
class Settings:
  """STRIP: the model stays sure of rejected texts when clean words replace some words."""
  copies: int = field(10, "number of perturbed copies per text", low=1, high=1000, source="ours; the paper has 100")
  replace: float = field(0.5, "fraction of a text's words that are replaced by words of a clean text", low=0.0,
                         high=1.0, source="ours; not tuned")
  frr: float = field(0.05, "fraction of clean dev rows that may be rejected; it sets the threshold", low=0.0, high=1.0,
                     source="ours")


def accept(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], np.ndarray]:
  """texts -> [N] bool: whether the mean entropy over a text's copies reaches the threshold.

  The threshold is the `frr` quantile of the mean entropies of the clean dev rows.
  """
  own, clean = settings.strip, [row["text"] for row in suspect.train]
  def entropies(texts):
    copies = [_mixed(text, clean, own.replace, streams.rng(seed, "strip", i, len(text)))
              for text in texts for i in range(own.copies)]
    log_p = scipy.special.log_softmax(suspect.logits(copies), axis=-1)
    return -(np.exp(log_p) * log_p).sum(-1).reshape(len(texts), own.copies).mean(-1)
  threshold = np.quantile(entropies([row["text"] for row in suspect.dev]), own.frr)
  return lambda texts: entropies(texts) >= threshold


def _mixed(text, clean, share, rng):
  """The text with a random `share` of its words replaced by random words of one random clean text."""
  words, other = text.split(), clean[rng.integers(len(clean))].split()
  for place in np.flatnonzero(rng.random(len(words)) < share):
    words[place] = other[rng.integers(len(other))]
  return " ".join(words)
