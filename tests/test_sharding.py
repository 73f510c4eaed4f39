"""Mesh, rules, and what their errors say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BERT, LLAMA
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, adapters, lora, sharding
from w2s_jax.adapters import attach, p_tuning, soft, trees
from w2s_jax.config import Lora, section
from w2s_jax.models import Model
from w2s_jax.models.deberta import DebertaConfig
from w2s_jax.models.gemma import GemmaConfig
from w2s_jax.models.gpt2 import GPT2Config
from w2s_jax.models.model import FAMILIES
from w2s_jax.models.modernbert import ModernBertConfig

RULES = Model(LLAMA).shardings


@pytest.mark.parametrize("sizes,want", [
    ((-1, 1, 1), (8, 1, 1)), ((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((-1, 4, 2), (1, 4, 2)),
    ((4, 1, 2), (4, 1, 2))])
def test_mesh_sizes(sizes, want):
  mesh = sharding.make_mesh(*sizes)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert tuple(mesh.shape[a] for a in mesh.axis_names) == want


def test_a_mesh_of_chosen_devices():
  mesh = sharding.make_mesh(devices=jax.devices()[2:4])
  assert [d.id for d in mesh.devices.flat] == [2, 3] and mesh.shape["data"] == 2


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 8), (-1, 16, 1), (-1, 0, 1), (-2, -4, 1)])
def test_a_mesh_that_does_not_fit_names_numbers_and_knob(sizes):
  with pytest.raises(InputError, match=rf"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} does not fit 8 device.*"
                                       r"--config\.mesh\.data"):
    sharding.make_mesh(*sizes)


def test_a_mesh_that_a_torus_does_not_take_is_one_line(monkeypatch):
  def refuses(*args, **kwargs):                                  # as jax does for an axis of 32 on 4 x 4 x 4
    raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 32")
  monkeypatch.setattr(jax, "make_mesh", refuses)
  with pytest.raises(InputError, match=r"mesh data=1, fsdp=2, tensor=4 cannot be laid on this slice.*--config\.mesh"):
    sharding.make_mesh(1, 2, 4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "teacher"])
def test_every_leaf_with_adapters_matches_one_rule(family, request):
  """Kernels are sharded over fsdp and tensor, adapters over the axes of their kernels, and norms are replicated."""
  model, _ = request.getfixturevalue("llama" if family == "qwen2" else family)
  if family == "qwen2":
    model = type(model)(dataclasses.replace(model.config, model_type="qwen2"))
  targets = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
  params = jax.eval_shape(lambda p: lora.add_lora(p, 8, 8.0, targets, key=jax.random.key(0)), model.abstract_params())
  mesh = sharding.make_mesh(2, 2, 2)
  places = traverse_util.flatten_dict(sharding.param_shardings(params, model.shardings, mesh), sep="/")
  assert places.keys() == traverse_util.flatten_dict(params, sep="/").keys()
  specs = {path: place.spec for path, place in places.items()}
  assert specs["layers/attn/q_proj/kernel"] == P(None, "fsdp", "tensor")
  assert specs["layers/attn/q_proj/lora_a"] == P(None, "fsdp", None)
  assert specs["layers/attn/q_proj/lora_b"] == P(None, None, "fsdp")
  assert specs["layers/attn/o_proj/kernel"] == specs["layers/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
  assert specs["layers/attn_norm/scale"] == P()


def paths(family):
  """The paths of all leaves that models of the family can have, with adapters, soft and virtual tokens."""
  def replaced(config, *changes):
    return [dataclasses.replace(config, **change) for change in changes]
  untied = dict(head="lm", tie_embeddings=False)
  configs = {"llama": replaced(LLAMA, {}, dict(model_type="qwen2"), dict(model_type="qwen3"), untied,
                                dict(attention_bias=True, mlp_bias=True), dict(model_type="phi3")),
             "gemma": replaced(GemmaConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2),
                               {}, dict(model_type="gemma3_text"), untied),
             "gpt2": replaced(GPT2Config(vocab_size=64, hidden_size=32, num_heads=4), {}, untied),
             "encoder": replaced(BERT, {}, dict(feature_width=40), dict(model_type="distilbert"), dict(head="lm"),
                                 dict(model_type="electra", embedding_size=16)),
             "deberta": replaced(DebertaConfig(vocab_size=64, hidden_size=32, num_heads=4), dict(share_keys=False),
                                 dict(feature_width=40), dict(head="lm")),
             "modernbert": replaced(ModernBertConfig(vocab_size=64, hidden_size=32, num_heads=4, num_layers=2),
                                    dict(attention_bias=True), dict(feature_width=40), dict(head="lm"))}
  out = set()
  for model in map(Model, configs[family]):
    out |= {"/".join((*model.vocabulary, leaf)) for leaf in (soft.LEAF, p_tuning.LEAF)}
    for kind in (*adapters.KINDS, p_tuning.KIND):
      settings = section(Lora, kind=kind, frequencies=50, targets=("all-linear",))
      add = functools.partial(attach.add_configured, section=settings, key=jax.random.key(0))
      out |= {*traverse_util.flatten_dict(jax.eval_shape(add, model.abstract_params()), sep="/")}
  return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pattern_is_without_a_leaf(family):
  """Each pattern matches some leaf of the family, and each leaf matches exactly one pattern."""
  rules = Model(FAMILIES[family].config()).shardings
  numbered = [(pattern, i) for i, (pattern, _) in enumerate(rules)]
  assert {sharding.match(path, numbered) for path in paths(family)} == set(range(len(numbered)))
  assert {sum(bool(re.fullmatch(pattern, path)) for pattern, _ in rules) for path in paths(family)} == {1}


def test_no_label_is_without_a_leaf():
  numbered = [(pattern, i) for i, (pattern, _) in enumerate(trees.label_rules())]
  found = {sharding.match(path, numbered) for family in FAMILIES for path in paths(family)}
  assert found == set(range(len(numbered)))


def test_an_unknown_leaf_is_an_error_that_names_it():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match=r"'layers/moe/router/kernel' matches no rule"):
    sharding.param_shardings({"layers": {"moe": {"router": {"kernel": jnp.ones((1, 8, 8))}}}}, RULES, mesh)
  with pytest.raises(ValueError, match="matches no rule"):      # the whole path has to match, not a part of it
    sharding.match("score/kernel/extra", RULES)


def test_the_first_rule_that_matches_wins():
  assert sharding.match("a/b", ((r"a/.*", 1), (r"a/b", 2))) == 1


def test_an_axis_that_does_not_divide_names_leaf_and_both_numbers():
  mesh = sharding.make_mesh(1, 8, 1)
  with pytest.raises(InputError, match=r"score/kernel \(20, 2\): dimension 20 is not divisible by mesh axis fsdp=8.*"
                                       r"--config\.mesh"):
    sharding.param_shardings({"score": {"kernel": jnp.ones((20, 2))}}, RULES, mesh)


def test_check_batch():
  mesh = sharding.make_mesh(2, 2, 2)
  sharding.check_batch(12, mesh, "--config.defend.batch_size")  # over data x fsdp = 4
  with pytest.raises(InputError, match=r"batch of 6 rows.*= 4 devices.*--config\.defend\.batch_size"):
    sharding.check_batch(6, mesh, "--config.defend.batch_size")


def test_global_batch_lays_rows_over_data_and_fsdp():
  rows = {"x": np.arange(24, dtype=np.int32).reshape(8, 3), "weight": np.arange(8, dtype=np.float32)}
  placed = sharding.global_batch(rows, sharding.make_mesh(2, 2, 2))
  for name, values in rows.items():
    np.testing.assert_array_equal(placed[name], values)
    shards = {s.device.id: np.asarray(s.data) for s in placed[name].addressable_shards}
    assert len(shards) == 8 and all(len(s) == 2 for s in shards.values())
    np.testing.assert_array_equal(np.concatenate([shards[i] for i in (0, 2, 4, 6)]), values)   # others: copies
