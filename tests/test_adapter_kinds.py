"""DoRA and FourierFT: peft's forward and gradients, merged kernels, quantized and sharded bases, a defense's run."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import rig
import torch
from flax import traverse_util
from test_lora import ALL, flatten, logits, torch_base, torch_logits, with_other_head, with_peft
from test_models import SHAPES, torch_model

from w2s_jax import InputError, adapters, config, lora, sharding
from w2s_jax.adapters import attach, fourierft, p_tuning, trees
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.models import load_pretrained, save_pretrained
from w2s_jax.training import stage

KINDS = ("dora", "fourierft")
GPT2 = ("c_attn", "c_proj", "c_fc")
FAMILIES = {"llama": ("gqa-untied-odd", ALL["llama"]), "gpt2": ("odd", GPT2), "bert": ("odd", ALL["bert"])}


def section(kind, targets=("all-linear",), **values):
  return config.section(config.Lora, **{"kind": kind, "targets": targets, "rank": 4, "alpha": 6.0, "frequencies": 50}
                        | values)


def fresh(params, kind, **values):
  return attach.add_configured(params, section(kind, **values), key=jax.random.key(0))


def moved(params):
  """The parameters, with every adapter leaf changed as training would change it."""
  rng = np.random.default_rng(3)
  def change(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path.endswith("_magnitude"):
      return leaf * (1 + 0.3 * noise)
    return leaf + 0.3 * noise
  return traverse_util.unflatten_dict({path: change(path, leaf) if trees.label(path) == "adapter" else leaf
                                       for path, leaf in flatten(params).items()}, sep="/")


def test_a_config_can_name_every_kind():
  declared = next(f for f in config.Lora.__dataclass_fields__.values() if f.name == "kind")
  assert declared.metadata["among"] == (*adapters.KINDS, p_tuning.KIND)
  names = {name for kind in adapters.KINDS.values() for name in kind.settings}
  assert names <= set(config.Lora.__dataclass_fields__)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_new_adapters_leave_the_function_unchanged(kind, family, request, make_batch):
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  start = fresh(params, kind)
  np.testing.assert_allclose(logits(model, start, batch), logits(model, params, batch), atol=2e-6)
  assert {trees.label(path) for path in flatten(start).keys() - flatten(params).keys()} == {"adapter", "constant"}
  changed = logits(model, moved(start), batch)
  assert np.abs(changed - logits(model, params, batch)).max() > 0.02
  merged = attach.merge(moved(start))
  assert flatten(merged).keys() == flatten(params).keys()
  np.testing.assert_allclose(logits(model, merged, batch), changed, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_peft_and_the_merged_model_agree(kind, family, make_batch, tmp_path):
  shape, targets = FAMILIES[family]
  torch_model(family, SHAPES[family][shape]).save_pretrained(tmp_path / "base")
  model, params = load_pretrained(tmp_path / "base")
  batch = make_batch(model)
  ids, mask = batch["input_ids"], batch["segment_ids"]
  trained = with_other_head(model, moved(fresh(params, kind, targets=targets)))
  lora.export_adapter(tmp_path / "adapter", model, trained, base=tmp_path / "base")
  save_pretrained(tmp_path / "merged", model, lora.merge_lora(trained))
  ours, theirs = logits(model, trained, batch), with_peft(torch_base(tmp_path / "base"), tmp_path / "adapter")
  assert np.abs(ours - torch_logits(torch_base(tmp_path / "base"), ids, mask)).max() > 0.1
  np.testing.assert_allclose(torch_logits(theirs, ids, mask), ours, atol=1e-4)
  np.testing.assert_allclose(torch_logits(torch_base(tmp_path / "merged"), ids, mask), ours, atol=1e-4)


def kernel_and_input():
  rng = np.random.default_rng(0)
  return (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (7, 6)))


@pytest.mark.parametrize("kind, method, options", [
    ("dora", "LoraConfig", {"r": 4, "lora_alpha": 6.0, "use_dora": True}),
    ("fourierft", "FourierFTConfig", {"n_frequency": 12, "scaling": 150.0, "init_weights": True})])
def test_gradients_are_pefts(kind, method, options):
  """The gradients of one layer agree with peft's. In DoRA no gradient flows through the norm."""
  kernel, x = kernel_and_input()
  net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
  net[0].weight.data = torch.tensor(kernel.T)
  net = peft.get_peft_model(net, getattr(peft, method)(target_modules=["0"], **options)).train()
  leaves = moved({"layers": {"m": jax.tree.map(jnp.asarray, adapters.KINDS[kind].add(
      kernel[None], jax.random.key(0), **{name: section(kind, frequencies=12)[name]
                                          for name in adapters.KINDS[kind].settings}))}})["layers"]["m"]
  tensors, _ = adapters.KINDS[kind].export({name: np.asarray(leaf) for name, leaf in leaves.items()}, 0.0)
  params = {name: p for name, p in net.named_parameters() if p.requires_grad}
  def theirs(name):
    found, = [p for path, p in params.items() if name.removesuffix(".weight") in path]
    return found
  for name, value in tensors.items():
    theirs(name).data = torch.tensor(np.ascontiguousarray(value[0]))
  (net(torch.tensor(x)) ** 3).sum().backward()
  def loss(leaves):
    return (adapters.KINDS[kind].apply({k: v[0] for k, v in leaves.items()}, jnp.asarray(kernel), x, x @ kernel)
            ** 3).sum()
  trained = {name: leaf for name, leaf in leaves.items() if adapters.KINDS[kind].leaves[name][0] == "adapter"}
  gradients = jax.grad(lambda trained: loss(leaves | trained))(trained)
  ours, _ = adapters.KINDS[kind].export(leaves | gradients, 0.0)
  assert len(ours) == len(params)
  for name, gradient in ours.items():
    np.testing.assert_allclose(gradient[0], theirs(name).grad.numpy(), rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("size", [60, 4096, 147456, 884736])
def test_places_are_those_that_pytorch_draws(size):
  for seed in (0, fourierft.SEED):
    want = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:50].numpy()
    np.testing.assert_array_equal(fourierft.first_of_permutation(size, 50, seed), want)


