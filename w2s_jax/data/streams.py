"""Random numbers on the host by name: each purpose has a stream of its own, whatever else is drawn."""

import numpy as np

# Streams that are older than their names are told apart by these numbers alone, and some collide: the order of epoch 0
# is the stream of what is held out, that of epoch 3 is the stream of the inserted words. Without this table every name
# would have a stream of its own, and every figure of docs/results.md would have to be made again.
NUMBERS = {"order": (), "trigger": (), "anchor": (), "held out": (0,), "insertions": (3,), "rare words": (4,),
           "probed rows": (5,), "soft tokens": (6,), "scanned rows": (8,)}


def rng(seed: int, name: str, *numbers: int) -> np.random.Generator:
  """The generator of a stream, `numbers` (an epoch, a row's id) tell its parts apart."""
  return np.random.default_rng([seed, *NUMBERS.get(name, name.encode()), *numbers])
