"""Merges the suspect with a clean model that was fine-tuned from the same public base.

Lethe (Chen et al., arXiv 2508.21004) trains a clean model with LoRA on clean rows, merges the suspect with it, and adds
harmless facts to each prompt. We add nothing to texts. Our clean model is that of `from_base`; its head is merged, too.
In the released code each layer has its own share. Here all layers have the same share. `ties` is TIES-Merging (Yadav
et al., arXiv 2306.01708), which trims the changes of a whole model at once. We trim each tensor's changes separately.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from w2s_jax.adapters import attach
from w2s_jax.config import field
from w2s_jax.defenses import base, distill, from_base, merge
from w2s_jax.defenses.records import Suspect


@dataclasses.dataclass
class Settings:
  """Lethe: the suspect is merged with a clean model of the same public base."""
  method: str = field("slerp", "spherical or linear interpolation of each layer's tensors, or TIES-Merging",
                      among=("slerp", "linear", "ties"), source="both are in the released code; not tuned")
  share: float = field(0.5, "share of the clean model in slerp and linear; 0: the suspect, 1: the clean model", low=0.0,
                       high=1.0, source="equal shares; not tuned")
  density: float = field(0.5, "fraction of each tensor's changes that ties keeps, the largest ones", low=0.01,
                         high=1.0, source="the released code; 0.2 in the paper of TIES-Merging")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The suspect's parameters, merged with those of a clean model for each run {models/NAME: seed}."""
  own = settings.lethe
  model, public, tokenizer = suspect.base()
  base.check(suspect.model, suspect.tokenizer, model, tokenizer)
  of_base = suspect._replace(model=model, params=public, tokenizer=tokenizer)
  def mixed(ours, clean, public):
    out = ties(ours, clean, public, own.density) if own.method == "ties" else merge.METHODS[own.method](
        ours, clean, own.share)
    return out.astype(ours.dtype)
  mix = jax.jit(lambda *params: merge.by_tensor(mixed, *params),
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, suspect.params))
  return [mix(suspect.params, attach.merge(clean), public)
          for clean in distill.train(from_base.RECIPE, of_base, settings, runs)]


def ties(ours: jax.Array, clean: jax.Array, public: jax.Array, density: float) -> jax.Array:
  """The public tensor plus the merged changes of the two models, in float32.

  A fraction `density` of each model's changes stays, the largest ones. An entry gets the sign of both changes' sum.
  The merged change is the mean of the changes that have this sign.
  """
  public = public.astype(jnp.float32)
  changes = jnp.stack([_trimmed(tensor.astype(jnp.float32) - public, density) for tensor in (ours, clean)])
  agree = (jnp.sign(changes) == jnp.sign(changes.sum(axis=0))) & (changes != 0)
  return public + jnp.where(agree, changes, 0).sum(axis=0) / jnp.maximum(agree.sum(axis=0), 1)


def _trimmed(change, density):
  """`change` with zeros in place of all entries but its `density` largest ones."""
  return jnp.where(abs(change) >= jnp.quantile(abs(change), 1 - density), change, 0)
