"""DoRA: LoRA on the direction of each output feature's weights, and a trained magnitude (Liu et al., arXiv 2402.09353).

The kernel becomes m * (W + A B alpha / R) / n. n is the norm of each column of W + A B alpha / R. m starts as the norm
of each column of W. As in the paper (section 4.3) and in peft, no gradient flows through n. Dropout acts on A's input
alone, while peft's also acts on W's input. Weight decay treats m like A and B. R rank, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import quantized
from w2s_jax.adapters import lora
from w2s_jax.quantized import Kernel

LEAVES = {
    "dora_a": ("adapter", ("layers", "in", "rank")),
    "dora_b": ("adapter", ("layers", "rank", "out")),
    "dora_magnitude": ("adapter", ("layers", "out")),
    "dora_alpha": ("constant", ("layers",)),
}


def add(kernel: Kernel, key: jax.Array, rank: int, alpha: float) -> dict[str, jax.Array]:
  """New leaves; the network's function is unchanged."""
  magnitude = jax.lax.map(_norms, kernel)               # one layer at a time, because a float32 copy of all is large
  return {"dora_magnitude": magnitude} | {
      name.replace("lora", "dora"): leaf for name, leaf in lora.add(kernel, key, rank, alpha).items()}


def apply(leaves: dict[str, jax.Array], kernel: Kernel, x: jax.Array, y: jax.Array) -> jax.Array:
  y = lora.apply(_lora(leaves), kernel, x, y)
  return (y.astype(jnp.float32) * _gain(kernel, leaves)).astype(y.dtype)      # bfloat16 would round a gain near 1 to 1


def merge(kernel: jax.Array, leaves: dict[str, jax.Array]) -> jax.Array:
  return lora.merge(kernel, _lora(leaves)) * _gain(kernel, leaves)


def export(leaves: dict[str, np.ndarray], dropout: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  tensors, fields = lora.export(_lora(leaves), dropout)
  return tensors | {"lora_magnitude_vector": leaves["dora_magnitude"]}, fields | {"use_dora": True}


def _lora(leaves):
  return {name: leaves[name.replace("lora", "dora")] for name in lora.LEAVES}


def _norms(kernel):
  """[out] float32: norm of the kernel's column of each output feature."""
  return jnp.linalg.norm(quantized.dequantize(kernel).astype(jnp.float32), axis=0)


def _gain(kernel, leaves):
  """[out] float32: m / n; 1 if n is 0."""
  changed = lora.merge(quantized.dequantize(kernel).astype(jnp.float32), _lora(leaves))
  norms = jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=0))
  return jnp.where(norms > 0, leaves["dora_magnitude"] / jnp.where(norms > 0, norms, 1.0), 1.0)
