"""Decoder classifiers Gemma, Gemma 2 and Gemma 3's text model. D width, H heads."""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, sharding
from w2s_jax.models import family, layers, llama, rotary
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields, short
from w2s_jax.models.hf.formats import Checkpoint, modules

GELU = "gelu_pytorch_tanh"
# Advice in the error message for a Gemma 3 that also reads images.
TEXT_ALONE = ("give its text model OUT, which transformers can save. For a classifier: m = "
              "AutoModelForSequenceClassification.from_pretrained(DIR); t = "
              "AutoModelForSequenceClassification.from_config(m.config.text_config); t.model, t.score = "
              "m.model.language_model, m.score; t.save_pretrained(OUT). For a base: "
              "AutoModel.from_pretrained(DIR).language_model.save_pretrained(OUT)")
FULL, SLIDING = "full_attention", "sliding_attention"
PATTERN = {"gemma2": 2, "gemma3_text": 6}     # every n-th layer is FULL, the others are SLIDING
# Defaults of transformers 5.24 for fields that config.json does not have (its configuration_gemma*.py).
DEFAULTS = {model_type: {
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1} | fields for model_type, fields in {
        "gemma": {"num_key_value_heads": 16},
        "gemma2": {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
                   "final_logit_softcapping": 30.0},
        "gemma3_text": {"query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 131072},
    }.items()}


@dataclasses.dataclass(frozen=True)
class GemmaConfig(llama.LlamaConfig):
  """Shape of the network (transformers' config.json): the fields of a Llama, and Gemma's own."""
  model_type: str = "gemma2"          # gemma: no windows, post-norms or caps; gemma3_text: norms on q and k
  layer_types: tuple = ()             # FULL or SLIDING for each layer; (): all FULL
  local_rope: rotary.Rope = rotary.Rope()   # of SLIDING layers; FULL layers use `rope`
  query_scalar: int = 256             # attention scores are divided by its square root
  attention_cap: float = 0.0          # soft cap of the attention scores; 0: none
  logit_cap: float = 0.0              # soft cap of the language-model logits; 0: none

  @property
  def embedding_scale(self) -> float:
    """Factor of the word embeddings. Virtual tokens (adapters/p_tuning.py) do not get it, as in peft."""
    return self.hidden_size**0.5

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    model_type = fields.values["model_type"]
    fields = Fields(DEFAULTS[model_type] | fields.values, fields.where)
    fields.string("hidden_act", GELU, ("gelu", GELU))             # in Gemma's old files "gelu" means GELU too
    fields.only(hidden_activation=GELU, use_bidirectional_attention=False)
    shape = fields.values | {"hidden_act": None}
    if model_type == "gemma":
      config = super().from_hf(Fields(shape, fields.where), **runtime)
      return dataclasses.replace(config, query_scalar=config.head_dim)
    if model_type == "gemma2":
      fields.only(sliding_window_pattern=2)
    ropes = {}
    if model_type == "gemma3_text":
      fields.only(attn_logit_softcapping=None)                    # transformers' Gemma 3 ignores this field
      ropes = _ropes(fields)
      shape |= {"rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    config = super().from_hf(Fields(shape | {"layer_types": None}, fields.where), **runtime)
    def cap(name):
      return fields.positive(name) if name in fields else 0.0
    return dataclasses.replace(
        config, layer_types=_layer_types(fields), sliding_window=fields.integer("sliding_window"),
        query_scalar=fields.integer("query_pre_attn_scalar"), attention_cap=cap("attn_logit_softcapping"),
        logit_cap=cap("final_logit_softcapping"), **{"local_rope": config.rope} | ropes)

  def to_hf(self) -> dict:
    """transformers' config.json for this shape, with the fields of v5 and of v4."""
    hf = super().to_hf() | {"hidden_act": GELU, "hidden_activation": GELU}
    if self.model_type == "gemma":
      return hf
    hf |= {"layer_types": list(self.layer_types[:self.num_layers]), "sliding_window": self.sliding_window,
           "query_pre_attn_scalar": self.query_scalar, "attn_logit_softcapping": self.attention_cap or None,
           "final_logit_softcapping": self.logit_cap or None}
    if self.model_type == "gemma3_text":
      hf |= {"rope_local_base_freq": self.local_rope.rope_theta, "rope_parameters": {
          FULL: self.rope.to_hf()["rope_parameters"], SLIDING: self.local_rope.to_hf()["rope_parameters"]}}
    return hf


def _layer_types(fields):
  """FULL or SLIDING for each layer, from `layer_types` or transformers 4's `sliding_window_pattern`."""
  num_layers = fields.integer("num_hidden_layers", high=MOST_LAYERS)
  pattern = fields.integer("sliding_window_pattern", PATTERN[fields.values["model_type"]])
  by_pattern = [SLIDING if layer % pattern else FULL for layer in range(1, num_layers + 1)]
  kinds = fields.layer_types((FULL, SLIDING), num_layers) or by_pattern
  if "sliding_window_pattern" in fields and kinds != by_pattern:
    raise InputError(f"the model's {fields.where} has layer_types and a sliding_window_pattern that differ: keep one")
  return tuple(kinds)


def _ropes(fields):
  """{field of GemmaConfig: Rope} of a Gemma 3.

  In transformers 5 `rope_parameters` has one entry per layer type. In transformers 4 `rope_theta` and `rope_scaling`
  belong to the FULL layers, and `rope_local_base_freq` to the SLIDING layers.
  """
  ropes = fields.section("rope_parameters")
  if unknown := set(ropes.values) - {FULL, SLIDING}:
    raise InputError(f"the model's {ropes.where} has {short(sorted(unknown))}, wanted {FULL} and {SLIDING} alone")
  scaling = fields.section("rope_scaling")
  if "type" in scaling and "rope_type" not in scaling:
    raise InputError(f"the model's {fields.where}: rope_scaling has type, which transformers 5 does not read in a "
                     "gemma3_text: call it rope_type")
  lengths = {name: fields.values.get(name) for name in ("max_position_embeddings", rotary.ORIGINAL)}
  full = lengths | {"rope_theta": fields.values.get("rope_theta"), "rope_scaling": fields.values.get("rope_scaling")}
  local = lengths | {"rope_theta": fields.values.get("rope_local_base_freq")}
  def rope(kind, values, theta):
    parameters = rotary.Rope.from_hf(Fields(values | {"rope_parameters": ropes.values.get(kind)}, fields.where), theta)
    if parameters.rope_type == "longrope":
      raise InputError(f"the model's {ropes.where}: rope_type longrope is not implemented in a gemma3_text")
    return parameters
  return {"rope": rope(FULL, full, 1e6), "local_rope": rope(SLIDING, local, 1e4)}


class Norm(nn.Module):
  """RMSNorm over the last axis, in float32. The parameter is the scale minus 1."""
  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
    return nn.RMSNorm(self.eps, dtype=jnp.float32, use_scale=False)(x) * (1 + scale)


class Attention(nn.Module):
  config: GemmaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask):
    c = self.config
    def project(name, heads):
      y = layers.linear(c, self.train, heads * c.head_dim, f"{name}_proj", use_bias=False)(x)
      y = y.reshape(*x.shape[:2], heads, c.head_dim)
      if c.model_type == "gemma3_text" and name != "v":
        y = Norm(c.rms_norm_eps, name=f"{name}_norm")(y).astype(x.dtype)
      return y
    q = rotary.rotate(project("q", c.num_heads), cos, sin)
    k = rotary.rotate(project("k", c.num_kv_heads), cos, sin)
    out = layers.attention(q, k, project("v", c.num_kv_heads), mask, c.attention_dropout if self.train else 0.0,
                           scale=c.query_scalar**-0.5, cap=c.attention_cap)
    return layers.linear(c, self.train, c.hidden_size, "o_proj", use_bias=False)(out.reshape(*x.shape[:2], -1))


class Block(nn.Module):
  config: GemmaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask, kind):
    """cos, sin, mask: stacked over the two kinds of layer; kind: index of this layer's kind, 0 FULL, 1 SLIDING."""
    c, x = self.config, sharding.split_rows(x)
    def norm(name, y):
      return Norm(c.rms_norm_eps, name=name)(y).astype(x.dtype)
    def after(name, y):
      return y if c.model_type == "gemma" else norm(name, y)
    attended = Attention(c, self.train, name="attn")(norm("attn_norm", x), cos[kind], sin[kind], mask[kind])
    x += after("post_attn_norm", attended)
    x += after("post_mlp_norm", llama.MLP(c, self.train, nn.gelu, name="mlp")(norm("mlp_norm", x)))
    return x, None


