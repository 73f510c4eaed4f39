"""Kernels rounded to 8 or 4 bits, compared with PyTorch's fake quantization and with values by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from ml_collections import ConfigDict

from w2s_jax import InputError, config, quantized
from w2s_jax.defenses import Suspect, quantize


def rounded(params, bits):
  suspect = Suspect(None, params, *[None] * 9)
  return quantize.weights(suspect, ConfigDict({"quantize": {"bits": bits}}), {"quantize": 0})[0]


def one(kernel, bits):
  """The kernel [in, out] of a network of one layer, rounded."""
  params = {"layers": {"up": {"kernel": jnp.asarray(kernel)[None]}}}
  return np.asarray(rounded(params, bits)["layers"]["up"]["kernel"][0])


def fake_quantized(kernel, largest):
  """PyTorch's rounding of a kernel [in, out], with one step size per output and integers up to `largest`."""
  steps = torch.from_numpy(np.abs(kernel).max(axis=0) / largest)
  zeros = torch.zeros(kernel.shape[1], dtype=torch.int32)
  return torch.fake_quantize_per_channel_affine(torch.from_numpy(kernel), steps, zeros, 1, -largest, largest).numpy()


def test_eight_bits_are_pytorchs_of_each_output():
  kernel = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32) * np.float32([1, 2, 3, 1, 1e-3, 9])
  np.testing.assert_allclose(one(kernel, 8), fake_quantized(kernel, 127), rtol=1e-6)


@pytest.mark.parametrize("size", [100, 128, 300])
def test_four_bits_are_pytorchs_of_each_group_of_128_inputs(size):
  """Of 300 inputs the last group has 44."""
  kernel = np.random.default_rng(0).standard_normal((size, 6)).astype(np.float32)
  wanted = [fake_quantized(kernel[first:first + 128], 7) for first in range(0, size, 128)]
  np.testing.assert_allclose(one(kernel, 4), np.concatenate(wanted), rtol=1e-6)


def test_values_by_hand():
  """With 8 bits the step sizes are 1 and 2, and zeros have none. With 4 bits the step is 1, as the largest is 7."""
  kernel = np.float32([[127, -254, 0], [-3.4, 4.9, 0], [0.6, 0.9, 0]])
  np.testing.assert_array_equal(one(kernel, 8), [[127, -254, 0], [-3, 4, 0], [1, 0, 0]])
  np.testing.assert_array_equal(one(np.float32([[7], [-3.4], [0.6]]), 4), [[7], [-3], [1]])


def test_only_the_layers_kernels_change_and_dtypes_stay(llama):
  params = llama[1]
  before = traverse_util.flatten_dict(params, sep="/")
  after = traverse_util.flatten_dict(rounded(params, 4), sep="/")
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert changed == {path for path in before if quantized.is_layer_kernel(path)}
  kernel = np.random.default_rng(0).standard_normal((40, 3)).astype(jnp.bfloat16)
  assert one(kernel, 8).dtype == jnp.bfloat16


def test_layers_are_rounded_separately():
  kernel = np.random.default_rng(0).standard_normal((2, 40, 3)).astype(np.float32) * np.float32([1, 50])[:, None, None]
  both = rounded({"layers": {"up": {"kernel": jnp.asarray(kernel)}}}, 4)["layers"]["up"]["kernel"]
  np.testing.assert_array_equal(both, [one(kernel[0], 4), one(kernel[1], 4)])


def test_other_numbers_of_bits_are_refused():
  with pytest.raises(InputError, match=r"defense.quantize.bits is 5, wanted 4 or 8: set --config.defense.quantize"):
    config.check(quantize.Settings, config.section(quantize.Settings, bits=5), "defense.quantize")
