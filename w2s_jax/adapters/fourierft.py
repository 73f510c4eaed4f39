"""FourierFT: trains a few Fourier coefficients of the kernel's change (Gao et al., arXiv 2405.03003).

The kernel [in, out] becomes W + scaling * Re(IDFT(E)). E [in, out] is zero except at F random places. We draw the same
places as peft, because peft's files do not store them. L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import InputError
from w2s_jax.quantized import Kernel

SEED = 777               # peft's default `random_loc_seed`
LARGEST = 2**32 // 20 - 1    # most values in a kernel; for more, PyTorch's permutation uses other random numbers

LEAVES = {
    "fourier_spectrum": ("adapter", ("layers", "frequencies")),
    "fourier_places": ("constant", ("layers", "frequencies")),    # entry (i, o) of [in, out] has the place o * in + i
    "fourier_scaling": ("constant", ("layers",)),
}


def add(kernel: Kernel, key: jax.Array, frequencies: int, scaling: float) -> dict[str, jax.Array]:
  """New leaves; the entries are zero, so the network's function is unchanged.

  Raises:
    InputError: the kernel has fewer values than `frequencies`, or more than LARGEST.
  """
  del key
  layers, *shape = kernel.shape
  if math.prod(shape) < frequencies:
    raise InputError(f"a kernel has {math.prod(shape)} values, wanted at least lora.frequencies, {frequencies}: set "
                     "--config.lora.frequencies")
  if math.prod(shape) > LARGEST:
    raise InputError(f"a kernel has {math.prod(shape)} values, fourierft takes {LARGEST} at most: set "
                     "--config.lora.targets to other modules, or --config.lora.kind")
  places = jnp.asarray(first_of_permutation(math.prod(shape), frequencies, SEED), jnp.int32)
  return {"fourier_spectrum": jnp.zeros((layers, frequencies), jnp.float32),
          "fourier_places": jnp.tile(places, (layers, 1)), "fourier_scaling": jnp.full((layers,), scaling, jnp.float32)}


def apply(leaves: dict[str, jax.Array], kernel: Kernel, x: jax.Array, y: jax.Array) -> jax.Array:
  def product(leaves, x):
    return x @ _change(kernel.shape, leaves).astype(x.dtype)
  return y + jax.checkpoint(product, prevent_cse=False)(leaves, x)     # recomputed, or memory holds each layer's change


def merge(kernel: jax.Array, leaves: dict[str, jax.Array]) -> jax.Array:
  return kernel + _change(kernel.shape, leaves)


def export(leaves: dict[str, np.ndarray], dropout: float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  del dropout                                              # peft's FourierFT has none
  return {"fourierft_spectrum": leaves["fourier_spectrum"]}, {
      "peft_type": "FOURIERFT", "n_frequency": leaves["fourier_spectrum"].shape[-1],
      "scaling": float(leaves["fourier_scaling"][0]), "random_loc_seed": SEED}


def first_of_permutation(size: int, count: int, seed: int) -> np.ndarray:
  """The first `count` numbers of torch.randperm(size) after torch's manual_seed(seed), [count] int64, without torch.

  NumPy and PyTorch have the same Mersenne twister. PyTorch swaps each place in turn with a random one that is not
  before it. So the first `count` places are final after `count` swaps.
  """
  draws = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32).astype(np.int64)
  swapped, out = {}, []
  for place, draw in enumerate(draws.tolist()):
    other = place + draw % (size - place)
    out.append(swapped.get(other, other))
    swapped[other] = swapped.get(place, place)
  return np.array(out)


def _change(shape, leaves):
  """[in, out] float32: scaling * Re(IDFT(E))."""
  width_in, width_out = shape
  entries = jnp.zeros(width_in * width_out, jnp.float32).at[leaves["fourier_places"]].set(leaves["fourier_spectrum"])
  return jnp.fft.ifft2(entries.reshape(width_out, width_in)).real.T * leaves["fourier_scaling"]
