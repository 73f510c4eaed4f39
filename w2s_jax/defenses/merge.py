"""Interpolates between the suspect's weights and those of its public base; nothing trains.

"Here's a Free Lunch" (Arora et al., arXiv 2402.19334) merges a suspect with other fine-tuned models, because one
backdoor is rarely in all of them. A defender often has the public base alone, so we merge with the base. It does not
know the task, so a larger share of it should cost accuracy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.config import field
from w2s_jax.defenses import base
from w2s_jax.defenses.records import Suspect

PARALLEL = 1e-6          # sine of the angle below which `slerp` interpolates linearly


@dataclasses.dataclass
class Settings:
  """Merging: the suspect's weights are interpolated with the public base's."""
  share: float = field(0.5, "share of the public base; 0: the suspect, 1: the base with the suspect's head", low=0.0,
                       high=1.0, source="equal shares, as in the paper; not tuned")
  method: str = field("linear", "linear interpolation, or slerp: spherical interpolation of each layer's tensors",
                      among=("linear", "slerp"), source="linear in the paper")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The suspect's parameters, mixed with the base's."""
  own = settings.merge
  def interpolate(ours, public):
    return METHODS[own.method](ours, public, own.share).astype(ours.dtype)
  return [base.mixed(suspect, lambda ours, public: by_tensor(interpolate, ours, public))] * len(runs)


def by_tensor(function: Callable[..., jax.Array], *params: dict) -> dict:
  """`function` of the trees' leaves, one tensor at a time. A leaf below "layers" is a stack of one tensor per layer."""
  def of_leaf(path, *leaves):
    return jax.lax.map(lambda parts: function(*parts), leaves) if path[0].key == "layers" else function(*leaves)
  return jax.tree_util.tree_map_with_path(of_leaf, *params)


def linear(start: jax.Array, end: jax.Array, share: float) -> jax.Array:
  """(1 - share) * start + share * end, in float32."""
  return (1 - share) * start.astype(jnp.float32) + share * end.astype(jnp.float32)


def slerp(start: jax.Array, end: jax.Array, share: float) -> jax.Array:
  """The point at `share` of the way from start to end on the arc between them (Shoemake, SIGGRAPH 1985), in float32.

  There is no such arc if the two are parallel or opposite, or if one is zero. Then the result is that of `linear`.
  """
  start, end = start.astype(jnp.float32), end.astype(jnp.float32)
  # a and b have equal length, so their sum and difference give the angle. An arc cosine is imprecise for small angles.
  a, b = start * jnp.linalg.norm(end.ravel()), end * jnp.linalg.norm(start.ravel())
  angle = 2 * jnp.arctan2(jnp.linalg.norm((a - b).ravel()), jnp.linalg.norm((a + b).ravel()))
  on_arc = (jnp.sin((1 - share) * angle) * start + jnp.sin(share * angle) * end) / jnp.sin(angle)
  return jnp.where(jnp.sin(angle) > PARALLEL, on_arc, linear(start, end, share))


METHODS = {"linear": linear, "slerp": slerp}