def test_a_whole_permutation_has_every_number_once():
  np.testing.assert_array_equal(np.sort(fourierft.first_of_permutation(60, 60, 1)), np.arange(60))


def test_a_kernel_with_fewer_values_than_entries_is_refused(llama):
  with pytest.raises(InputError, match="a kernel has 1024 values, wanted at least lora.frequencies, 1025: set"):
    fresh(llama[1], "fourierft", targets=("q_proj",), frequencies=1025)


def test_a_merged_dora_kernel_has_the_magnitude_as_its_norm():
  kernel, _ = kernel_and_input()
  leaves = {name: leaf[0] for name, leaf in adapters.KINDS["dora"].add(kernel[None], jax.random.key(1), 2, 4.0).items()}
  leaves |= {"dora_b": jnp.ones_like(leaves["dora_b"]), "dora_magnitude": jnp.arange(1.0, 6)}
  merged = adapters.KINDS["dora"].merge(kernel, leaves)
  np.testing.assert_allclose(np.linalg.norm(merged, axis=0), [1, 2, 3, 4, 5], rtol=1e-5)
  direction = kernel + 2 * np.asarray(leaves["dora_a"]) @ np.asarray(leaves["dora_b"])
  np.testing.assert_allclose(merged / np.linalg.norm(merged, axis=0), direction / np.linalg.norm(direction, axis=0),
                             rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_is_unsharded(kind, llama, make_batch):
  model, params = llama
  mesh, batch = sharding.make_mesh(2, 2, 2), make_batch(model)
  start = moved(fresh(params, kind))
  placed = jax.device_put(start, sharding.param_shardings(start, model.shardings, mesh))
  with sharding.on(mesh):
    np.testing.assert_allclose(logits(model, placed, batch), logits(model, start, batch), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_takes_them(kind, llama, make_batch):
  from w2s_jax import quantized
  model, params = llama
  batch, base = make_batch(model), quantized.quantize_layers(params, "int8")
  start = fresh(base, kind)
  np.testing.assert_allclose(logits(model, start, batch), logits(model, base, batch), atol=1e-5)
  trained = moved(start)
  np.testing.assert_allclose(logits(model, attach.merge(trained), batch), logits(model, trained, batch), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_defense_trains_them(kind, llama, tmp_path):
  """Two seeds train as one program. Both learn the task and leave the base unchanged, and their adapters differ."""
  suspect = rig.suspect(*llama, tmp_path)
  suspect = suspect._replace(lora=section(kind, frequencies=200, scaling=600.0))
  settings = rig.DEFENSE.copy_and_resolve_references()
  both = distill.train(lora_ce.RECIPE, suspect, settings, {"one": 0, "two": 1})
  for seed, params in enumerate(both):
    flat, start = flatten(params), flatten(attach.add_configured(suspect.params, suspect.lora,
                                                                 key=stage.stream_key(seed, "lora")))
    trained = {path for path, leaf in start.items() if (np.asarray(flat[path]) != np.asarray(leaf)).any()}
    assert trained == {path for path in start if trees.label(path) in ("head", "adapter")}
    dev = suspect.encode(suspect.dev)
    assert suspect.place.task.is_correct(suspect.place.answers(suspect.model, params, dev), dev).mean() > 0.85
  names = [path for path in flatten(both[0]) if path.endswith(("dora_b", "fourier_spectrum"))]
  assert names and all((np.asarray(flatten(both[0])[n]) != np.asarray(flatten(both[1])[n])).any() for n in names)
