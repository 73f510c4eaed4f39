"""Llama-architecture decoder classifier (Llama, Vicuna, Mistral, Qwen2, Qwen3). B batch, T tokens, D width, H heads."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from w2s_jax import InputError
from w2s_jax.models import layers

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_FIELDS = {"default": (), "linear": ("factor",), "dynamic": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions (Su et al., arXiv 2104.09864) and how they are stretched, in transformers' names."""
  rope_type: str = "default"          # a key of ROPE_FIELDS
  rope_theta: float = 10000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0        # llama3: wavelengths over original / low are divided by factor,
  high_freq_factor: float = 4.0       # those under original / high are left alone, between them a ramp
  original_max_position_embeddings: int = 8192

  @classmethod
  def from_hf(cls, hf):
    """From `rope_parameters` (transformers 5), or `rope_scaling` and a top-level `rope_theta` (transformers 4).

    Raises:
      InputError: another type, or a parameter that the type needs is absent.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", 1.0)
    if rope_type not in ROPE_FIELDS or part != 1.0:
      raise InputError(f"rope type {rope_type!r} with partial_rotary_factor {part} is not supported (want one of "
                       f"{', '.join(ROPE_FIELDS)} over the whole head)")
    missing = [name for name in ROPE_FIELDS[rope_type] if name not in rope]
    if missing:
      raise InputError(f"rope type {rope_type!r} needs {', '.join(missing)} in config.json's rope_parameters")
    return cls(rope_type, rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
               **{name: rope[name] for name in ROPE_FIELDS[rope_type]})

  def to_hf(self):
    """Both forms at once."""
    fields = {name: getattr(self, name) for name in ("rope_type", *ROPE_FIELDS[self.rope_type])}
    scaling = {} if self.rope_type == "default" else {"rope_scaling": fields}
    return {"rope_theta": self.rope_theta, "rope_parameters": fields | {"rope_theta": self.rope_theta}} | scaling

  def inverse_frequencies(self, head_dim, max_positions, length):
    """[d/2] float32, of a text of `length` tokens (a number or a scalar array; only "dynamic" depends on it)."""
    theta = self.rope_theta
    if self.rope_type == "dynamic":
      stretch = self.factor * jnp.maximum(length, max_positions) / max_positions - (self.factor - 1)
      theta *= stretch ** (head_dim / (head_dim - 2))
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if self.rope_type == "linear":
      return inverse / self.factor
    if self.rope_type == "llama3":
      turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
      kept = jnp.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
      return inverse * (kept + (1 - kept) / self.factor)
    return inverse


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Shape of the network (transformers' config.json), then how we run it."""
  model_type: str = "llama"           # mistral: sliding window; qwen2: biases on q, k, v; qwen3: norms on q, k
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
  sliding_window: int = 0             # a token sees itself and the window - 1 before it; 0: all before it
  tie_embeddings: bool = False
  initializer_range: float = 0.02
  attention_dropout: float = 0.0      # of the attention probabilities, while training
  num_labels: int = 2
  pad_token_id: int | None = None
  bos_token_id: int | None = None
  eos_token_id: int | None = None
  dtype: str = "float32"              # of the activations
  remat: str = "none"                 # layers.REMAT_POLICIES or "none"
  unroll: bool = False                # unroll the layer scan: same numbers, longer compile
  lora_dropout: float = 0.0           # on the adapter's input, while training

  family = "llama"                    # of the rule tables in sharding.py and the modules in models/

  @property
  def feature_size(self):
    return self.hidden_size

  @classmethod
  def from_hf(cls, hf, **runtime):
    """From transformers' config.json (v4 or v5)."""
    if hf.get("hidden_act", "silu") != "silu":
      raise InputError(f"hidden_act {hf['hidden_act']!r} is not supported by the llama family (want 'silu')")
    if hf.get("attention_bias") or hf.get("mlp_bias") or hf.get("use_sliding_window"):
      raise InputError("attention_bias, mlp_bias and use_sliding_window are not supported by the llama family "
                       "(want them false in config.json)")
    heads = hf["num_attention_heads"]
    return cls(model_type=hf["model_type"], vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
               intermediate_size=hf["intermediate_size"], num_layers=hf["num_hidden_layers"], num_heads=heads,
               num_kv_heads=hf.get("num_key_value_heads") or heads,
               head_dim=hf.get("head_dim") or (128 if hf["model_type"] == "qwen3" else hf["hidden_size"] // heads),
               max_positions=hf.get("max_position_embeddings", 2048), rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
               rope=Rope.from_hf(hf),
               sliding_window=hf.get("sliding_window", 4096) or 0 if hf["model_type"] == "mistral" else 0,
               tie_embeddings=hf.get("tie_word_embeddings", False),
               initializer_range=hf.get("initializer_range", 0.02),
               attention_dropout=hf.get("attention_dropout") or 0.0, num_labels=hf.get("num_labels", 2),
               pad_token_id=hf.get("pad_token_id"), bos_token_id=hf.get("bos_token_id"),
               eos_token_id=hf.get("eos_token_id"), **runtime)

  def to_hf(self):
    """transformers' config.json of this shape as a sequence classifier, in the v5 and the v4 form at once."""
    window = {"sliding_window": self.sliding_window or None} if self.model_type == "mistral" else {}
    return self.rope.to_hf() | window | {
        "architectures": [f"{ARCHITECTURES[self.model_type]}ForSequenceClassification"], "model_type": self.model_type,
        "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
        "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
        "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim, "hidden_act": "silu",
        "max_position_embeddings": self.max_positions, "rms_norm_eps": self.rms_norm_eps,
        "tie_word_embeddings": self.tie_embeddings, "initializer_range": self.initializer_range,
        "attention_bias": False, "attention_dropout": self.attention_dropout,
        "pad_token_id": self.pad_token_id, "bos_token_id": self.bos_token_id,
        "eos_token_id": self.eos_token_id,
    }


# Our parameter path -> transformers' tensor name ({} is the layer number). Kernels are transposed.
WEIGHT_MAP = (
    ("embed_tokens/embedding", "model.embed_tokens.weight"),
    *((f"layers/attn/{p}_proj/kernel", f"model.layers.{{}}.self_attn.{p}_proj.weight") for p in "qkvo"),
    *((f"layers/attn/{p}_norm/scale", f"model.layers.{{}}.self_attn.{p}_norm.weight") for p in "qk"),
    *((f"layers/attn/{p}_proj/bias", f"model.layers.{{}}.self_attn.{p}_proj.bias") for p in "qkv"),
    *((f"layers/mlp/{p}_proj/kernel", f"model.layers.{{}}.mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
    ("layers/attn_norm/scale", "model.layers.{}.input_layernorm.weight"),
    ("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    ("norm/scale", "model.norm.weight"),
    ("score/kernel", "score.weight"),
)
HEAD_TENSORS = r"score\..*"                                    # a module without any tensor is initialised afresh
UNUSED_TENSORS = r"lm_head\.weight|.*rotary_emb\.inv_freq"     # a language model's output layer; a v4 buffer
BASE_PREFIX = "model."


def rotary(positions, config):
  """cos and sin [B, T, 1, d/2] float32; "dynamic" goes by the longest text of the batch, as in transformers."""
  inverse = config.rope.inverse_frequencies(config.head_dim, config.max_positions, positions.max() + 1)
  angles = positions[..., None].astype(jnp.float32) * inverse
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x, cos, sin):
  """Rotates x [B, T, H, d]; halves are paired (i, i + d/2), as in transformers."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
  config: LlamaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask):
    c = self.config
    def project(name, heads):
      y = layers.Dense(heads * c.head_dim, c.model_type == "qwen2", c.initializer_range, c.lora_dropout, self.train,
                       name=f"{name}_proj")(x)
      y = y.reshape(*x.shape[:2], heads, c.head_dim)
      if c.model_type == "qwen3" and name != "v":
        y = rms_norm(c, f"{name}_norm")(y).astype(x.dtype)
      return y
    q, k = rotate(project("q", c.num_heads), cos, sin), rotate(project("k", c.num_kv_heads), cos, sin)
    v = project("v", c.num_kv_heads)
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0).reshape(*x.shape[:2], -1)
    return layers.Dense(c.hidden_size, False, c.initializer_range, c.lora_dropout, self.train, name="o_proj")(out)


class MLP(nn.Module):
  config: LlamaConfig
  train: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    def dense(width, name):
      return layers.Dense(width, False, c.initializer_range, c.lora_dropout, self.train, name=name)
    gate = nn.silu(dense(c.intermediate_size, "gate_proj")(x))
    return dense(c.hidden_size, "down_proj")(gate * dense(c.intermediate_size, "up_proj")(x))


def rms_norm(config, name):
  return nn.RMSNorm(config.rms_norm_eps, dtype=jnp.float32, name=name)


class Block(nn.Module):
  config: LlamaConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask):
    c = self.config
    x += Attention(c, self.train, name="attn")(rms_norm(c, "attn_norm")(x).astype(x.dtype), cos, sin, mask)
    x += MLP(c, self.train, name="mlp")(rms_norm(c, "mlp_norm")(x).astype(x.dtype))
    return x, None


class LlamaClassifier(nn.Module):
  """Decoder with a `score` head (no bias) on the last real token; left or right padding give the same logits."""
  config: LlamaConfig
  train: bool = False

  @nn.compact
  def __call__(self, input_ids, attention_mask):
    """input_ids, attention_mask: [B, T] int -> ClassifierOutput."""
    c = self.config
    embed = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=nn.initializers.normal(c.initializer_range),
                     name="embed_tokens")
    x = embed(input_ids).astype(c.dtype)
    T = input_ids.shape[1]
    cos, sin = rotary(jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0), c)
    seen = jnp.tril(jnp.ones((T, T), bool))
    if c.sliding_window:
      seen &= ~jnp.tril(seen, -c.sliding_window)
    mask = seen & attention_mask.astype(bool)[:, None, None, :]
    x = layers.layer_stack(Block, c, self.train, x, cos, sin, mask)
    hidden = rms_norm(c, "norm")(x)
    last = T - 1 - jnp.argmax(attention_mask[:, ::-1], axis=1)
    features = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = layers.Dense(c.num_labels, False, c.initializer_range, name="score")(features)
    return layers.ClassifierOutput(logits, features, hidden)
