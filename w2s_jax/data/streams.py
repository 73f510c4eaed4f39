"""Random numbers on the host by name: each purpose has a stream of its own, whatever else is drawn."""

import zlib

import numpy as np


def rng(seed: int, name: str, *numbers: int) -> np.random.Generator:
  """The generator of a named stream; `numbers` (an epoch, a row's id) tell its parts apart."""
  key = (zlib.crc32(name.encode()), *numbers)
  return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
