"""BERT-architecture encoder classifier, and the W2S teacher's widening head. B batch, T tokens, D width, H heads."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from w2s_jax import InputError
from w2s_jax.models import layers


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Shape of the network (transformers' config.json), then our head, then how we run it."""
  model_type: str = "bert"
  vocab_size: int = 30522
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_layers: int = 12
  num_heads: int = 12
  max_positions: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_dropout: float = 0.1         # after the embeddings, attention and feed-forward, while training
  attention_dropout: float = 0.1      # of the attention probabilities, while training
  initializer_range: float = 0.02
  num_labels: int = 2
  pad_token_id: int | None = 0
  feature_width: int = 0              # > 0: the W2S head, Linear(D -> feature_width) -> ReLU = features -> classifier
  dtype: str = "float32"              # of the activations
  remat: str = "none"
  unroll: bool = False
  lora_dropout: float = 0.0

  family = "bert"

  @property
  def feature_size(self):
    return self.feature_width or self.hidden_size

  @classmethod
  def from_hf(cls, hf, **runtime):
    """From transformers' config.json (v4 or v5)."""
    if hf.get("hidden_act", "gelu") != "gelu" or hf.get("position_embedding_type", "absolute") != "absolute":
      raise InputError(f"hidden_act {hf.get('hidden_act')!r} / position_embedding_type "
                       f"{hf.get('position_embedding_type')!r} are not supported (want 'gelu' and 'absolute')")
    return cls(vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], intermediate_size=hf["intermediate_size"],
               num_layers=hf["num_hidden_layers"], num_heads=hf["num_attention_heads"],
               max_positions=hf["max_position_embeddings"], type_vocab_size=hf.get("type_vocab_size", 2),
               layer_norm_eps=hf.get("layer_norm_eps", 1e-12), hidden_dropout=hf.get("hidden_dropout_prob", 0.1),
               attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
               initializer_range=hf.get("initializer_range", 0.02), num_labels=hf.get("num_labels", 2),
               pad_token_id=hf.get("pad_token_id"), **runtime)

  def to_hf(self):
    """transformers' config.json of this shape; with the W2S head only the backbone is theirs (`BertModel`)."""
    return {
        "architectures": ["BertModel" if self.feature_width else "BertForSequenceClassification"],
        "model_type": "bert", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
        "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_layers,
        "num_attention_heads": self.num_heads, "max_position_embeddings": self.max_positions,
        "type_vocab_size": self.type_vocab_size, "layer_norm_eps": self.layer_norm_eps, "hidden_act": "gelu",
        "hidden_dropout_prob": self.hidden_dropout, "attention_probs_dropout_prob": self.attention_dropout,
        "initializer_range": self.initializer_range, "pad_token_id": self.pad_token_id,
    }


# Our parameter path -> transformers' tensor name ({} is the layer number). Kernels are transposed.
WEIGHT_MAP = (
    *((f"embeddings/{name}_embeddings/embedding", f"bert.embeddings.{name}_embeddings.weight")
      for name in ("word", "position", "token_type")),
    *((f"embeddings/norm/{ours}", f"bert.embeddings.LayerNorm.{theirs}")
      for ours, theirs in (("scale", "weight"), ("bias", "bias"))),
    *((f"layers/{ours}/{leaf}", f"bert.encoder.layer.{{}}.{theirs}.{tensor}")
      for ours, theirs in (("attn/q_proj", "attention.self.query"), ("attn/k_proj", "attention.self.key"),
                           ("attn/v_proj", "attention.self.value"), ("attn/o_proj", "attention.output.dense"),
                           ("mlp/up_proj", "intermediate.dense"), ("mlp/down_proj", "output.dense"))
      for leaf, tensor in (("kernel", "weight"), ("bias", "bias"))),
    *((f"layers/{ours}/{leaf}", f"bert.encoder.layer.{{}}.{theirs}.LayerNorm.{tensor}")
      for ours, theirs in (("attn_norm", "attention.output"), ("mlp_norm", "output"))
      for leaf, tensor in (("scale", "weight"), ("bias", "bias"))),
    *((f"{ours}/{leaf}", f"{theirs}.{tensor}")
      for ours, theirs in (("pooler", "bert.pooler.dense"), ("classifier", "classifier"), ("widen", "w2s.widen"))
      for leaf, tensor in (("kernel", "weight"), ("bias", "bias"))),
)
HEAD_TENSORS = r"(bert\.pooler|classifier|w2s)\..*"            # a module without any tensor is initialised afresh
UNUSED_TENSORS = r"bert\.embeddings\.position_ids|cls\..*"     # a v4 buffer; the pretraining heads
BASE_PREFIX = "bert."


