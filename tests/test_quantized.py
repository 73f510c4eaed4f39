"""A base of 8 or 4 bits: its rounding error, and that training over it is training over its rounded values."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from benchmarks import step as step_benchmark
from w2s_jax import InputError, lora, quantized, sharding
from w2s_jax.adapters import trees
from w2s_jax.models import Model, load_pretrained, save_pretrained

pytest.importorskip("qwix", reason="pip install qwix", exc_type=Exception)
NAMES = list(quantized.BITS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
  """(directory, model, params) of a Llama whose layers have 128 and 256 input features."""
  model = step_benchmark.student("1m")
  model = Model(dataclasses.replace(model.config, num_layers=2, vocab_size=128, intermediate_size=256))
  params = model.init(jax.random.key(0))
  directory = tmp_path_factory.mktemp("wide") / "model"
  save_pretrained(directory, model, params)
  return directory, model, params


def plain(params):
  return jax.tree.map(quantized.dequantize, params, is_leaf=quantized.is_quantized)


@pytest.mark.parametrize("name,step", [("int8", 1 / 127.5), ("int4", 1 / 7.5), ("nf4", 0.31)])
def test_a_value_is_off_by_half_a_step_of_its_scale_at_most(name, step):
  """The step is relative to the largest value with the same scale. With 4 bits a scale covers 64 input features."""
  kernel = np.random.default_rng(0).standard_normal((2, 128, 48)).astype(np.float32)
  out = np.asarray(quantized.dequantize(quantized.quantize(jnp.asarray(kernel), name)))
  tiles = kernel.reshape(2, -1, 128 if name == "int8" else 64, 48)
  bound = np.abs(tiles).max(axis=2, keepdims=True) * step / 2
  errors = np.abs(out.reshape(tiles.shape) - tiles)
  assert (errors <= bound * 1.001).all() and errors.max() > 0.25 * bound.min()


@pytest.mark.parametrize("name,share", [("int8", 0.26), ("int4", 0.15), ("nf4", 0.15)])
def test_kernels_take_their_bits(name, share, wide):
  """They take about a quarter or an eighth of float32, with one float32 scale for each column of a tile."""
  kernels = [x for p, x in traverse_util.flatten_dict(wide[2], sep="/").items() if quantized.is_layer_kernel(p)]
  small = jax.tree.leaves([quantized.quantize(x, name) for x in kernels])
  bits = sum(x.size * jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else x.size * 32 for x in small)
  assert bits < share * sum(x.size * 32 for x in kernels)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_is_quantized_after_loading(name, wide):
  directory, model, params = wide
  _, loaded = load_pretrained(directory, quantize=name)
  jax.tree.map(np.testing.assert_array_equal, loaded, quantized.quantize_layers(params, name))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("name", NAMES)
def test_step_and_gradient_are_those_over_the_values_it_stands_for(name, remat, wide, make_batch):
  """Loss and gradients of adapters and head are the same over the quantized base and over its values in float32."""
  from tests.test_steps import w2s_loss
  _, model, params = wide
  model = Model(dataclasses.replace(model.config, remat=remat))
  small = lora.add_lora(quantized.quantize_layers(params, name), 4, 8.0, ("all-linear",), key=jax.random.key(1))
  small = jax.tree.map(lambda x: x + 0.01 if x.ndim == 3 and x.shape[1] == 4 else x, small)   # lora_b: not zero
  batch = make_batch(model)
  loss = jax.jit(jax.value_and_grad(w2s_loss(model), has_aux=True))
  for got, want in zip(*(jax.tree.leaves(loss(*trees.split(p, trees.LORA), batch, None))
                         for p in (small, plain(small)))):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_the_backward_pass_keeps_no_float32_kernels(wide, make_batch):
  """The compiled backward pass over int8 has less temporary memory than half of the kernels in float32."""
  from tests.test_steps import w2s_loss
  _, model, params = wide
  model = Model(dataclasses.replace(model.config, num_layers=16))
  abstract = jax.eval_shape(lambda k: lora.add_lora(quantized.quantize_layers(model.init(k), "int8"), 4, 8.0, key=k),
                            jax.random.key(0))
  kernels = sum(x.size * 4 for p, x in traverse_util.flatten_dict(model.abstract_params(), sep="/").items()
                if quantized.is_layer_kernel(p))
  grad = jax.jit(jax.grad(w2s_loss(model), has_aux=True))
  compiled = grad.lower(*trees.split(abstract, trees.LORA), make_batch(model, rows=2, tokens=8), None).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < kernels / 2


@pytest.mark.parametrize("name", NAMES)
def test_merged_is_what_was_trained(name, wide, make_batch):
  """The merged model has the dtype of the base and the logits that base and adapter gave, and can be saved."""
  _, model, params = wide
  small = lora.add_lora(quantized.quantize_layers(params, name), 4, 8.0, key=jax.random.key(1))
  small = jax.tree.map(lambda x: x + 0.05 if x.ndim == 3 and x.shape[1] == 4 else x, small)
  merged = lora.merge_lora(small)
  batch = make_batch(model)
  want = model.apply(small, batch["input_ids"], batch["segment_ids"]).logits
  got = model.apply(merged, batch["input_ids"], batch["segment_ids"]).logits
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_scales_lie_where_their_kernels_lie(wide):
  """On a 2 x 2 x 2 mesh values and scales are sharded alike, except a dimension of a single scale."""
  mesh = sharding.make_mesh(2, 2, 2)
  flat = traverse_util.flatten_dict(load_pretrained(wide[0], mesh=mesh, quantize="int4")[1], sep="/")
  kernel = flat["layers/mlp/up_proj/kernel"]                                         # [L, 128, 256], in / 64 = 2 scales
  assert kernel.qvalue.sharding.shard_shape(kernel.qvalue.shape) == (2, 64, 128)
  assert kernel.scale.sharding.shard_shape(kernel.scale.shape) == (2, 1, 128)
  flat = traverse_util.flatten_dict(load_pretrained(wide[0], mesh=mesh, quantize="int8")[1], sep="/")
  assert flat["layers/mlp/up_proj/kernel"].scale.sharding.shard_shape((2, 1, 256)) == (2, 1, 128)


def test_features_that_no_tile_divides_are_refused():
  with pytest.raises(InputError, match=re.escape("a layer has 96 input features, int4 wants a multiple of 64")):
    quantized.quantize(jnp.ones((1, 96, 8)), "int4")


def test_an_unknown_width_of_the_base_is_refused():
  with pytest.raises(InputError, match="lora.quantize 'int3': want one of int8, int4, nf4"):
    quantized.check("int3")
