"""LoRA: new adapters change no output, merging adds their product to the kernel, and peft reads what we export."""

import dataclasses
import itertools
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
from rig import alone, keys, make_program, one_run
from test_models import SHAPES, torch_model

from w2s_jax import InputError, lora, sharding
from w2s_jax.adapters import trees
from w2s_jax.adapters.lora import adapter_product
from w2s_jax.models import Model, load_pretrained, save_pretrained
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import steps

ALL = {"llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
       "bert": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")}


def flatten(params):
  return traverse_util.flatten_dict(params, sep="/")


def adapted(params, targets=("q_proj", "v_proj"), rank=4, alpha=6.0, seed=0):
  """The parameters with adapters as after training, so no `lora_b` is zero."""
  flat = flatten(lora.add_lora(params, rank, alpha, targets, key=jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return traverse_util.unflatten_dict({
      path: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) if path.endswith("lora_b") else leaf
      for path, leaf in flat.items()}, sep="/")


def with_other_head(model, params, seed=5):
  rng = np.random.default_rng(seed)
  labels = flatten(trees.label_tree(params))
  return traverse_util.unflatten_dict({
      path: rng.standard_normal(leaf.shape).astype(np.float32) if labels[path] == "head" else leaf
      for path, leaf in flatten(params).items()}, sep="/")


def logits(model, params, batch):
  return np.asarray(jax.jit(model.apply)(params, batch["input_ids"], batch["segment_ids"]).logits)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fresh_adapters_leave_the_function_unchanged(family, request, make_batch):
  """All other leaves stay the same bits. A is uniform in +-1/sqrt(in), B is zero, and both are float32."""
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
      assert np.unique(leaf).size > 0.99 * leaf.size            # each layer has its own values
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
  labels = flatten(trees.label_tree(lora.add_lora(params, 4, 8.0, key=jax.random.key(0))))
  assert {label: list(labels.values()).count(label) for label in labels.values()} == want
  assert {p for p, label in labels.items() if label == "adapter"} == {
      f"layers/attn/{t}_proj/lora_{x}" for t in "qv" for x in "ab"}
  assert {p.split("/")[0] for p, label in labels.items() if label == "head"} == {
      "llama": {"score"}, "bert": {"pooler", "classifier"}, "teacher": {"widen", "classifier"}}[family]


def test_qwen2_biases_are_vectors(llama):
  model = Model(dataclasses.replace(llama[0].config, model_type="qwen2"))
  labels = flatten(trees.label_tree(model.abstract_params()))
  assert {labels[f"layers/attn/{p}_proj/bias"] for p in "qkv"} == {"vector"}


def test_a_leaf_without_a_label_is_an_error_that_names_it():
  with pytest.raises(ValueError, match="'layers/moe/router/gain' matches no rule"):
    trees.label_tree({"layers": {"moe": {"router": {"gain": jnp.ones(2)}}}})


@pytest.mark.parametrize("labels", [trees.LORA, trees.FULL, ("head",), ()])
def test_combine_undoes_split(labels, llama):
  """`combine` returns the same objects in the same structure. The parts share no leaf, and together have all leaves."""
  params = lora.add_lora(llama[1], 4, 8.0, key=jax.random.key(0))
  trainable, frozen = trees.split(params, labels)
  flat, names = flatten(params), flatten(trees.label_tree(params))
  assert set(flatten(trainable)) == {p for p in flat if names[p] in labels}
  assert set(flatten(frozen)) == {p for p in flat if names[p] not in labels}
  again = trees.combine(trainable, frozen)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert all(flatten(again)[p] is leaf for p, leaf in flat.items())


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=-1), dict(targets=("q_proj", "query")),
                                     dict(targets=("score",))])
def test_bad_rank_or_target_names_the_choices_and_the_knob(options, llama):
  with pytest.raises(InputError, match=r"LoRA rank .*targets among down_proj, gate_proj, k_proj.*--config\.lora\.rank"):
    lora.add_lora(llama[1], **(dict(rank=4, alpha=8.0, key=jax.random.key(0)) | options))


def torch_logits(model, ids, mask):
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.float().numpy()


def torch_base(directory, dtype="float32"):
  return transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def with_peft(base, directory):
  """The base with the adapter, loaded by peft. peft's warnings (missing tensors, wrong fan_in_fan_out) are errors."""
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    return peft.PeftModel.from_pretrained(base, directory).eval()