class SelfAttention(nn.Module):
  config: BertConfig
  train: bool

  @nn.compact
  def __call__(self, x, mask):
    c = self.config
    def dense(name):
      return layers.Dense(c.hidden_size, True, c.initializer_range, c.lora_dropout, self.train, name=name)
    q, k, v = (dense(name)(x).reshape(*x.shape[:2], c.num_heads, -1) for name in ("q_proj", "k_proj", "v_proj"))
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0)
    return dense("o_proj")(out.reshape(x.shape))


class MLP(nn.Module):
  config: BertConfig
  train: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    def dense(width, name):
      return layers.Dense(width, True, c.initializer_range, c.lora_dropout, self.train, name=name)
    return dense(c.hidden_size, "down_proj")(nn.gelu(dense(c.intermediate_size, "up_proj")(x), approximate=False))


def layer_norm(config, name):
  return nn.LayerNorm(config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def dropout(config, train):
  return nn.Dropout(config.hidden_dropout, deterministic=not train)


class Block(nn.Module):
  config: BertConfig
  train: bool

  @nn.compact
  def __call__(self, x, mask):
    c = self.config
    y = dropout(c, self.train)(SelfAttention(c, self.train, name="attn")(x, mask))
    x = layer_norm(c, "attn_norm")(x + y).astype(x.dtype)
    y = dropout(c, self.train)(MLP(c, self.train, name="mlp")(x))
    return layer_norm(c, "mlp_norm")(x + y).astype(x.dtype), None


class Embeddings(nn.Module):
  config: BertConfig

  @nn.compact
  def __call__(self, input_ids, positions):
    c = self.config
    def embed(size, name):
      return nn.Embed(size, c.hidden_size, embedding_init=nn.initializers.normal(c.initializer_range), name=name)
    x = embed(c.vocab_size, "word_embeddings")(input_ids)
    x += embed(c.max_positions, "position_embeddings")(positions)
    x += embed(c.type_vocab_size, "token_type_embeddings")(jnp.zeros_like(input_ids))
    return layer_norm(c, "norm")(x)


class BertClassifier(nn.Module):
  """Encoder with transformers' pooler and classifier, or with the W2S widening head (`config.feature_width`)."""
  config: BertConfig
  train: bool = False

  @nn.compact
  def __call__(self, input_ids, attention_mask):
    """input_ids, attention_mask: [B, T] int, padded on the right -> ClassifierOutput."""
    c = self.config
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    x = dropout(c, self.train)(Embeddings(c, name="embeddings")(input_ids, positions)).astype(c.dtype)
    x = layers.layer_stack(Block, c, self.train, x, attention_mask.astype(bool)[:, None, None, :])
    hidden = x.astype(jnp.float32)
    features = hidden[:, 0]
    def head(width, name):
      return layers.Dense(width, True, c.initializer_range, name=name)
    if c.feature_width:
      pooled = features = nn.relu(head(c.feature_width, "widen")(features))
    else:
      pooled = jnp.tanh(head(c.hidden_size, "pooler")(features))
    logits = head(c.num_labels, "classifier")(dropout(c, self.train)(pooled))
    return layers.ClassifierOutput(logits, features, hidden)
