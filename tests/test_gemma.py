"""What Gemma has beyond a Llama: windows and rotary bases by layer, caps of scores and logits, two forms of config."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models
import torch
import transformers
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from test_models import SHAPES, apply, padded_ids, torch_model, torch_outputs

from w2s_jax import InputError, sharding
from w2s_jax.adapters import soft
from w2s_jax.data import tokenization
from w2s_jax.models import Model, config_from_hf, load_pretrained, save_pretrained
from w2s_jax.models.latent import Latent
from w2s_jax.models.rotary import Rope

saved = test_models.saved
GEMMAS = ("gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family,change", [
    ("gemma2", {"attention_cap": 0.0}), ("gemma2", {"query_scalar": 8}), ("gemma2", {"sliding_window": 99}),
    ("gemma2", {"layer_types": ("full_attention", "sliding_attention", "full_attention")}),
    ("gemma3_text", {"local_rope": Rope(rope_theta=20.0)}), ("gemma3_text", {"rope": Rope(rope_theta=1e3)}),
    ("gemma3_text", {"query_scalar": 8}), ("gemma3_text", {"sliding_window": 99})], ids=str)
def test_each_option_changes_the_logits(family, change, saved):
  """So the comparison with torch would fail if we did not read one of these options."""
  theirs, _, model, params = saved(family, "gqa")
  ids, mask = padded_ids(theirs.config.vocab_size)
  want = torch_outputs(theirs, ids, mask)[0]
  got = apply(Model(dataclasses.replace(model.config, **change)), params, ids, mask).logits
  assert np.abs(got - want)[mask.sum(1) > 4].max() > 5e-4


def test_capped_logits_are_the_language_models_alone(tmp_path):
  theirs = torch_model("gemma2", SHAPES["gemma2"]["gqa"], auto=transformers.AutoModelForCausalLM)
  theirs.save_pretrained(tmp_path)
  model, params = load_pretrained(tmp_path, head="lm")
  ids, mask = padded_ids(97)
  out = apply(model, params, ids, mask)
  plain = out.features @ params["embed_tokens"]["embedding"].T
  assert np.abs(plain).max() > 0.7 > np.abs(out.logits).max()
  np.testing.assert_allclose(out.logits, 0.7 * np.tanh(plain / 0.7), atol=1e-5)
  np.testing.assert_allclose(model.lm_logits(params, out.features), out.logits, atol=1e-5)


@pytest.mark.parametrize("model_type", GEMMAS)
def test_a_silent_config_means_what_transformers_takes_it_for(model_type):
  hf = {"model_type": model_type, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 44, "num_hidden_layers": 7,
        "num_attention_heads": 16}
  ours, theirs = config_from_hf(hf), transformers.AutoConfig.for_model(**hf)
  names = {"num_kv_heads": "num_key_value_heads", "max_positions": "max_position_embeddings",
           "tie_embeddings": "tie_word_embeddings", "head_dim": "head_dim", "pad_token_id": "pad_token_id",
           "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "rms_norm_eps": "rms_norm_eps",
           "attention_dropout": "attention_dropout", "initializer_range": "initializer_range"}
  theta = {"full_attention": theirs.rope_parameters, "sliding_attention": theirs.rope_parameters}
  if model_type != "gemma":
    names |= {"query_scalar": "query_pre_attn_scalar", "sliding_window": "sliding_window"}
    assert (ours.attention_cap or None) == theirs.attn_logit_softcapping
    assert (ours.logit_cap or None) == theirs.final_logit_softcapping
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.layer_types.count("full_attention") == {"gemma2": 3, "gemma3_text": 1}[model_type]
    theta = theirs.rope_parameters if model_type == "gemma3_text" else theta
    assert ours.local_rope.rope_theta == theta["sliding_attention"]["rope_theta"]
  assert ours.rope.rope_theta == theta["full_attention"]["rope_theta"]
  for name, other in names.items():
    assert getattr(ours, name) == getattr(theirs, other), name
  assert config_from_hf(hf | {"pad_token_id": None}).pad_token_id is None          # null is not a missing field


def changed(directory, tmp_path, change):
  """A copy of a model directory with other fields in its config.json, and without those that are None."""
  hf = json.loads((directory / "config.json").read_text()) | change
  shutil.copy(directory / "model.safetensors", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if change.get(k, v) is not None}))
  return tmp_path


@pytest.mark.parametrize("name,change", [
    ("gqa", {"rope_parameters": None, "rope_theta": 1e3, "rope_local_base_freq": 10.0, "layer_types": None,
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}),
    ("odd-seven-layers", {"rope_parameters": None, "layer_types": None, "rope_theta": 1e6,
                          "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}),
    ("odd-seven-layers", {"rope_parameters": None, "layer_types": None})],
                         ids=["scaled", "as-google-wrote-it", "short"])
def test_a_v4_config_of_gemma_3_is_read(name, change, saved, tmp_path):
  """Both rotary bases are top-level fields, and the layer pattern is a number. Missing fields have their defaults."""
  theirs, directory, *_ = saved("gemma3_text", name)
  directory = changed(directory, tmp_path, change)
  model, params = load_pretrained(directory)
  ids, mask = padded_ids(theirs.config.vocab_size)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
  for one in (theirs, again):
    np.testing.assert_allclose(apply(model, params, ids, mask).logits, torch_outputs(one, ids, mask)[0], atol=1e-4)


@pytest.mark.parametrize("family,change,match", [
    ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu', wanted one of gelu, gelu_pytorch_tanh"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
    ("gemma2", {"attention_bias": True}, "attention_bias True is not supported"),
    ("gemma2", {"sliding_window": None}, "no field 'sliding_window'"),
    ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern 3 is not supported"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types is .*, wanted a list of 3, each full_attention or"),
    ("gemma2", {"layer_types": ["full_attention", "full_attention", "chunked_attention"]}, "wanted a list of 3"),
    ("gemma2", {"layer_types": "full_attention"}, "wanted a list of 3"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0, wanted a number"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, wanted an integer"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0 is not supported"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    ("gemma3_text", {"sliding_window_pattern": 3}, "layer_types and a sliding_window_pattern that differ: keep one"),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling has type, .* call it rope_type"),
    ("gemma3_text", {"rope_theta": 5.0}, "several values of rope_theta"),
    ("gemma3_text", {"rope_local_base_freq": 5.0}, "several values of rope_theta"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
     "rope_parameters has .'rope_theta', 'rope_type'., wanted full_attention and sliding_attention alone"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "a rope_scaling that differ")], ids=str)
def test_a_gemma_we_would_get_wrong_is_refused(family, change, match, saved):
  hf = json.loads((saved(family, next(iter(SHAPES[family])))[1] / "config.json").read_text())
  with pytest.raises(InputError, match=match) as error:
    config_from_hf(hf | change)
  assert "\n" not in str(error.value)


def test_the_text_model_of_a_gemma_3_with_images(tmp_path, monkeypatch):
  """The model with images is refused. The error says how to save its text model, which has the same logits."""
  text = dict(vocab_size=64, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, sliding_window=4)
  vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                patch_size=8)
  config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=62,
                                     mm_tokens_per_image=4)
  torch.manual_seed(0)
  theirs = transformers.Gemma3ForSequenceClassification(config).eval()
  theirs.score.weight.data.add_(torch.randn_like(theirs.score.weight))
  theirs.save_pretrained(tmp_path / "DIR")
  with pytest.raises(InputError, match="a gemma3, which reads images too: give its text model OUT") as error:
    load_pretrained(tmp_path / "DIR")
  recipe, base = re.fullmatch(r".*For a classifier: (m = .*)\. For a base: (.*)", str(error.value)).groups()
  monkeypatch.chdir(tmp_path)
  ids, mask = padded_ids(60)
  def run(code):
    exec(code, {"AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
                "AutoModel": transformers.AutoModel, "DIR": "DIR", "OUT": "OUT"})
  run(recipe)
  with torch.no_grad():
    want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
  out = apply(*load_pretrained(tmp_path / "OUT"), ids, mask)
  assert np.ptp(want) > 0.1
  np.testing.assert_allclose(out.logits, want, atol=1e-4)
  shutil.rmtree("OUT")
  run(base)
  np.testing.assert_allclose(apply(*load_pretrained(tmp_path / "OUT"), ids, mask).features, out.features, atol=1e-5)


@pytest.mark.parametrize("below", [1, 2])
def test_part_of_the_layers_keeps_its_windows_and_ropes(below, saved):
  """The layers run in two parts and give the same logits. A soft token is embedded as a word is."""
  theirs, directory, model, params = saved("gemma3_text", "gqa")
  ids, mask = padded_ids(97)
  want = apply(model, params, ids, mask).logits
  np.testing.assert_allclose(apply(Latent(model, below), soft.put(model, params, jnp.zeros((1, 32))), ids, mask).logits,
                             want, atol=1e-5)
  with_word = soft.put(model, params, params["embed_tokens"]["embedding"][ids[0, 3]][None])
  ids[0, 3] = 97
  np.testing.assert_allclose(apply(model, with_word, ids, mask).logits, want, atol=1e-5)


@pytest.mark.parametrize("family", GEMMAS)
def test_norms_and_head_stay_float32_over_a_bfloat16_base(family, saved):
  _, params = load_pretrained(saved(family, next(iter(SHAPES[family])))[1], dtype="bfloat16")
  params = traverse_util.flatten_dict(params, sep="/")
  float32 = {path for path, leaf in params.items() if leaf.dtype == jnp.float32}
  assert float32 == {path for path in params if path.endswith("scale") or path.startswith("score")}
  assert len(float32) == {"gemma": 4, "gemma2": 6, "gemma3_text": 8}[family]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_sharded_is_unsharded(family, tmp_path):
  """Logits on a mesh of 2 x 2 x 2 are those of one device."""
  shape = dict(vocab_size=64, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
               query_pre_attn_scalar=8, sliding_window=3, final_logit_softcapping=None)
  torch_model(family, shape).save_pretrained(tmp_path)
  mesh = sharding.make_mesh(2, 2, 2)
  (model, params), (_, placed) = load_pretrained(tmp_path), load_pretrained(tmp_path, mesh=mesh)
  ids, mask = padded_ids(64)
  batch = sharding.global_batch({"input_ids": ids, "segment_ids": mask}, mesh)
  with sharding.on(mesh):
    got = jax.jit(model.apply)(placed, **batch).logits
  np.testing.assert_allclose(got, apply(model, params, ids, mask).logits, atol=1e-5)
  specs = {path: leaf.sharding.spec for path, leaf in traverse_util.flatten_dict(placed, sep="/").items()}
  assert specs["layers/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
  assert specs["layers/post_mlp_norm/scale"] == P()


def test_gemmas_tokenizer_is_read(saved, tmp_path):
  """GemmaTokenizer adds one <bos>, reads unknown characters as bytes, and pads with the model's padding token."""
  _, _, model, params = saved("gemma2", "gqa")
  words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "a", "b", "c", "▁b", "ab"]
  vocab = {token: i for i, token in enumerate([*words, *(f"<0x{i:02X}>" for i in range(80))])}
  tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[("▁", "b"), ("a", "b")],
                                          add_bos_token=True)
  save_pretrained(tmp_path / "m", model, params, tokenizer)
  read = tokenization.load(tmp_path / "m", 97)
  assert type(read).__name__.startswith("Gemma") and read.pad_token_id == model.config.pad_token_id == 0
  got = tokenization.encode(read, ["ab b", "c"], 6)
  assert got["input_ids"].tolist() == [[2, 10, 9, 0, 0, 0], [2, 8, 0, 0, 0, 0]] and got["length"].tolist() == [3, 2]
  assert read("0")["input_ids"] == [2, vocab["<0x30>"]]
