"""Named random streams on the host: draws from one stream never shift those of another."""

import zlib

import numpy as np


def rng(seed: int, name: str, *numbers: int) -> np.random.Generator:
  """The generator of a named stream; `numbers` (an epoch, a row's id) select a substream."""
  key = (zlib.crc32(name.encode()), *numbers)
  return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
