"""The training step: what it moves, what it costs, and that devices and compilation change nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from rig import WEIGHTS, alone, keys, make_program, one_run, w2s_loss

from benchmarks import step as step_benchmark
from w2s_jax import lora, sharding
from w2s_jax.adapters import trees
from w2s_jax.models import Model
from w2s_jax.training import steps


def flatten(params):
  return traverse_util.flatten_dict(params, sep="/")


def single_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def prepare(model, params, trains, mesh, num_steps=50):
  """(program, state, frozen) of W2S on a mesh."""
  params = jax.device_put(params, sharding.param_shardings(params, model.shardings, mesh))
  trainable, frozen = trees.split(params, trains)
  program = make_program(model, trainable, frozen, mesh, num_steps, clip_norm=1.0)
  return program, program.init([trainable]), frozen


def with_adapters(params, rank=8):
  return lora.add_lora(params, rank, float(rank), key=jax.random.key(0))


def run(program, state, frozen, batches, mesh):
  """(losses, state) after one step on each host batch."""
  losses = []
  for batch in batches:
    state, metrics = program.step(state, frozen, sharding.global_batch(one_run(batch), mesh, 1), keys(7))
    losses.append(float(metrics["loss"][0]))
  return losses, state


@pytest.mark.parametrize("family,dtype", [("llama", "float32"), ("llama", "bfloat16"), ("bert", "float32")])
def test_frozen_leaves_stay_bit_identical_and_adapters_and_head_move(family, dtype, request, make_batch):
  """In a hundred LoRA steps the loss falls. Frozen leaves keep their bits, and every adapter and head leaf changes."""
  model, params = request.getfixturevalue(family)
  model = Model(dataclasses.replace(model.config, dtype=dtype))
  params = with_adapters(jax.tree.map(lambda x: jnp.asarray(x, dtype), params))
  params = trees.combine(jax.tree.map(lambda x: x.astype(jnp.float32), trees.split(params, trees.LORA)[0]), params)
  before = {path: np.array(leaf) for path, leaf in flatten(params).items()}
  mesh = single_device()
  program, state, frozen = prepare(model, params, trees.LORA, mesh, num_steps=100)
  batch = make_batch(model)
  losses, state = run(program, state, frozen, [batch] * 100, mesh)
  state = alone(state)
  assert losses[-1] < 0.7 * losses[0] and int(state.step) == 100
  after, labels = flatten(trees.combine(state.params, frozen)), flatten(trees.label_tree(params))
  assert after.keys() == before.keys()
  for path, leaf in after.items():
    assert leaf.dtype == before[path].dtype
    if labels[path] in trees.LORA:
      assert (np.asarray(leaf) != before[path]).mean() > 0.9, path
    else:
      np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), before[path].view(np.uint8), err_msg=path)


@pytest.mark.parametrize("family,head", [
    ("llama", {"score/kernel"}), ("bert", {"pooler/kernel", "pooler/bias", "classifier/kernel", "classifier/bias"})])
def test_optimizer_state_is_for_adapters_and_head_only(family, head, request):
  """It has two moments of each trained leaf and scalar counters, and nothing for frozen leaves."""
  model, params = request.getfixturevalue(family)
  params = with_adapters(params)
  _, state, _ = prepare(model, params, trees.LORA, single_device())
  state = alone(state)
  trained = head | {f"layers/attn/{t}_proj/lora_{x}" for t in "qv" for x in "ab"}
  shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
  moments = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
    keys = re.findall(r"\['(\w+)'\]", text := jax.tree_util.keystr(path))
    if leaf.shape == ():
      assert "count" in text
      continue
    name = "/".join(keys[1:])                                   # keys[0] is the partition's label
    assert re.search(r"\.(mu|nu)\[", text) and leaf.shape == shapes[name] and leaf.dtype == jnp.float32
    moments.append(name)
  assert sorted(moments) == sorted(2 * list(trained))
  assert set(flatten(state.params)) == trained


def step_flops(config, rank):
  """The compiler's count for one W2S step of 32 rows of 32 tokens; nothing is allocated."""
  return step_benchmark.lowered(Model(config), rank, 32, 32, single_device()).compile().cost_analysis()["flops"]


