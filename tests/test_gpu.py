"""What only a GPU can show. Run JAX_PLATFORMS=cuda,cpu pytest -n 0 tests/test_gpu.py."""

import dataclasses

import jax
import numpy as np
import pytest
import rig
from test_packing import LENGTHS, WEIGHTS, arrays_for

from w2s_jax import lora, sharding
from w2s_jax.adapters import trees
from w2s_jax.data import batches, packing
from w2s_jax.defenses import w2s
from w2s_jax.models import Model, layers
from w2s_jax.training import steps

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def error(got, want):
  """Norm of the difference of two trees over the second's norm."""
  got, want = (np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(tree)]) for tree in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("layout", ["padded", "padded left", "packed", "with an empty row"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_cudnns_attention_is_xlas(family, layout, request, monkeypatch):
  """In bfloat16 the error of cuDNN's loss and adapter gradients against float32 is less than twice that of XLA's."""
  model, params = request.getfixturevalue(family)
  targets = ("c_attn",) if family == "gpt2" else ("q_proj", "k_proj", "v_proj")
  params = lora.add_lora(params, 4, 4.0, targets, key=jax.random.key(1))
  trainable, frozen = trees.split(jax.tree.map(lambda x: x + 0.05, params), trees.LORA)
  arrays = arrays_for(model.config, LENGTHS, 12)
  if layout.startswith("padded"):
    batch = batches.make_batch(arrays, np.arange(10), 10, (12,))
    if layout == "padded left":
      batch |= {name: batch[name][:, ::-1] for name in ("input_ids", "segment_ids")}
  else:
    batch = packing.pack_batch(arrays, np.arange(10), 10, 12, [5 + (layout != "packed")], 1, 0)
    assert batch["segment_ids"].any(axis=1).all() == (layout == "packed")

  def gradient(dtype):
    of = Model(dataclasses.replace(model.config, dtype=dtype))
    loss = steps.weighted_loss(of, rig.terms(w2s.terms), WEIGHTS)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(trainable, frozen, batch, None).compile()
    (value, _), grads = compiled(trainable, frozen, batch, None)
    return (value, grads), "fmha" in compiled.as_text()

  with jax.default_matmul_precision("float32"):
    exact, fused = gradient("float32")
  assert not fused
  cudnn, fused = gradient("bfloat16")
  assert fused
  monkeypatch.setattr(layers, "attention_kernel", lambda q: "xla")
  xla, fused = gradient("bfloat16")
  assert not fused and error(xla, exact) < 0.05 and error(cudnn, exact) < 2 * error(xla, exact)


@pytest.fixture(scope="module")
def setup(llama):
  """(config, trainable, frozen) of a Llama with adapters of rank 4."""
  model, params = llama
  return model.config, *trees.split(lora.add_lora(params, 4, 4.0, key=jax.random.key(1)), trees.LORA)


def stage(config, trainable, frozen, device, runs=1):
  """(program, state, frozen, mesh) of W2S on one device."""
  mesh = sharding.make_mesh(devices=[device])
  program = rig.make_program(Model(config), trainable, frozen, mesh, 10, weights=WEIGHTS, runs=runs, learning_rate=1e-1)
  state = program.init([jax.device_put(trainable, device)] * runs)
  return program, state, jax.device_put(frozen, sharding.param_shardings(frozen, Model(config).shardings, mesh)), mesh


def test_two_runs_at_once_in_bfloat16(setup, make_batch):
  """Losses and gradient norms of three steps are within 5% of those of each run alone."""
  config, trainable, frozen = setup
  config = dataclasses.replace(config, dtype="bfloat16")
  of_each, keys = [make_batch(Model(config), seed=seed) for seed in (0, 1)], jax.random.split(jax.random.key(0), 2)
  def metrics(batch, keys, runs):
    program, state, placed, mesh = stage(config, trainable, frozen, jax.devices()[0], runs)
    batch, out = sharding.global_batch(batch, mesh, 1), []
    for _ in range(3):
      state, seen = program.step(state, placed, batch, keys)
      out.append([seen["loss"], seen["grad_norm"]])
    return np.array(out)
  alone = np.concatenate([metrics(rig.one_run(batch), keys[i:i + 1], 1) for i, batch in enumerate(of_each)], axis=-1)
  together = metrics(jax.tree.map(lambda *x: np.stack(x), *of_each), keys, 2)
  assert abs(alone[..., 0] - alone[..., 1]).max() > 0.1
  np.testing.assert_allclose(together, alone, rtol=0.05)


def test_steps_are_the_cpus(setup, make_batch):
  """Ten float32 steps: losses within 1e-4, relative."""
  config, trainable, frozen = setup
  def losses(device):
    with jax.default_device(device):
      program, state, placed, mesh = stage(config, trainable, frozen, device)
      batch, out = sharding.global_batch(rig.one_run(make_batch(Model(config))), mesh, 1), []
      for _ in range(10):
        state, metrics = program.step(state, placed, batch, rig.keys(0))
        out.append(float(metrics["loss"][0]))
    return np.array(out)

  with jax.default_matmul_precision("float32"):
    on_gpu, on_cpu = losses(jax.devices("gpu")[0]), losses(jax.devices("cpu")[0])
  assert on_cpu[-1] != pytest.approx(on_cpu[0], rel=0.1)
  np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)
