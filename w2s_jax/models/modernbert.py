"""ModernBERT encoder: rotary positions, full and sliding-window attention, gated feed-forward, pre-norms.

Warner et al., arXiv 2412.13663. R rows, T tokens, D width, d head width.
"""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, sharding
from w2s_jax.models import family, heads, layers, rotary
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields, short
from w2s_jax.models.hf.formats import Checkpoint, modules

KINDS = ("full_attention", "sliding_attention")                 # kinds of layers
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias")


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(family.EncoderShared):
  """Shape of the network (transformers' config.json) and of our head."""
  model_type: str = "modernbert"
  vocab_size: int = 50368
  hidden_size: int = 768
  intermediate_size: int = 1152
  num_layers: int = 22
  num_heads: int = 12
  max_positions: int = 8192           # largest number of tokens of a training text; longer texts are accepted
  layer_norm_eps: float = 1e-5
  layer_types: tuple = tuple(KINDS[i % 3 > 0] for i in range(22))        # for each layer; further entries are unused
  window: int = 64                    # number of tokens on each side that a token attends to in a sliding layer
  rope_thetas: tuple = (160000.0, 10000.0)                               # rotary bases, in KINDS' order
  attention_bias: bool = False        # of Wqkv and Wo
  mlp_bias: bool = False
  norm_bias: bool = False
  classifier_bias: bool = False       # of the head's dense layer
  decoder_bias: bool = True           # of the language-model logits
  mean_pooling: bool = False          # features are the mean over a text's tokens, not its first token
  embedding_dropout: float = 0.0      # on the embeddings, while training
  attention_dropout: float = 0.0      # on the attention probabilities and after attention, while training
  mlp_dropout: float = 0.0            # inside the feed-forward, while training
  head_dropout: float = 0.0           # before the classifier, while training

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    window, width = fields.integer("local_attention", 128) // 2, fields.integer("hidden_size")
    num_layers, num_heads = fields.integer("num_hidden_layers", high=MOST_LAYERS), fields.integer("num_attention_heads")
    fields.only(hidden_activation="gelu", classifier_activation="gelu", sliding_window=window, rope_scaling=None,
                is_decoder=False)
    if width // num_heads % 2:
      raise InputError(f"hidden_size / num_attention_heads must be even for rotary positions, got {width} / "
                       f"{num_heads}: see the model's config.json")
    fields.only(head_dim=width // num_heads)
    if runtime.get("head") == "lm":
      fields.only(tie_word_embeddings=True)
    return cls(hidden_size=width, intermediate_size=fields.integer("intermediate_size"), num_layers=num_layers,
               num_heads=num_heads, max_positions=fields.integer("max_position_embeddings", 8192),
               layer_norm_eps=fields.positive("norm_eps", 1e-5), layer_types=_layer_types(fields, num_layers),
               window=window, rope_thetas=_rope_thetas(fields),
               **{name: fields.flag(name, name == "decoder_bias") for name in BIASES},
               mean_pooling=fields.string("classifier_pooling", "cls", ("cls", "mean")) == "mean",
               embedding_dropout=fields.rate("embedding_dropout", 0.0), mlp_dropout=fields.rate("mlp_dropout", 0.0),
               attention_dropout=fields.rate("attention_dropout", 0.0),
               head_dropout=fields.rate("classifier_dropout", 0.0), **family.shared_from_hf(fields), **runtime)

  def to_hf(self) -> dict:
    """transformers' config.json for this shape, with the fields of v5 and, if every n-th layer is full, of v4."""
    kinds = list(self.layer_types[:self.num_layers])
    interval = next((n for n in range(1, len(kinds) + 1) if kinds == _turns(n, len(kinds))), None)
    named = ("hidden_size", "intermediate_size", "embedding_dropout", "attention_dropout", "mlp_dropout", *BIASES)
    full, sliding = self.rope_thetas
    return family.shared_to_hf(self) | {name: getattr(self, name) for name in named} | {
        "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads, "norm_eps": self.layer_norm_eps,
        "max_position_embeddings": self.max_positions, "hidden_activation": "gelu", "classifier_activation": "gelu",
        "classifier_pooling": "mean" if self.mean_pooling else "cls", "classifier_dropout": self.head_dropout,
        "local_attention": 2 * self.window, "layer_types": kinds,
        "global_rope_theta": full, "local_rope_theta": sliding,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta}
                            for kind, theta in zip(KINDS, self.rope_thetas)},
    } | ({"global_attn_every_n_layers": interval} if interval else {})