@pytest.mark.parametrize("targets", [("q_proj", "o_proj"), ("up_proj",)], ids=str)
def test_peft_adapts_no_module_that_only_has_the_same_name(targets, bert, make_batch, tmp_path):
  """BERT has several modules named `dense`, so targets are named in full. Without the adapter the base comes back."""
  model, params = bert
  batch = make_batch(model)
  ids, mask = batch["input_ids"], batch["segment_ids"]
  save_pretrained(tmp_path / "base", model, params)
  trained = with_other_head(model, adapted(params, targets))
  lora.export_adapter(tmp_path / "adapter", model, trained, base=tmp_path / "base")
  theirs = with_peft(torch_base(tmp_path / "base"), tmp_path / "adapter")
  np.testing.assert_allclose(torch_logits(theirs, ids, mask), logits(model, trained, batch), atol=1e-4)
  with theirs.disable_adapter():
    np.testing.assert_allclose(torch_logits(theirs, ids, mask), logits(model, params, batch), atol=1e-4)
  assert len([n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")]) == 3 * len(targets)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, str(tmp_path / "base"))


# {family: (shape in test_models.py, targets for q and v, targets for all linear layers)}.
FAMILIES = {
    "llama": ("gqa-untied-odd", ("q_proj", "v_proj"), ALL["llama"]),
    "gpt2": ("odd", ("c_attn",), ("c_attn", "c_proj", "c_fc")),
    **{family: ("odd", ("q_proj", "v_proj"), ALL["bert"]) for family in ("bert", "roberta", "xlm-roberta",
                                                                            "camembert", "distilbert", "electra")},
    "modernbert": ("biases-mean", ("Wqkv",), ("Wqkv", "Wi", "Wo")),
    "qwen2": ("gqa-untied-odd", ("q_proj", "v_proj"), ALL["llama"]),
    "deberta-v2": ("own-keys", ("q_proj", "v_proj"), (*ALL["bert"], "pos_q_proj", "pos_k_proj")),
    "gemma": ("mqa-wide-heads", ("q_proj", "v_proj"), ALL["llama"]),
    "gemma2": ("gqa", ("q_proj", "v_proj"), ALL["llama"]), "gemma3_text": ("gqa", ("q_proj", "v_proj"), ALL["llama"]),
    "phi3": ("gqa-partial", ("qkv_proj",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "smollm3": ("nope-window-biases", ("q_proj", "v_proj"), ALL["llama"]),
}
QUICK = (("llama", 512, True), ("gpt2", 8, False), ("bert", 512, False), ("roberta", 8, True), ("distilbert", 8, False),
         ("electra", 8, True), ("deberta-v2", 8, True), ("gemma2", 8, True), ("modernbert", 8, True),
         ("smollm3", 8, True), ("phi3", 8, True))
RUNS = [pytest.param(*run, id=f"{run[0]}-{run[1]}-{'all' if run[2] else 'qv'}",
                     marks=() if run in QUICK else pytest.mark.long)
        for run in [*itertools.product(("llama", "gpt2", "bert", "roberta", "distilbert"), (8, 512), (False, True)),
                    ("qwen2", 512, True), ("electra", 8, True), ("xlm-roberta", 8, True), ("camembert", 512, True),
                    ("deberta-v2", 8, True), ("deberta-v2", 512, False), ("gemma", 8, True), ("gemma2", 8, True),
                    ("gemma2", 512, True), ("gemma3_text", 8, True), ("gemma3_text", 512, False),
                    ("modernbert", 8, True), ("modernbert", 512, False), ("smollm3", 8, True), ("phi3", 8, True),
                    ("phi3", 512, False)]]
DROPOUTS = ("hidden_dropout", "attention_dropout", "head_dropout", "embedding_dropout", "pooler_dropout",
            "mlp_dropout")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """bases(family) -> (directory that transformers wrote, {dtype: our (model, params)}); each made once."""
  made = {}
  def make(family):
    if family not in made:
      directory = tmp_path_factory.mktemp(family)
      torch_model(family, SHAPES[family][FAMILIES[family][0]]).save_pretrained(directory)
      made[family] = directory, {dtype: load_pretrained(directory, dtype=dtype) for dtype in ("float32", "bfloat16")}
    return made[family]
  return make


def easy_rows(config, seed, rows=64, tokens=12):
  """A ragged batch padded on the right; a row's label says which half of the vocabulary its tokens come from."""
  rng = np.random.default_rng(seed)
  half = config.vocab_size // 2
  label = rng.integers(0, 2, rows).astype(np.int32)
  mask = (np.arange(tokens) < rng.integers(2, tokens + 1, rows)[:, None]).astype(np.int32)
  ids = rng.integers(config.pad_token_id + 1, half, mask.shape) + half * label[:, None]
  return {"input_ids": np.where(mask, ids, config.pad_token_id).astype(np.int32), "segment_ids": mask,
          "label": label, "weight": np.ones(rows, np.float32)}


def lora_run(model, params, num_steps=30):
  """The trained leaves after `num_steps` on one device. There is no dropout, because it takes long to compile."""
  model = Model(dataclasses.replace(model.config, **{d: 0.0 for d in DROPOUTS if hasattr(model.config, d)}))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  trainable, frozen = trees.split(params, trees.LORA)
  program = make_program(model, trainable, frozen, mesh, num_steps, weights={"ce": 1.0}, loss=steps.weighted_loss(
      model, CLASSIFICATION.loss_terms, {"ce": 1.0}))
  state = program.init([trainable])
  for i in range(num_steps):
    batch = sharding.global_batch(one_run(easy_rows(model.config, 100 + i)), mesh, 1)
    state, _ = program.step(state, frozen, batch, keys(1))
  return alone(state.params)


@pytest.mark.parametrize("family,rank,all_linear", RUNS)
def test_ours_peft_and_the_merged_model_agree_after_a_lora_run(family, rank, all_linear, bases, tmp_path):
  """Logits agree to 1e-4 in float32. In bfloat16 the classes agree in every row where rounding cannot change them.

  Rank 8 is trained over the float32 base, rank 512 over the bfloat16 base. Both are compared over both bases. In
  bfloat16 a row counts if its float32 logits differ by more than 2^-5 of the largest logit, which is eight roundings.
  Nearly all rows count.
  """
  directory, ours = bases(family)
  targets = FAMILIES[family][1 + all_linear]
  start = {dtype: lora.add_lora(params, rank, 16.0, targets, key=jax.random.key(0))
           for dtype, (_, params) in ours.items()}
  train_dtype = "float32" if rank == 8 else "bfloat16"
  trained = lora_run(ours[train_dtype][0], start[train_dtype])
  for path, leaf in flatten(trained).items():
    assert leaf.dtype == jnp.float32
    assert (np.asarray(leaf) != flatten(start[train_dtype])[path]).mean() > 0.9, path
  batch = easy_rows(ours["float32"][0].config, 1)
  ids, mask = batch["input_ids"], batch["segment_ids"]
  got = {}
  for dtype, (model, _) in ours.items():
    params = trees.combine(trained, trees.split(start[dtype], trees.LORA)[1])
    save_pretrained(tmp_path / dtype, model, lora.merge_lora(params))
    lora.export_adapter(tmp_path / "adapter", model, params, base=directory)
    adapter = with_peft(torch_base(directory, dtype), tmp_path / "adapter")
    assert len([n for n, _ in adapter.named_modules() if n.endswith("lora_A.default")]) == sum(
        len(leaf) for path, leaf in flatten(params).items() if path.endswith("lora_a"))
    got[dtype] = [logits(model, params, batch), torch_logits(adapter, ids, mask),
                  torch_logits(torch_base(tmp_path / dtype, dtype), ids, mask)]
  want, *theirs = got["float32"]
  assert np.abs(want - torch_logits(torch_base(directory), ids, mask)).max() > 0.5    # the run did something
  for one in theirs:
    np.testing.assert_allclose(one, want, atol=1e-4)
  apart = np.abs(want[:, 1] - want[:, 0]) > 2**-5 * np.abs(want).max()
  assert apart.sum() >= 60 and 16 <= want.argmax(1).sum() <= 48                       # of 64
  for one in got["bfloat16"]:
    np.testing.assert_array_equal(one.argmax(1)[apart], want.argmax(1)[apart])


def test_there_is_nothing_to_export_without_adapters(llama, tmp_path):
  model, params = llama
  with pytest.raises(InputError, match="hold no adapter"):
    lora.export_adapter(tmp_path / "adapter", model, params)
  assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("tokens,rank,width_in,width_out", [
    (64, 32, 32, 32), (8, 32, 32, 32), (512, 24, 32, 64), (512, 2, 32, 64)])
def test_an_adapters_product_costs_what_the_cheaper_order_costs(tokens, rank, width_in, width_out):
  """By the compiler's count the forward pass has the FLOPs of the cheaper order. The product is x A B."""
  shapes = (tokens, width_in), (width_in, rank), (rank, width_out)
  x, a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
  flops = jax.jit(adapter_product).lower(x, a, b).compile().cost_analysis()["flops"]
  through_rank = 2 * tokens * rank * (width_in + width_out)
  through_delta = 2 * width_in * width_out * (rank + tokens)
  assert flops == pytest.approx(min(through_rank, through_delta), rel=0.01)
  np.testing.assert_allclose(adapter_product(x, a, b), np.asarray(x) @ np.asarray(a) @ np.asarray(b), rtol=1e-3,
                             atol=1e-3)
