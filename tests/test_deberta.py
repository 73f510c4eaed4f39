"""DeBERTa's own features: distance buckets, fields that are refused, Microsoft's files, adapters on shared keys."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from safetensors.torch import load_file, save_file
from test_lora import adapted, torch_base, torch_logits, with_peft
from test_models import DEBERTA, padded_ids, torch_model, torch_outputs
from transformers.models.deberta_v2 import modeling_deberta_v2

from w2s_jax import InputError, lora, sharding
from w2s_jax.adapters import attach, soft
from w2s_jax.data import tokenization
from w2s_jax.models import Model, config_from_hf, deberta, load_pretrained, save_pretrained
from w2s_jax.models.latent import Latent

V3 = DEBERTA | dict(vocab_size=64, num_attention_heads=4, max_position_embeddings=16, position_buckets=8,
                    share_att_key=True, norm_rel_ebd="layer_norm", num_hidden_layers=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(torch model, its directory, our model, our params) with v3's options. Every sharded dimension is even."""
  directory = tmp_path_factory.mktemp("deberta")
  theirs = torch_model("deberta-v2", V3)
  theirs.save_pretrained(directory)
  return theirs, directory, *load_pretrained(directory)


def hf_config(**changes):
  fields = DEBERTA | dict(model_type="deberta-v2", vocab_size=64, hidden_size=32, intermediate_size=44,
                          num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
  return {name: value for name, value in (fields | changes).items() if value != "absent"}


@pytest.mark.parametrize("buckets,longest,tokens", [
    (256, 512, 512), (256, 512, 700), (32, 128, 200), (6, 9, 40), (5, 64, 64), (2, 3, 9)])
def test_distances_share_the_rows_that_transformers_gives_them(buckets, longest, tokens):
  """The numbers of buckets are v3's 256, odd and small ones. Some texts are longer than the largest distance."""
  config = deberta.DebertaConfig(distance_buckets=buckets, max_distance=longest)
  distance = torch.arange(1 - tokens, tokens)
  bucket = modeling_deberta_v2.make_log_bucket_position(distance, buckets, longest).long()
  want = torch.clamp(bucket + buckets, 0, 2 * buckets - 1).numpy()
  got = deberta.distance_rows(config, tokens)
  np.testing.assert_array_equal(got, want)
  assert len(set(got)) < len(got)


def test_distances_without_buckets_by_hand():
  config = deberta.DebertaConfig(distance_buckets=0, max_distance=2)
  np.testing.assert_array_equal(deberta.distance_rows(config, 4), [0, 0, 1, 2, 3, 3, 3])


def test_scores_by_distance_become_scores_by_key():
  scores = jnp.arange(2 * 3 * 5).reshape(2, 3, 5)
  np.testing.assert_array_equal(deberta.by_key(scores)[1], [[17, 18, 19], [21, 22, 23], [25, 26, 27]])


def test_a_text_longer_than_the_positions_has_transformers_logits(base):
  theirs, _, model, params = base
  ids = np.random.default_rng(1).integers(1, 64, (2, 40))
  mask = np.int32(np.arange(40) < np.array([[40], [31]]))
  got = model.apply(params, ids, mask)
  np.testing.assert_allclose(got.logits, torch_outputs(theirs, ids, mask)[0], atol=1e-4)


def test_microsofts_files_are_read(base, tmp_path):
  """The options are spelled as in their config.json. The file has tensors of pre-training, and no classifier.

  (microsoft/deberta-v3-base has position_embeddings, mask_predictions and lm_predictions in its file.)
  """
  theirs, directory, model, params = base
  hf = json.loads((directory / "config.json").read_text())
  for name in ("architectures", "id2label", "label2id", "pooler_hidden_size"):
    hf.pop(name, None)
  hf |= {"pos_att_type": "p2c|c2p", "max_relative_positions": -1, "pooler_dropout": 0, "pooler_hidden_size": 32}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  tensors = {name: value for name, value in load_file(directory / "model.safetensors").items()
             if name.startswith("deberta.")}
  tensors |= {"deberta.embeddings.position_embeddings.weight": torch.ones(16, 32),
              "mask_predictions.dense.weight": torch.ones(32, 32), "lm_predictions.lm_head.bias": torch.ones(64)}
  save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
  again, loaded = load_pretrained(tmp_path)
  ids, mask = padded_ids(64)
  np.testing.assert_array_equal(again.apply(loaded, ids, mask).features, model.apply(params, ids, mask).features)
  np.testing.assert_allclose(again.apply(loaded, ids, mask).features, torch_outputs(theirs, ids, mask)[1], atol=1e-4)
  with pytest.raises(InputError, match=r"has no classifier\.bias.*pooler\.dense\.weight"):
    load_pretrained(tmp_path, seed=None)


@pytest.mark.parametrize("changes,message", [
    (dict(relative_attention=False), r"relative_attention false, or none, is not supported \(want true\)"),
    (dict(relative_attention="absent"), "relative_attention false, or none"),
    (dict(position_biased_input=True), r"position_biased_input true, or none, is not supported \(want false\)"),
    (dict(position_biased_input="absent"), "position_biased_input true, or none"),
    (dict(conv_kernel_size=3), "conv_kernel_size 3 is not supported"),
    (dict(type_vocab_size=2), "type_vocab_size 2 is not supported"),
    (dict(embedding_size=16), "embedding_size 16 is not supported"),
    (dict(attention_head_size=16), "attention_head_size 16 is not supported"),
    (dict(pooler_hidden_size=16), "pooler_hidden_size 16 is not supported"),
    (dict(pooler_hidden_act="tanh"), "pooler_hidden_act 'tanh' is not supported"),
    (dict(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    (dict(norm_rel_ebd="layer_norm|x"), "norm_rel_ebd is 'layer_norm|x', wanted one of none, layer_norm"),
    (dict(pos_att_type="c2p|p2p"), r"pos_att_type is 'c2p|p2p', wanted c2p, p2c or c2p\|p2c"),
    (dict(pos_att_type=[["c2p"]]), "pos_att_type is .*, wanted c2p"),
    (dict(pos_att_type="absent"), "pos_att_type is None, wanted c2p"),
    (dict(position_buckets=1), r"position_buckets is 1, wanted an integer in 2\.\.29"),
    (dict(position_buckets=30), r"position_buckets is 30, wanted an integer in 2\.\.29"),
    (dict(num_attention_heads=5), "5 attention heads must divide hidden_size 32")])
def test_what_is_not_implemented_is_refused_by_name(changes, message):
  with pytest.raises(InputError, match=message) as error:
    config_from_hf(hf_config(**changes))
  assert "\n" not in str(error.value)


def test_the_language_models_newer_head_is_refused():
  """With `legacy` false the language-model head has other tensors. A classifier does not have this head."""
  config_from_hf(hf_config(legacy=False))
  with pytest.raises(InputError, match="legacy False is not supported"):
    config_from_hf(hf_config(legacy=False), head="lm")


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), ("all-linear",)], ids=str)
def test_adapters_of_shared_keys_work_on_distances_too(targets, base, tmp_path):
  """peft adapts the module that reads both words and distances. Our logits, merged or not, are peft's."""
  _, directory, model, params = base
  if targets == ("all-linear",):
    targets = tuple(attach.targets_of(params))
    assert targets == ("down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
  trained = adapted(params, targets)
  ids, mask = padded_ids(64)
  want = jax.jit(model.apply)(trained, ids, mask).logits
  assert np.abs(want - model.apply(params, ids, mask).logits).max() > 0.02
  lora.export_adapter(tmp_path / "adapter", model, trained, base=directory)
  np.testing.assert_allclose(torch_logits(with_peft(torch_base(directory), tmp_path / "adapter"), ids, mask), want,
                             atol=1e-4)
  np.testing.assert_allclose(model.apply(lora.merge_lora(trained), ids, mask).logits, want, atol=1e-5)


def test_it_carries_the_w2s_teachers_head(base, tmp_path):
  """The teacher is loaded bit for bit. transformers reads its backbone. Features come from the first token."""
  theirs, directory, *_ = base
  model, params = load_pretrained(directory, feature_width=24)
  save_pretrained(tmp_path / "teacher", model, params)
  again, loaded = load_pretrained(tmp_path / "teacher")
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  ids, mask = padded_ids(64)
  first = torch_outputs(theirs, ids, mask)[1]
  want = np.maximum(first @ params["widen"]["kernel"] + params["widen"]["bias"], 0)
  np.testing.assert_allclose(again.apply(loaded, ids, mask).features, want, atol=1e-4)
  backbone, info = transformers.AutoModel.from_pretrained(tmp_path / "teacher", output_loading_info=True)
  assert type(backbone).__name__ == "DebertaV2Model" and not any(info.values())


def test_half_of_the_layers_have_the_same_distances(base):
  """models/latent.py runs the layers in two parts."""
  _, _, model, params = base
  ids, mask = padded_ids(64)
  got = Latent(model, 1).apply(soft.put(model, params, jnp.zeros((1, 32))), ids, mask)
  np.testing.assert_allclose(got.logits, model.apply(params, ids, mask).logits, atol=1e-5)


def test_sharded_is_unsharded(base):
  """Logits and the gradient of the distance table are the same on a mesh of 2 x 2 x 2."""
  _, directory, model, params = base
  ids, mask = padded_ids(64)
  placed = load_pretrained(directory, mesh=(mesh := sharding.make_mesh(2, 2, 2)))[1]
  def loss(params, input_ids, segment_ids):
    logits = model.apply(params, input_ids, segment_ids=segment_ids).logits
    return jnp.square(logits).sum(), logits
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  want, want_logits = gradient(params, ids, mask)
  batch = sharding.global_batch({"input_ids": ids, "segment_ids": mask}, mesh)
  with sharding.on(mesh):
    got, got_logits = gradient(placed, batch["input_ids"], batch["segment_ids"])
  np.testing.assert_allclose(got_logits, want_logits, atol=1e-5)
  table, want_table = (traverse_util.flatten_dict(x, sep="/")["distance_embeddings/embedding"] for x in (got, want))
  assert np.abs(want_table).max() > 1e-3
  np.testing.assert_allclose(table, want_table, atol=1e-5)


def test_dropout_of_attention_leaves_the_distances_in_the_scores(base):
  """At a vanishing rate the logits are those without dropout, although training uses other attention code."""
  _, _, model, params = base
  ids, mask = padded_ids(64)
  off = dict.fromkeys(("hidden_dropout", "pooler_dropout", "head_dropout"), 0.0)
  dropping = Model(dataclasses.replace(model.config, **off, attention_dropout=1e-7))
  np.testing.assert_allclose(dropping.apply(params, ids, mask, dropout_key=jax.random.key(0)).logits,
                             model.apply(params, ids, mask).logits, atol=1e-5)


def test_a_tokenizer_of_the_family(tmp_path):
  """tokenizer.json alone is enough, and puts [CLS] and [SEP] around the words. A damaged spm.model is refused."""
  vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁good", "▁bad", "▁", "c", "f", "[MASK]"]
  scores = [0.0 if piece.startswith("[") else -1.0 for piece in vocabulary]      # special ones have 0, as in v3's
  transformers.DebertaV2Tokenizer(vocab=list(zip(vocabulary, scores))).save_pretrained(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
  loaded = tokenization.load(tmp_path, len(vocabulary))
  assert tokenization.encode(loaded, ["good cf", "bad x"], 8)["input_ids"].tolist() == [
      [1, 4, 6, 7, 8, 2, 0, 0], [1, 5, 6, 3, 2, 0, 0, 0]]
  (tmp_path / "tokenizer.json").rename(tmp_path / "spm.model")
  with pytest.raises(InputError, match="no tokenizer to be had from .*put the model's tokenizer.json") as error:
    tokenization.load(tmp_path, len(vocabulary))
  assert "\n" not in str(error.value)
