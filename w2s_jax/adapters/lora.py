"""LoRA: y = x W + (dropout(x) A) B * alpha / R (Hu et al., arXiv 2106.09685). L layers, R rank."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.quantized import Kernel

LEAVES = {
    "lora_a": ("adapter", ("layers", "in", "rank")),
    "lora_b": ("adapter", ("layers", "rank", "out")),
    "lora_alpha": ("constant", ("layers",)),                  # a hyper-parameter, saved with its adapter
}


def add(kernel: Kernel, key: jax.Array, rank: int, alpha: float) -> dict[str, jax.Array]:
  """New leaves: A is uniform in +-1/sqrt(in), as in peft; B is zero, so the network's function is unchanged."""
  layers, width_in, width_out = kernel.shape
  bound = 1 / math.sqrt(width_in)
  return {"lora_a": jax.random.uniform(key, (layers, width_in, rank), jnp.float32, -bound, bound),
          "lora_b": jnp.zeros((layers, rank, width_out), jnp.float32),
          "lora_alpha": jnp.full((layers,), alpha, jnp.float32)}


def apply(leaves: dict[str, jax.Array], kernel: Kernel, x: jax.Array, y: jax.Array) -> jax.Array:
  del kernel
  return y + adapter_product(x, leaves["lora_a"], leaves["lora_b"]) * _scale(leaves).astype(x.dtype)


def merge(kernel: jax.Array, leaves: dict[str, jax.Array]) -> jax.Array:
  return kernel + jnp.matmul(leaves["lora_a"], leaves["lora_b"], precision="highest") * _scale(leaves)


def export(leaves: dict[str, np.ndarray], dropout: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  tensors = {f"{peft_name}.weight": np.swapaxes(leaves[leaf], 1, 2)
             for leaf, peft_name in (("lora_a", "lora_A"), ("lora_b", "lora_B"))}
  return tensors, {"peft_type": "LORA", "r": leaves["lora_a"].shape[-1], "lora_alpha": float(leaves["lora_alpha"][0]),
                   "lora_dropout": dropout}


def adapter_product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """x A B in x's dtype, [..., in] by [in, R] by [R, out], in the order that takes fewer multiplications."""
  tokens, (width_in, rank), width_out = math.prod(x.shape[:-1]), a.shape, b.shape[1]
  if (tokens + rank) * width_in * width_out < tokens * rank * (width_in + width_out):
    return x @ (a @ b).astype(x.dtype)
  return (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def _scale(leaves):
  return leaves["lora_alpha"] / leaves["lora_a"].shape[-1]
