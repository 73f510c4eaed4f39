"""Fine-mixing (Zhang et al., arXiv 2210.09545): replaces random weights by the public base's, then fine-tunes all.

Each weight stays the suspect's with the probability `kept`, which the paper calls rho. The fine-tuning repairs the task
on clean rows. We fine-tune as `full_ft` does, so the two differ in the mixing alone. We leave out the paper's E-PUR,
which purifies word embeddings by how far they moved from the base, relative to the word's frequency.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.config import field
from w2s_jax.defenses import base, full_ft
from w2s_jax.defenses.records import Suspect
from w2s_jax.training import stage


@dataclasses.dataclass
class Settings:
  """Fine-mixing: random weights are replaced by the public base's."""
  kept: float = field(0.5, "fraction of the suspect's weights that stay, chosen at random; the head stays whole",
                      low=0.0, high=1.0, source="ours; not tuned; the paper chooses it on clean rows")


def start(suspect: Suspect, settings: Any, params: dict, arrays: dict, seed: int) -> tuple[dict, dict]:
  """(the suspect's parameters with random weights of the base, the unchanged arrays). Each seed draws other weights."""
  def mix(ours, public):
    leaves, tree = jax.tree.flatten(ours)
    keys = tree.unflatten(jax.random.split(stage.stream_key(seed, "fine_mix"), len(leaves)))
    def mix_leaf(key, ours, public):
      return jnp.where(jax.random.bernoulli(key, settings.fine_mix.kept, ours.shape), ours, public)
    return jax.tree.map(mix_leaf, keys, ours, public)
  return base.mixed(suspect._replace(params=params), mix), arrays


RECIPE = full_ft.CONTROL._replace(augment=start)
