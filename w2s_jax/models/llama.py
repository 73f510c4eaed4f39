"""Decoders like Llama: Llama, Vicuna, Mistral, Qwen2, Qwen3, SmolLM3, Phi-3. D width, H heads."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, sharding
from w2s_jax.models import family, layers
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields, short
from w2s_jax.models.hf.formats import Checkpoint, modules
from w2s_jax.models.rotary import Rope, rotate

# transformers' defaults for absent fields that the network depends on (its configuration_*.py). A field that is null
# does not get its default.
ABSENT = {"llama": {"max_position_embeddings": 2048},
          "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
          "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
          "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
          "smollm3": {"max_position_embeddings": 32768, "num_key_value_heads": 4, "tie_word_embeddings": True,
                      "pad_token_id": 128004},
          "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                   "pad_token_id": 32000}}
CHOOSES = ("qwen2", "qwen3", "smollm3")        # config.json says which layers have a window
ALL_SLIDE = ("mistral", "phi3")                # all layers have the window, if there is one
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class LlamaConfig(family.SharedConfig):
  """Shape of the network (transformers' config.json)."""
  model_type: str = "llama"           # qwen2: biases on q, k, v; qwen3: norms on q, k; phi3: q, k, v are one kernel
  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_layers: int = 32
  num_heads: int = 32
  num_kv_heads: int = 32
  head_dim: int = 128
  max_positions: int = 4096
  rms_norm_eps: float = 1e-5
  rope: Rope = Rope()
  rotated: tuple[bool, ...] = ()      # for each layer, whether it rotates q and k; (): all do
  sliding_window: int = 0             # number of tokens that a token attends to, itself included; 0: no limit
  slides: tuple[bool, ...] = ()       # for each layer, whether it has the window; (): all do
  attention_bias: bool = False        # on q, k, v and o
  mlp_bias: bool = False
  tie_embeddings: bool = False
  attention_dropout: float = 0.0      # on the attention probabilities, while training
  hidden_dropout: float = 0.0         # after attention and feed-forward, while training (Phi-3)
  bos_token_id: int | None = None
  eos_token_id: int | tuple | None = None

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    model_type = fields.values["model_type"]
    fields = Fields(ABSENT.get(model_type, {}) | fields.values, fields.where)       # a Gemma has gemma.DEFAULTS
    fields.only(hidden_act="silu")
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
      raise InputError(f"{heads} attention heads must be divisible by num_key_value_heads, got {kv_heads}: see the "
                       "model's config.json")
    head_dim = fields.integer("head_dim", max(4, width // heads), 4)
    if head_dim % 2:
      raise InputError(f"head_dim {head_dim} must be even for rotary positions: see the model's config.json")
    num_layers = fields.integer("num_hidden_layers", high=MOST_LAYERS)
    rotated = _rotated(fields, num_layers) if model_type == "smollm3" else ()
    window, slides = _windows(fields, num_layers, rotated)
    rope = Rope.from_hf(fields, 2e6 if model_type == "smollm3" else 1e4)
    rotary_width = rope.turning_width(head_dim)
    if rope.rope_type == "longrope" and {2 * len(rope.short_factor), 2 * len(rope.long_factor)} != {rotary_width}:
      raise InputError(f"the model's config.json: short_factor and long_factor have {len(rope.short_factor)} and "
                       f"{len(rope.long_factor)} numbers, wanted half of the {rotary_width} rotated features")
    return cls(model_type=model_type, hidden_size=width, intermediate_size=fields.integer("intermediate_size"),
               num_layers=num_layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
               max_positions=fields.integer("max_position_embeddings"),
               rms_norm_eps=fields.positive("rms_norm_eps", 1e-6), rope=rope, rotated=rotated, sliding_window=window,
               slides=slides, attention_dropout=fields.rate("attention_dropout", 0.0),
               hidden_dropout=fields.rate("resid_pdrop", 0.0) if model_type == "phi3" else 0.0, **_biases(fields),
               **family.decoder_from_hf(fields, tied=False), **runtime)

  def to_hf(self) -> dict:
    """transformers' config.json for this shape, with the fields of v5 and of v4."""
    rope = self.rope.to_phi3() if self.model_type == "phi3" else self.rope.to_hf()
    return rope | _layers_to_hf(self) | family.decoder_to_hf(self) | {
        "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
        "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
        "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim, "hidden_act": "silu",
        "max_position_embeddings": self.max_positions, "rms_norm_eps": self.rms_norm_eps,
        "attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias, "attention_dropout": self.attention_dropout}


def _biases(fields):
  """{field of LlamaConfig: flag} for the biases of linear layers that this model type's config.json can turn on."""
  model_type = fields.values["model_type"]
  choices = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",),
             "smollm3": ("attention_bias", "mlp_bias")}.get(model_type, ())
  fields.only(**{name: False for name in ("attention_bias", "mlp_bias") if name not in choices})
  return {name: fields.flag(name, False) for name in choices}


def _rotated(fields, num_layers):
  """The field `rotated` of LlamaConfig, from SmolLM3's config.json."""
  if "no_rope_layers" in fields:
    entries = fields.entries("no_rope_layers", num_layers, num_layers)
    rotated = [entry.integer("no_rope_layers", low=0) > 0 for entry in entries]
  else:
    interval = fields.integer("no_rope_layer_interval", 4)
    rotated = [layer % interval != 0 for layer in range(1, num_layers + 1)]
  return () if all(rotated) else tuple(rotated)


def _windows(fields, num_layers, rotated):
  """The fields (sliding_window, slides) of LlamaConfig."""
  model_type = fields.values["model_type"]
  if model_type not in CHOOSES:
    window = fields.integer("sliding_window") if model_type in ALL_SLIDE and "sliding_window" in fields else 0
    fields.only(layer_types=[SLIDING if window else FULL] * num_layers)
    return window, ()
  has_window = fields.flag("use_sliding_window", False) and "sliding_window" in fields
  if kinds := fields.layer_types((FULL, SLIDING), num_layers):
    slides = [kind == SLIDING for kind in kinds]
  elif model_type == "smollm3":
    slides = [has_window and not is_rotated for is_rotated in rotated or (True,) * num_layers]
  else:
    first = fields.integer("max_window_layers", low=0)
    slides = [has_window and layer >= first for layer in range(num_layers)]
  if any(slides) and not has_window:
    raise InputError(f"the model's config.json has sliding layers in layer_types, but use_sliding_window "
                     f"{short(fields.values.get('use_sliding_window'))} and sliding_window "
                     f"{short(fields.values.get('sliding_window'))}: set both, or make all layers full_attention")
  return (fields.integer("sliding_window") if any(slides) else 0), (() if len(set(slides)) == 1 else tuple(slides))


def _layers_to_hf(config):
  """The fields of config.json that only some of the model types have."""
  out, window = {}, config.sliding_window
  if config.model_type == "smollm3":
    out["no_rope_layers"] = [int(flag) for flag in (config.rotated or (True,) * config.num_layers)[:config.num_layers]]
  if config.model_type == "phi3":
    out["resid_pdrop"] = config.hidden_dropout
  if config.model_type in ALL_SLIDE or window:
    out["sliding_window"] = window or None
  if config.model_type in CHOOSES and window:
    slides = (config.slides or (True,) * config.num_layers)[:config.num_layers]
    out |= {"use_sliding_window": True, "layer_types": [SLIDING if has_window else FULL for has_window in slides],
            "max_window_layers": [*slides, True].index(True)}
  return out


class Attention(nn.Module):
  config: LlamaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask):
    c = self.config
    def linear(width, name, use_bias):
      return layers.linear(c, self.train, width, f"{name}_proj", use_bias)
    widths = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    if c.model_type == "phi3":
      parts = jnp.split(linear(sum(widths), "qkv", False)(x), np.cumsum(widths[:2]), axis=-1)
    else:
      use_bias = c.attention_bias or c.model_type == "qwen2"
      parts = [linear(width, name, use_bias)(x) for name, width in zip("qkv", widths)]
    q, k, v = (part.reshape(*x.shape[:2], -1, c.head_dim) for part in parts)
    if c.model_type == "qwen3":
      q, k = rms_norm(c, "q_norm")(q).astype(x.dtype), rms_norm(c, "k_norm")(k).astype(x.dtype)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0).reshape(*x.shape[:2], -1)
    return linear(c.hidden_size, "o", c.attention_bias)(out)


class MLP(nn.Module):
  config: LlamaConfig
  train: bool
  activation: Callable[[jax.Array], jax.Array] = nn.silu

  @nn.compact
  def __call__(self, x):
    c = self.config
    def dense(width, name):
      return layers.linear(c, self.train, width, name, c.mlp_bias)
    if c.model_type == "phi3":
      gate, up = jnp.split(dense(2 * c.intermediate_size, "gate_up_proj")(x), 2, axis=-1)
    else:
      gate, up = (dense(c.intermediate_size, name)(x) for name in ("gate_proj", "up_proj"))
    return dense(c.hidden_size, "down_proj")(self.activation(gate) * up)


def rms_norm(config: LlamaConfig, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(config.rms_norm_eps, dtype=jnp.float32, name=name)


class Block(nn.Module):
  config: LlamaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask, far=None, rotated=None, slides=None):
    """Applies the layer.

    Args:
      mask: attention mask with the window.
      far: attention mask without the window; None if all layers are alike.
      rotated, slides: whether this layer rotates q and k, and whether it has the window; None if all layers are alike.
    """
    c, x = self.config, sharding.split_rows(x)
    if far is not None:
      cos, sin, mask = jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0), jnp.where(slides, mask, far)
    def dropped(y):
      return layers.dropout(c.hidden_dropout, self.train)(y)
    def norm(name):
      return rms_norm(c, name)(x).astype(x.dtype)
    x += dropped(Attention(c, self.train, name="attn")(norm("attn_norm"), cos, sin, mask))
    x += dropped(MLP(c, self.train, name="mlp")(norm("mlp_norm")))
    return x, None


