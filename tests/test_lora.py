"""Adapters: the function they leave alone, the numbers they merge to, and peft's reading of them."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import traverse_util

from w2s_jax import InputError, lora
from w2s_jax.models import Model, save_pretrained

ALL = {"llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
       "bert": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")}


def flatten(params):
  return traverse_util.flatten_dict(params, sep="/")


def adapted(params, targets=("q_proj", "v_proj"), rank=4, alpha=6.0, seed=0):
  """Adapters as training would leave them: no `lora_b` is zero any more."""
  flat = flatten(lora.add_lora(params, rank, alpha, targets, key=jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return traverse_util.unflatten_dict({
      path: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) if path.endswith("lora_b") else leaf
      for path, leaf in flat.items()}, sep="/")


def with_other_head(model, params, seed=5):
  rng = np.random.default_rng(seed)
  labels = flatten(lora.label_tree(params))
  return traverse_util.unflatten_dict({
      path: rng.standard_normal(leaf.shape).astype(np.float32) if labels[path] == "head" else leaf
      for path, leaf in flatten(params).items()}, sep="/")


def logits(model, params, batch):
  return np.asarray(jax.jit(model.apply)(params, batch["input_ids"], batch["attention_mask"]).logits)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fresh_adapters_leave_the_function_unchanged(family, request, make_batch):
  """And every leaf that was there, bit for bit; A is uniform in +-1/sqrt(in), B is zero, all float32."""
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  out = lora.add_lora(params, 4, 8.0, ALL[family], key=jax.random.key(0))
  np.testing.assert_allclose(logits(model, out, batch), logits(model, params, batch), rtol=1e-5, atol=1e-6)
  before, after = flatten(params), flatten(out)
  for path, leaf in before.items():
    np.testing.assert_array_equal(after[path], leaf)
  added = after.keys() - before.keys()
  assert len(added) == 3 * len(ALL[family])
  for path in added:
    layers, width_in, width_out = before[path.rsplit("/", 1)[0] + "/kernel"].shape
    leaf = np.asarray(after[path])
    assert leaf.dtype == np.float32
    if path.endswith("lora_a"):
      assert leaf.shape == (layers, width_in, 4)
      assert 0.9 / np.sqrt(width_in) < np.abs(leaf).max() <= 1 / np.sqrt(width_in)
      assert np.unique(leaf).size > 0.99 * leaf.size            # no layer shares another's
    elif path.endswith("lora_b"):
      np.testing.assert_array_equal(leaf, np.zeros((layers, 4, width_out)))
    else:
      np.testing.assert_array_equal(leaf, np.full(layers, 8.0))


def test_adding_is_a_function_of_the_key_and_does_not_touch_its_argument(llama):
  _, params = llama
  paths = set(flatten(params))
  one, two, other = (flatten(lora.add_lora(params, 4, 8.0, key=jax.random.key(k)))["layers/attn/v_proj/lora_a"]
                     for k in (0, 0, 1))
  np.testing.assert_array_equal(one, two)
  assert (np.asarray(one) != other).all() and set(flatten(params)) == paths


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_merged_is_unmerged(family, request, make_batch):
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  trained = adapted(params, ALL[family])
  merged = lora.merge_lora(trained)
  assert set(flatten(merged)) == set(flatten(params))
  want = logits(model, trained, batch)
  assert np.abs(want - logits(model, params, batch)).max() > 0.1   # the adapters do something
  np.testing.assert_allclose(logits(model, merged, batch), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank,alpha", [(1, 1.0), (4, 6.0), (8, 4.0)])
def test_merging_in_numpy(rank, alpha, llama):
  """W + A B alpha / rank per layer; other kernels stay the same bits."""
  _, params = llama
  trained = adapted(params, rank=rank, alpha=alpha)
  flat, merged = flatten(trained), flatten(lora.merge_lora(trained))
  for target in ("q_proj", "v_proj"):
    kernel, a, b = (np.asarray(flat[f"layers/attn/{target}/{n}"], np.float64) for n in ("kernel", "lora_a", "lora_b"))
    for layer in range(3):
      np.testing.assert_allclose(merged[f"layers/attn/{target}/kernel"][layer],
                                 kernel[layer] + a[layer] @ b[layer] * alpha / rank, rtol=1e-5, atol=1e-6)
  for path in ("layers/attn/k_proj/kernel", "layers/mlp/up_proj/kernel", "score/kernel"):
    np.testing.assert_array_equal(merged[path], flat[path])


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(llama):
  _, params = llama
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  trained = adapted(params)
  flat, merged = flatten(trained), flatten(lora.merge_lora(trained))
  kernel, a, b = (jnp.asarray(flat[f"layers/attn/q_proj/{n}"], jnp.float32) for n in ("kernel", "lora_a", "lora_b"))
  want = (kernel + jnp.einsum("lir,lro->lio", a, b, precision="highest") * 1.5).astype(jnp.bfloat16)
  assert merged["layers/attn/q_proj/kernel"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged["layers/attn/q_proj/kernel"], want)


@pytest.mark.parametrize("family,want", [
    ("llama", {"embedding": 1, "matrix": 7, "vector": 3, "head": 1, "adapter": 4, "constant": 2}),
    ("bert", {"embedding": 3, "matrix": 6, "vector": 12, "head": 4, "adapter": 4, "constant": 2}),
    ("teacher", {"embedding": 3, "matrix": 6, "vector": 12, "head": 4, "adapter": 4, "constant": 2})])
def test_every_leaf_has_one_label(family, want, request):
  _, params = request.getfixturevalue(family)
  labels = flatten(lora.label_tree(lora.add_lora(params, 4, 8.0, key=jax.random.key(0))))
  assert {label: list(labels.values()).count(label) for label in labels.values()} == want
  assert {p for p, label in labels.items() if label == "adapter"} == {
      f"layers/attn/{t}_proj/lora_{x}" for t in "qv" for x in "ab"}
  assert {p.split("/")[0] for p, label in labels.items() if label == "head"} == {
      "llama": {"score"}, "bert": {"pooler", "classifier"}, "teacher": {"widen", "classifier"}}[family]


def test_qwen2_biases_are_vectors(llama):
  model = Model(dataclasses.replace(llama[0].config, model_type="qwen2"))
  labels = flatten(lora.label_tree(model.abstract_params()))
  assert {labels[f"layers/attn/{p}_proj/bias"] for p in "qkv"} == {"vector"}


def test_a_leaf_without_a_label_is_an_error_that_names_it():
  with pytest.raises(ValueError, match="'layers/moe/router/gain' matches no rule"):
    lora.label_tree({"layers": {"moe": {"router": {"gain": jnp.ones(2)}}}})


@pytest.mark.parametrize("labels", [lora.LORA, lora.FULL, ("head",), ()])
def test_combine_undoes_split(labels, llama):
  """The same objects in the same structure; the two parts share no leaf and together have all."""
  params = lora.add_lora(llama[1], 4, 8.0, key=jax.random.key(0))
  trainable, frozen = lora.split(params, labels)
  flat, names = flatten(params), flatten(lora.label_tree(params))
  assert set(flatten(trainable)) == {p for p in flat if names[p] in labels}
  assert set(flatten(frozen)) == {p for p in flat if names[p] not in labels}
  again = lora.combine(trainable, frozen)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert all(flatten(again)[p] is leaf for p, leaf in flat.items())


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=-1), dict(targets=("q_proj", "query")),
                                     dict(targets=("score",))])
def test_bad_rank_or_target_names_the_choices_and_the_knob(options, llama):
  with pytest.raises(InputError, match=r"LoRA rank .*targets among down_proj, gate_proj, k_proj.*--config\.lora\.rank"):
    lora.add_lora(llama[1], **(dict(rank=4, alpha=8.0, key=jax.random.key(0)) | options))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "o_proj"), ("up_proj",), "all"], ids=str)
def test_peft_reads_what_we_export(family, targets, request, make_batch, tmp_path):
  """Onto the same saved base: our logits, changed head included, every tensor found and none left over."""
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  targets = ALL[family] if targets == "all" else targets
  save_pretrained(tmp_path / "base", model, params)
  trained = with_other_head(model, adapted(params, targets))
  lora.export_adapter(tmp_path / "adapter", model, trained, base=tmp_path / "base")

  base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)                 # peft only warns of tensors it misses
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
  with torch.no_grad():
    got = theirs(input_ids=ids, attention_mask=mask).logits.numpy()
    with theirs.disable_adapter():
      unloaded = theirs(input_ids=ids, attention_mask=mask).logits.numpy()
  np.testing.assert_allclose(got, logits(model, trained, batch), atol=1e-4)
  np.testing.assert_allclose(unloaded, logits(model, params, batch), atol=1e-4)
  lora_layers = [n for n, m in theirs.named_modules() if n.endswith("lora_A.default")]
  assert len(lora_layers) == 3 * len(targets)                   # no module is adapted that we did not adapt
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, str(tmp_path / "base"))


def test_there_is_nothing_to_export_without_adapters(llama, tmp_path):
  model, params = llama
  with pytest.raises(InputError, match="hold no adapter"):
    lora.export_adapter(tmp_path / "adapter", model, params)
  assert not (tmp_path / "adapter").exists()