def test_a_lora_step_costs_at_most_70_percent_of_full_fine_tuning(llama):
  """Rank 8 on q and v. Layers are unrolled, because XLA counts the body of a loop once, however often it runs."""
  config = dataclasses.replace(llama[0].config, hidden_size=256, intermediate_size=688, head_dim=64, num_layers=2,
                               unroll=True)
  adapters, full = step_flops(config, 8), step_flops(config, 0)
  # All layers count: forward, backward to inputs and backward to kernels, each with 2 FLOPs per weight and token.
  kernels = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 688)
  assert full > 3 * 2 * kernels * 32 * 32
  assert adapters / full <= 0.70


@pytest.fixture(scope="module")
def twenty_steps(llama, make_batch):
  """twenty_steps(mesh) -> (losses, state) of distillation steps on the same twenty batches."""
  model, params = llama
  batches = [make_batch(model, seed=s) for s in range(20)]
  def run_on(mesh):
    return run(*prepare(model, with_adapters(params), trees.LORA, mesh, num_steps=20), batches, mesh)
  return run_on


@pytest.fixture(scope="module")
def on_one_device(twenty_steps):
  return twenty_steps(single_device())


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_eight_devices_give_the_losses_of_one(sizes, twenty_steps, on_one_device):
  """Twenty losses agree within 1e-5 on meshes along data, along fsdp, along tensor, and along all three."""
  want, want_state = on_one_device
  losses, state = twenty_steps(sharding.make_mesh(*sizes))
  assert want[-1] < want[0]
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  for (path, leaf), w in zip(flatten(state.params).items(), flatten(want_state.params).values()):
    assert len(leaf.sharding.device_set) == 8
    np.testing.assert_allclose(leaf, w, rtol=1e-3, atol=2e-5, err_msg=path)


def test_optimizer_moments_lie_where_their_parameters_lie(llama):
  _, state, _ = prepare(llama[0], with_adapters(llama[1]), trees.LORA, sharding.make_mesh(2, 2, 2))
  places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.params)}
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
  assert len(moments) == 2 * len(jax.tree.leaves(state.params))
  for leaf in moments:
    assert leaf.sharding.is_equivalent_to(places[leaf.shape], leaf.ndim)


def test_the_step_compiles_once_per_shape(llama, make_batch):
  model, params = llama
  mesh = sharding.make_mesh()
  program, state, frozen = prepare(model, with_adapters(params), trees.LORA, mesh)
  sizes = []
  for tokens in (12, 12, 16, 12, 16, 12):
    _, state = run(program, state, frozen, [make_batch(model, tokens=tokens, seed=len(sizes))], mesh)
    sizes.append(program.step._cache_size())
  assert sizes == [1, 1, 2, 2, 2, 2]


def test_metrics_are_the_terms_their_weighted_sum_and_the_gradient_norm(llama, make_batch):
  """The state is donated, so the caller keeps its parameters only because `init` copies them."""
  model, params = llama
  params, mesh, batch = with_adapters(params), single_device(), make_batch(llama[0])
  program, state, frozen = prepare(model, params, trees.LORA, mesh)
  trainable, _ = trees.split(params, trees.LORA)
  whole = jax.jit(jax.value_and_grad(lambda p: w2s_loss(model)(p, frozen, batch, jax.random.key(7))[0]))
  value, gradient = whole(trainable)
  new, metrics = program.step(state, frozen, sharding.global_batch(one_run(batch), mesh, 1), keys(7))
  metrics = alone(metrics)
  assert set(metrics) == {"loss", "ce", "kd", "fa", "grad_norm"}
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], sum(w * metrics[k] for k, w in WEIGHTS.items()), rtol=1e-6)
  norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params)) and int(new.step[0]) == 1
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_term_norms_by_hand(llama, make_batch):
  """With the head alone trained: d(ce)/d(kernel) = features^T (softmax - onehot) / B, and fa does not reach it."""
  model, params = llama
  batch, mesh = make_batch(model), single_device()
  weights = {"ce": 5.0, "kd": 0.5, "fa": 0.1}
  trainable, frozen = trees.split(params, ("head",))
  program = make_program(model, trainable, frozen, mesh, weights=weights)
  norms = alone(program.term_norms(program.init([trainable]), frozen, one_run(batch), keys(7)))
  out = model.apply(params, batch["input_ids"], batch["segment_ids"])
  def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  student, teacher = np.asarray(out.logits, np.float64), batch["teacher_logits"].astype(np.float64)
  features = np.asarray(out.features, np.float64)
  ce = features.T @ (softmax(student) - np.eye(2)[batch["label"]]) / 8
  kd = 2.0 * features.T @ (softmax(student / 2) - softmax(teacher / 2)) / 8      # T^2 / T
  assert set(norms) == {"grad_norm/ce", "grad_norm/kd", "grad_norm/fa"}
  np.testing.assert_allclose(norms["grad_norm/ce"], 5.0 * np.linalg.norm(ce), rtol=1e-4)
  np.testing.assert_allclose(norms["grad_norm/kd"], 0.5 * np.linalg.norm(kd), rtol=1e-4)
  assert norms["grad_norm/fa"] == 0.0