def _turns(interval, num_layers):
  # Every `interval`-th layer, from the first on, has full attention.
  return [KINDS[i % interval > 0] for i in range(num_layers)]


def _layer_types(fields, num_layers):
  """The kind of each layer, from `layer_types` (transformers 5) or `global_attn_every_n_layers` (transformers 4)."""
  interval = fields.integer("global_attn_every_n_layers", 3)
  kinds = fields.layer_types(KINDS, num_layers) or _turns(interval, num_layers)
  if "global_attn_every_n_layers" in fields and kinds != _turns(interval, num_layers):
    raise InputError(f"the model's {fields.where} has layer_types and another global_attn_every_n_layers, {interval}: "
                     "keep one")
  return tuple(kinds)


def _rope_thetas(fields):
  """Rotary bases in KINDS' order, from `rope_parameters` (transformers 5) or a field per kind (transformers 4)."""
  nested, out = fields.section("rope_parameters"), []
  if unknown := sorted(nested.values.keys() - set(KINDS)):
    raise InputError(f"the model's {nested.where} has {short(unknown[0])}: want {' and '.join(KINDS)} alone")
  for kind, name, default in zip(KINDS, ("global_rope_theta", "local_rope_theta"), (160000.0, 10000.0)):
    rope = nested.section(kind)
    rope.only(rope_type="default", type="default")
    if name in fields.values and name not in fields:            # transformers 4 then uses the other kind's base
      raise InputError(f"the model's {fields.where}: {name} is null, wanted a number")
    theta = fields.positive(name, default)
    if "rope_theta" in rope and name in fields:
      rope.only(rope_theta=theta)
    out.append(rope.positive("rope_theta", theta))
  return tuple(out)


class Attention(nn.Module):
  config: ModernBertConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask):
    c = self.config
    fused = layers.linear(c, self.train, 3 * c.hidden_size, "Wqkv", c.attention_bias)(x)
    q, k, v = (y.reshape(*x.shape[:2], c.num_heads, -1) for y in jnp.split(fused, 3, axis=-1))
    q, k = rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin)
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0)
    # Padding further than a window from the text attends to no token. torch's attention then returns 0.
    has_keys = mask.any(axis=-1)[:, 0, :, None, None]
    out = jnp.where(has_keys, out, 0).reshape(x.shape)
    out = layers.linear(c, self.train, c.hidden_size, "Wo", c.attention_bias)(out)
    return layers.dropout(c.attention_dropout, self.train)(out)


class MLP(nn.Module):
  config: ModernBertConfig
  train: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    up, gate = jnp.split(layers.linear(c, self.train, 2 * c.intermediate_size, "Wi", c.mlp_bias)(x), 2, axis=-1)
    hidden = layers.dropout(c.mlp_dropout, self.train)(heads.gelu(up) * gate)
    return layers.linear(c, self.train, c.hidden_size, "Wo", c.mlp_bias)(hidden)


class Block(nn.Module):
  config: ModernBertConfig
  train: bool

  @nn.compact
  def __call__(self, x, cos, sin, masks, kind, is_first):
    """Applies the layer.

    Args:
      cos, sin: [2, 1, T, 1, d/2], for both KINDS.
      masks: [2, R, 1, T, T], for both KINDS.
      kind: index of this layer's kind.
      is_first: whether this is the first layer, which has no attention norm.
    """
    c, x = self.config, sharding.split_rows(x)
    def norm(name):
      return layers.layer_norm(c.layer_norm_eps, name, c.norm_bias)(x).astype(x.dtype)
    normed = jnp.where(is_first, x, norm("attn_norm"))
    x += Attention(c, self.train, name="attn")(normed, cos[kind], sin[kind], masks[kind])
    x += MLP(c, self.train, name="mlp")(norm("mlp_norm"))
    return x, None


class Embeddings(nn.Module):
  config: ModernBertConfig

  @nn.compact
  def __call__(self, input_ids):
    c = self.config
    x = layers.embed(c, c.vocab_size, "word_embeddings", layers.Tokens)(input_ids)
    return layers.layer_norm(c.layer_norm_eps, "norm", c.norm_bias)(x)


