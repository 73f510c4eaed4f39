"""Pruning of the layers' kernels: sets a share of the weights to zero. Nothing trains.

By magnitude (Han et al., arXiv 1506.02626), the smallest weights of each kernel are pruned. By Wanda (Sun et al., arXiv
2306.11695), a weight's magnitude is multiplied by the L2 norm of the input that it reads. In each output the weights
with the smallest products are pruned. The paper takes the norms from texts of a language model's training data,
and prunes layer after layer. We take all norms from clean rows in the unpruned model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import quantized, sharding
from w2s_jax.config import field
from w2s_jax.data import streams
from w2s_jax.defenses.records import Suspect
from w2s_jax.models import Model, inputs
from w2s_jax.training import inference


@dataclasses.dataclass
class Settings:
  """Pruning: a share of the weights is set to zero."""
  fraction: float = field(0.3, "fraction of the weights to set to zero, in each kernel or, with wanda, in each output",
                          low=0.0, high=1.0, source="ours; not tuned")
  by: str = field("magnitude", "how weights are compared: by magnitude, or, with wanda, by magnitude times the norm of "
                  "their input", among=("magnitude", "wanda"))
  rows: int = field(128, "largest number of clean rows that wanda takes the norms from", low=1, unit="rows",
                    source="the number of texts in the paper")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The suspect's parameters with the smallest weights of each kernel, or of each output by wanda, set to zero."""
  own = settings.prune
  norms = input_norms(suspect, own.rows) if own.by == "wanda" else {}
  def by_magnitude(kernel):
    return _smallest_to_zero(kernel.reshape(-1, 1), 1, own.fraction).reshape(kernel.shape)
  def by_wanda(kernel_and_norms):
    kernel, norms = kernel_and_norms
    return _smallest_to_zero(kernel, norms[:, None], own.fraction)
  def pruned(path, leaf):
    if not quantized.is_layer_kernel(path):
      return leaf
    return jax.lax.map(by_wanda, (leaf, norms[path])) if norms else jax.lax.map(by_magnitude, leaf)
  params = traverse_util.path_aware_map(lambda path, leaf: pruned("/".join(path), leaf), suspect.params)
  return [params] * len(runs)


def input_norms(suspect: Suspect, rows: int) -> dict[str, jax.Array]:
  """{path of a kernel in the layers: [L, in] float32}, the L2 norm of each input feature over random clean rows.

  rows: largest number of these rows.
  """
  mesh = suspect.place.mesh
  chosen = streams.rng(0, "wanda").permutation(len(suspect.train))[:rows]      # a file may be sorted by label
  arrays = suspect.encode([suspect.train[i] for i in chosen])
  sums = [_squares(suspect.model, mesh, suspect.params, **batch) for _, batch in inference.packed_batches(
      suspect.model, arrays, mesh, **suspect.place.eval_shapes())]
  return jax.tree.map(lambda *parts: jnp.sqrt(sum(parts)), *sums)


def _smallest_to_zero(kernel, factors, fraction):
  """`kernel` [N, M] with the given fraction of each column set to zero, where magnitude times `factors` is smallest."""
  order = jnp.argsort(jnp.abs(kernel.astype(jnp.float32)) * factors, axis=0)
  return jnp.put_along_axis(kernel, order[:round(fraction * len(order))], 0, axis=0, inplace=False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(model: Model, mesh: jax.sharding.Mesh, params: dict, **batch: jax.Array) -> dict[str, jax.Array]:
  with sharding.on(mesh):
    return inputs.squares(model, params, **batch)