class LlamaClassifier(nn.Module):
  """Decoder whose head reads the last token that is not padding. Left and right padding give the same logits."""
  config: LlamaConfig
  train: bool = False

  lm_logits = staticmethod(layers.next_token_logits)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply and returns a ClassifierOutput."""
    c = self.config
    embed_tokens = layers.embed(c, c.vocab_size, "embed_tokens", layers.Tokens)
    x = embed_tokens(input_ids).astype(c.dtype) if stream is None else stream
    cos, sin = c.rope.cos_sin(layers.real_positions(segment_ids), c.head_dim, c.max_positions)
    masks, per_layer = [layers.causal_mask(segment_ids, c.sliding_window)], ()
    if c.rotated or c.slides:
      masks.append(layers.causal_mask(segment_ids))
      per_layer = [np.array(choice or [True] * c.num_layers) for choice in (c.rotated, c.slides)]
    x = layers.layer_stack(Block, c, self.train, x, cos, sin, *masks, per_layer=per_layer)
    return layers.decoder_head(c, embed_tokens, rms_norm(c, "norm"), x, input_ids, segment_ids, texts)


def _tensors(name):
  layer = "model.layers.{}"
  return Checkpoint(name, "model.", {
      "embed_tokens/embedding": "model.embed_tokens.weight",
      **modules((f"layers/attn/{p}_proj", f"{layer}.self_attn.{p}_proj") for p in ("q", "k", "v", "qkv", "o")),
      **modules(((f"layers/attn/{p}_norm", f"{layer}.self_attn.{p}_norm") for p in "qk"), "scale", both=False),
      **modules((f"layers/mlp/{p}_proj", f"{layer}.mlp.{p}_proj") for p in ("gate", "up", "gate_up", "down")),
      **modules((("layers/attn_norm", f"{layer}.input_layernorm"), ("norm", "model.norm"),
                 ("layers/mlp_norm", f"{layer}.post_attention_layernorm")), "scale", both=False),
      "score/kernel": "score.weight", "lm_head/embedding": "lm_head.weight",
  }, unused=r"score\.weight|lm_head\.weight|.*rotary_emb\.inv_freq")


# L layers, K key/value heads, d head width, F feed-forward width, V vocabulary, C classes.
FAMILY = family.Family(
    config=LlamaConfig, module=LlamaClassifier,
    tensors={"llama": _tensors("Llama"), "mistral": _tensors("Mistral"), "qwen2": _tensors("Qwen2"),
             "qwen3": _tensors("Qwen3"), "smollm3": _tensors("SmolLM3"), "phi3": _tensors("Phi3")},
    shardings=(
        (r"embed_tokens/embedding", P("tensor", "fsdp")),                # [V, D]
        (r"layers/attn/(q|k|v|qkv)_proj/kernel", P(None, "fsdp", "tensor")),  # [L, D, H*d], or K*d, or (H+2*K)*d
        (r"layers/attn/(q|k|v)_proj/bias", P(None, "tensor")),           # [L, H*d], or K*d
        (r"layers/mlp/(gate|up)_proj/bias", P(None, "tensor")),          # [L, F]
        (r"layers/(attn/o|mlp/down)_proj/bias", P()),                    # [L, D]
        (r"layers/attn/o_proj/kernel", P(None, "tensor", "fsdp")),       # [L, H*d, D]
        (r"layers/mlp/(gate|up|gate_up)_proj/kernel", P(None, "fsdp", "tensor")),  # [L, D, F], or 2*F
        (r"layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),     # [L, F, D]
        (r"layers/(attn|mlp)_norm/scale", P()),                          # [L, D]
        (r"layers/attn/(q|k)_norm/scale", P()),                          # [L, d]
        (r"norm/scale", P()),                                            # [D]
        (r"score/kernel", P("fsdp", None)),                              # [D, C]
        (r"lm_head/embedding", P("tensor", "fsdp")),                     # [V, D]
    ),
    vocabulary=("embed_tokens",))