def prediction_head(config: ModernBertConfig, name: str | None = None) -> heads.PredictionHead:
  return heads.PredictionHead(config, config.classifier_bias, config.norm_bias, config.decoder_bias, name=name)


class ModernBertClassifier(nn.Module):
  """Encoder with transformers' head, or, if `config.feature_width` is set, with the W2S widening head."""
  config: ModernBertConfig
  train: bool = False

  @staticmethod
  def lm_logits(config: ModernBertConfig, params: dict, hidden: jax.Array) -> jax.Array:
    """See `heads.lm_logits`."""
    return heads.lm_logits(prediction_head(config), params, hidden)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply, with padding on the right, and returns a ClassifierOutput."""
    c, x, T = self.config, stream, input_ids.shape[1]
    embeddings = Embeddings(c, name="embeddings")
    if stream is None:
      x = layers.dropout(c.embedding_dropout, self.train)(embeddings(input_ids)).astype(c.dtype)
    window = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= c.window
    mask = layers.text_mask(segment_ids)
    kinds = np.array([KINDS.index(kind) for kind in c.layer_types])
    places = jnp.arange(T)[None]  # in the row, even with several texts, because scores depend on differences alone
    rotations = [rotary.Rope(rope_theta=theta).cos_sin(places, c.hidden_size // c.num_heads, c.max_positions)
                 for theta in c.rope_thetas]
    cos, sin = (jnp.stack(pair) for pair in zip(*rotations))
    x = layers.layer_stack(Block, c, self.train, x, cos, sin, jnp.stack([mask, mask & window]),
                           per_layer=(kinds, np.arange(len(kinds)) == 0))
    hidden = layers.layer_norm(c.layer_norm_eps, "norm", c.norm_bias)(x)
    features = heads.first_token(hidden, texts)
    if c.mean_pooling and c.head != "lm":
      features = layers.mean_pool(hidden, segment_ids, texts)
    return heads.outputs(c, self.train, embeddings, prediction_head(c, "lm_head"), prediction_head(c, "pooler"),
                         features, hidden, x)


# L layers, F feed-forward width, V vocabulary, W feature width, C classes.
FAMILY = family.Family(
    config=ModernBertConfig, module=ModernBertClassifier,
    tensors={"modernbert": Checkpoint("ModernBert", "model.", {
        "embeddings/word_embeddings/embedding": "model.embeddings.tok_embeddings.weight",
        **modules((f"layers/{block}/{m}", f"model.layers.{{}}.{block}.{m}") for block, m in (
            ("attn", "Wqkv"), ("attn", "Wo"), ("mlp", "Wi"), ("mlp", "Wo"))),
        **modules((("embeddings/norm", "model.embeddings.norm"), ("layers/attn_norm", "model.layers.{}.attn_norm"),
                   ("layers/mlp_norm", "model.layers.{}.mlp_norm"), ("norm", "model.final_norm"),
                   ("pooler/norm", "head.norm"), ("lm_head/norm", "head.norm")), "scale"),
        **modules((("pooler/dense", "head.dense"), ("classifier", "classifier"), ("lm_head/dense", "head.dense"))),
        "lm_head/bias": "decoder.bias",
    }, r"(head|decoder|classifier)\..*", language_model="ForMaskedLM",
        absent=r"model\.layers\.0\.attn_norm\..*")},
    shardings=(
        (r"embeddings/word_embeddings/embedding", P("tensor", "fsdp")),  # [V, D]
        (r"layers/attn/Wqkv/kernel", P(None, "fsdp", "tensor")),         # [L, D, 3*D]: q, k and v side by side
        (r"layers/mlp/Wi/kernel", P(None, "fsdp", "tensor")),            # [L, D, 2*F]: up and gate side by side
        (r"layers/(attn|mlp)/Wo/kernel", P(None, "tensor", "fsdp")),     # [L, D or F, D]
        (r"layers/(attn|mlp)/W(qkv|i|o)/bias", P()),
        (r"(.*/)?(attn_|mlp_)?norm/(scale|bias)", P()),
        (r"((pooler|lm_head)/dense|widen)/kernel", P("fsdp", None)),     # [D, D] and [D, W]
        (r"classifier/kernel", P("fsdp", None)),                         # [D or W, C]
        (r"((pooler|lm_head)/dense|widen|classifier)/bias", P()),
        (r"lm_head/bias", P("tensor")),                                  # [V]
    ),
    vocabulary=("embeddings", "word_embeddings"))
