"""Rounds the layers' kernels to 8 or 4 bits and back; nothing trains, and the result is an ordinary checkpoint.

A backdoor that needs small differences between weights should be lost. Each weight becomes the nearest multiple of a
step, as in the baseline that GPTQ calls RTN (Frantar et al., arXiv 2210.17323). How many weights share a step is our
choice. We do not use quantized.py, which keeps a frozen base in few bits. That file needs qwix, and its group size must
divide a kernel's inputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import InputError, quantized
from w2s_jax.config import field
from w2s_jax.defenses.records import Suspect

GROUP = 128              # input features that share a step in 4 bits, per output


@dataclasses.dataclass
class Settings:
  """Quantization: weights are rounded and read back."""
  bits: int = field(8, "8: the weights of an output share a step; 4: each 128 input features of an output share a step",
                    unit="bits", source="ours; not tuned")

  def __post_init__(self):
    if self.bits not in (4, 8):
      raise InputError(f"defense.quantize.bits is {self.bits}, wanted 4 or 8: set --config.defense.quantize.bits")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The suspect's parameters with each kernel [L, in, out] rounded, layer by layer."""
  def rounded(path, leaf):
    if not quantized.is_layer_kernel("/".join(path)):
      return leaf
    return jax.lax.map(lambda kernel: _round_trip(kernel, settings.quantize.bits), leaf)
  return [traverse_util.path_aware_map(rounded, suspect.params)] * len(runs)


def _round_trip(kernel, bits):
  """[in, out] -> the nearest multiples of a step. The largest magnitude of a group is 2^(bits - 1) - 1 steps."""
  size, width = kernel.shape
  rows = GROUP if bits == 4 else size
  groups = jnp.pad(kernel.astype(jnp.float32), ((0, -size % rows), (0, 0))).reshape(-1, rows, width)
  step = jnp.abs(groups).max(axis=1, keepdims=True) / (2**(bits - 1) - 1)
  out = jnp.round(groups / jnp.where(step > 0, step, 1)) * step
  return out.reshape(-1, width)[:size].astype(kernel.dtype)
