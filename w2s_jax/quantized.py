"""A frozen base with kernels of 8 or 4 bits: qwix QArrays, which each matrix product dequantizes.

L layers. qwix is an optional dependency (w2s_jax[quantize]). It is imported only if a kernel is quantized.
"""

import re
from typing import Any

import jax
from flax import traverse_util

from w2s_jax import InputError

KERNEL = r"layers/.*/kernel"           # the quantized leaves, [L, in, out]; embeddings, norms, biases, heads stay float
TILE = 64                              # input features that share a scale in 4 bits (QLoRA, arXiv 2305.14314)
BITS = {"int8": 8, "int4": 4, "nf4": 4}
Kernel = Any                           # a jax.Array or a qwix QArray, whose type is missing if qwix is not installed


def check(name: str) -> None:
  """Raises InputError unless `name` is in BITS and qwix can be imported."""
  if name not in BITS:
    raise InputError(f"lora.quantize {name!r}: want one of {', '.join(BITS)}, or '' for none: set "
                     "--config.lora.quantize")
  try:
    import qwix  # noqa: F401
  except Exception as e:  # a new jax can break flax.nnx, which qwix imports, with other errors than ImportError
    raise InputError(f"lora.quantize={name} needs qwix ({str(e)[:100]}): pip install 'qwix>=0.1.8,<0.2', or "
                     "--config.lora.quantize=''") from e


def quantize(kernel: jax.Array, name: str) -> Kernel:
  """Quantizes a float kernel [L, in, out] to a QArray of the same shape. Its scales have the kernel's dtype.

  name: a key of BITS. int8 has one scale per layer and output feature. int4 and nf4 have one per layer, output feature
    and group of TILE input features.

  Raises:
    InputError: TILE does not divide the input features.
  """
  import qwix
  if BITS[name] == 8:
    return qwix.quantize(kernel, name, channelwise_axes=(0, 2))
  if kernel.shape[1] % TILE:
    raise InputError(f"a layer has {kernel.shape[1]} input features, {name} wants a multiple of {TILE}: set "
                     "--config.lora.quantize=int8")
  return qwix.quantize(kernel, name, channelwise_axes=(0, 2), tiled_axes={1: TILE})


def quantize_layers(params: dict, name: str) -> dict:
  """A new parameter tree with every layer kernel quantized; `name` is a key of BITS."""
  return traverse_util.path_aware_map(
      lambda path, leaf: quantize(leaf, name) if is_layer_kernel("/".join(path)) else leaf, params)


def is_quantized(kernel: Kernel) -> bool:
  return hasattr(kernel, "qvalue")


def dequantize(kernel: Kernel) -> jax.Array:
  """A QArray as an array in the dtype of its scales; any other kernel unchanged."""
  if not is_quantized(kernel):
    return kernel
  import qwix
  return qwix.dequantize(kernel)


def is_layer_kernel(path: str) -> bool:
  return re.fullmatch(KERNEL, path) is not None


def product(x: jax.Array, kernel: Kernel) -> jax.Array:
  """Product of x [..., in] and a kernel [in, out], in x's dtype. The backward pass dequantizes the kernel again."""
  def times(x, kernel):
    return x @ dequantize(kernel.astype(x.dtype))
  return (jax.checkpoint(times, prevent_cse=False) if is_quantized(kernel) else times)(x, kernel)