class GemmaClassifier(nn.Module):
  """Decoder whose head reads the last token that is not padding. Left and right padding give the same logits."""
  config: GemmaConfig
  train: bool = False

  @staticmethod
  def lm_logits(config: GemmaConfig, params: dict, hidden: jax.Array) -> jax.Array:
    return layers.softcap(layers.next_token_logits(config, params, hidden), config.logit_cap)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply and returns a ClassifierOutput."""
    c, x = self.config, stream
    embed_tokens = layers.embed(c, c.vocab_size, "embed_tokens", layers.Tokens)
    if stream is None:
      x = (embed_tokens(input_ids) * c.embedding_scale).astype(c.dtype)
    positions = layers.real_positions(segment_ids)
    rotations = [rope.cos_sin(positions, c.head_dim, c.max_positions) for rope in (c.rope, c.local_rope)]
    cos, sin = (jnp.stack(pair) for pair in zip(*rotations))
    mask = jnp.stack([layers.causal_mask(segment_ids, window) for window in (0, c.sliding_window)])
    kinds = np.array([kind == SLIDING for kind in c.layer_types or [FULL] * c.num_layers], np.int32)
    x = layers.layer_stack(Block, c, self.train, x, cos, sin, mask, per_layer=(kinds,))
    out = layers.decoder_head(c, embed_tokens, Norm(c.rms_norm_eps, name="norm"), x, input_ids, segment_ids, texts)
    return out.replace(logits=layers.softcap(out.logits, c.logit_cap)) if c.head == "lm" else out


def _tensors(name, norms, classifier="ForSequenceClassification"):
  """The Checkpoint of one model type: Llama's tensor names, with different names for the layers' norms.

  norms: (our module, transformers' module) pairs. The same name can mean another norm than in a Llama:
    post_attention_layernorm is a Llama's mlp_norm and a Gemma 2's post_attn_norm.
  """
  checkpoint = llama.FAMILY.tensors["qwen3"]
  pairs = ((f"layers/{ours}", f"model.layers.{{}}.{theirs}") for ours, theirs in norms)
  weights = checkpoint.weights | modules(pairs, "scale", both=False)
  return Checkpoint(name, checkpoint.prefix, weights, checkpoint.unused, classifier=classifier)


NORMS = (("attn_norm", "input_layernorm"), ("post_attn_norm", "post_attention_layernorm"),
         ("mlp_norm", "pre_feedforward_layernorm"), ("post_mlp_norm", "post_feedforward_layernorm"))

# L layers, K key/value heads, d head width, F feed-forward width, V vocabulary, C classes.
FAMILY = family.Family(
    config=GemmaConfig, module=GemmaClassifier,
    tensors={"gemma": _tensors("Gemma", ()), "gemma2": _tensors("Gemma2", NORMS),
             "gemma3_text": _tensors("Gemma3", NORMS, "TextForSequenceClassification")},
    shardings=(
        (r"embed_tokens/embedding", P("tensor", "fsdp")),                # [V, D]
        (r"layers/attn/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor")),  # [L, D, H*d], or K*d
        (r"layers/attn/o_proj/kernel", P(None, "tensor", "fsdp")),       # [L, H*d, D]
        (r"layers/mlp/(gate|up)_proj/kernel", P(None, "fsdp", "tensor")),  # [L, D, F]
        (r"layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),     # [L, F, D]
        (r"layers/(post_)?(attn|mlp)_norm/scale", P()),                  # [L, D]
        (r"layers/attn/(q|k)_norm/scale", P()),                          # [L, d]
        (r"norm/scale", P()),                                            # [D]
        (r"score/kernel", P("fsdp", None)),                              # [D, C]
        (r"lm_head/embedding", P("tensor", "fsdp")),                     # [V, D]
    ),
    vocabulary=("embed_tokens",))