def test_language_model_loss_in_numpy(llama, make_batch):
  """Mean next-token cross entropy over real tokens of real rows, through the tied embedding."""
  model, params = llama
  batch = make_batch(model)
  batch["weight"][-1] = 0.0
  value, terms = steps.language_model_loss(model)(*trees.split(params, trees.FULL), batch, jax.random.key(0))
  hidden = np.asarray(model.apply(params, batch["input_ids"], batch["segment_ids"]).hidden, np.float64)
  logits = hidden @ np.asarray(params["embed_tokens"]["embedding"], np.float64).T
  nats = [np.log(np.exp(logits[b, t]).sum()) - logits[b, t, batch["input_ids"][b, t + 1]]
          for b in range(7) for t in range(11) if batch["segment_ids"][b, t + 1]]
  np.testing.assert_allclose(value, np.mean(nats), rtol=1e-5)
  assert terms["lm"] == value


def test_language_model_loss_of_packed_rows_by_hand(llama):
  """Only pairs of neighbouring tokens in one text count, so the pair 3 -> 7 between two texts of a row does not."""
  model, params = llama
  batch = {"input_ids": np.array([[5, 9, 3, 7, 2, 0], [8, 6, 0, 0, 0, 0]], np.int32),
           "segment_ids": np.array([[1, 1, 1, 4, 4, 0], [1, 1, 0, 0, 0, 0]], np.int32),
           "texts": np.array([[[0, 2], [3, 4], [6, 7], [0, 0]]], np.int32), "weight": np.float32([1, 1, 1, 0])}
  value, _ = steps.language_model_loss(model)(*trees.split(params, trees.FULL), batch, jax.random.key(0))
  nats = []
  for text in ([5, 9, 3], [7, 2], [8, 6]):
    hidden = model.apply(params, np.array([text]), np.ones((1, len(text)), int)).hidden[0]
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embed_tokens"]["embedding"], np.float64).T
    nats += [np.log(np.exp(logits[t]).sum()) - logits[t, text[t + 1]] for t in range(len(text) - 1)]
  assert len(nats) == 4
  np.testing.assert_allclose(value, np.mean(nats), rtol=1e-5)


def test_steps_past_the_count_leave_the_state_alone(llama, make_batch):
  """With five batches and a count of three, the state is that after three calls of the step."""
  model, params = llama
  mesh = single_device()
  program, state, frozen = prepare(model, with_adapters(params), trees.LORA, mesh)
  host = [make_batch(model, seed=i) for i in range(5)]
  _, want = run(program, jax.tree.map(jnp.copy, state), frozen, host[:3], mesh)
  batches = {k: np.stack([b[k] for b in host])[:, None] for k in host[0]}
  got, metrics = program.steps(state, frozen, sharding.global_batch(batches, mesh, 2), keys(7), 3)
  assert int(got.step[0]) == 3 and metrics["loss"].shape == (5, 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), got, want)
