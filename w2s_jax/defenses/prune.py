"""Magnitude pruning of the layers' kernels (Han et al., arXiv 1506.02626); nothing trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax.config import field
from w2s_jax.defenses.records import Suspect


@dataclasses.dataclass
class Settings:
  """`config.defense.prune`."""
  fraction: float = field(0.3, "fraction of each layer's kernel to set to zero, smallest magnitudes first", low=0.0,
                          high=1.0, source="ours; not tuned")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The suspect's parameters with the smallest values of each kernel [L, in, out] set to zero, layer by layer."""
  flat = traverse_util.flatten_dict(suspect.params, sep="/")
  pruned = {path: jax.lax.map(lambda kernel: _smallest_to_zero(kernel, settings.prune.fraction), leaf)
            if path.startswith("layers/") and path.endswith("/kernel") else leaf for path, leaf in flat.items()}
  return [traverse_util.unflatten_dict(pruned, sep="/")] * len(runs)


def _smallest_to_zero(kernel, fraction):
  order = jnp.argsort(jnp.abs(kernel.astype(jnp.float32)).ravel())
  return kernel.ravel().at[order[:round(fraction * order.size)]].set(0).reshape(kernel.shape)
