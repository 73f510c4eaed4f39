"""Encoder classifiers BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and ELECTRA, also with the W2S widening head.

D width, E width of the embeddings, which differs from D in ELECTRA alone.
"""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from w2s_jax import sharding
from w2s_jax.models import family, heads, layers
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields
from w2s_jax.models.hf.formats import Checkpoint, modules

ROBERTAS = ("roberta", "xlm-roberta", "camembert")          # one architecture, trained on different texts
# {name of a config.json field in BERT and RoBERTa: its name in DistilBERT}
DISTILBERT = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
              "num_attention_heads": "n_heads", "hidden_dropout_prob": "dropout",
              "attention_probs_dropout_prob": "attention_dropout", "classifier_dropout": "seq_classif_dropout",
              "hidden_act": "activation"}


@dataclasses.dataclass(frozen=True)
class EncoderConfig(family.EncoderShared):
  """Shape of the network (transformers' config.json) and of our head."""
  model_type: str = "bert"            # ROBERTAS: positions start at pad_token_id + 1; distilbert: no token types
  vocab_size: int = 30522
  embedding_size: int = 0             # E, if it differs from hidden_size (electra); 0: hidden_size
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_layers: int = 12
  num_heads: int = 12
  max_positions: int = 512            # largest number of tokens of a text
  type_vocab_size: int = 2            # 0: no token types
  layer_norm_eps: float = 1e-12
  hidden_dropout: float = 0.1         # after the embeddings, attention and feed-forward, while training
  attention_dropout: float = 0.1      # on the attention probabilities, while training
  head_dropout: float = 0.1           # before the classifier, in ROBERTAS and electra also before the pooler
  pad_token_id: int | None = 0

  @property
  def position_offset(self) -> int:
    """Number of rows at the start of the position table that no real token uses."""
    return self.pad_token_id + 1 if self.model_type in ROBERTAS else 0

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    model_type = fields.values["model_type"]
    names = DISTILBERT if model_type == "distilbert" else {}
    def name(field):
      return names.get(field, field)
    fields.only(**{name("hidden_act"): "gelu"}, position_embedding_type="absolute", is_decoder=False,
                add_cross_attention=False)
    fields.one_of(**{field: other for field, other in names.items() if field.startswith(("num_", "hidden_size"))})
    if runtime.get("head") == "lm":
      fields.only(tie_word_embeddings=True)
    shared, offset = family.shared_from_hf(fields), 0
    if model_type in ROBERTAS:
      shared["pad_token_id"] = fields.integer("pad_token_id", 1, 0)
      offset = shared["pad_token_id"] + 1
    hidden_dropout, width = fields.rate(name("hidden_dropout_prob"), 0.1), fields.integer(name("hidden_size"))
    narrow = fields.integer("embedding_size", 128) if model_type == "electra" else width
    return cls(
        model_type=model_type, hidden_size=width, embedding_size=0 if narrow == width else narrow,
        intermediate_size=fields.integer(name("intermediate_size")),
        num_layers=fields.integer(name("num_hidden_layers"), high=MOST_LAYERS),
        num_heads=fields.integer(name("num_attention_heads")),
        max_positions=fields.integer("max_position_embeddings", low=offset + 1) - offset,
        type_vocab_size=0 if model_type == "distilbert" else fields.integer("type_vocab_size", 2),
        layer_norm_eps=1e-12 if model_type == "distilbert" else fields.positive("layer_norm_eps", 1e-12),
        hidden_dropout=hidden_dropout,
        attention_dropout=fields.rate(name("attention_probs_dropout_prob"), 0.1),
        head_dropout=fields.rate(name("classifier_dropout"), 0.2 if model_type == "distilbert" else hidden_dropout),
        **shared, **runtime)

  def to_hf(self) -> dict:
    """transformers' config.json for this shape. With the W2S head it describes the backbone alone."""
    fields = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
              "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads, "hidden_act": "gelu",
              "hidden_dropout_prob": self.hidden_dropout, "attention_probs_dropout_prob": self.attention_dropout,
              "classifier_dropout": self.head_dropout}
    if self.model_type == "distilbert":
      fields = {DISTILBERT[name]: value for name, value in fields.items()}
    else:
      fields |= {"type_vocab_size": self.type_vocab_size, "layer_norm_eps": self.layer_norm_eps}
    if self.model_type == "electra":
      fields["embedding_size"] = self.embedding_size or self.hidden_size
    return fields | family.shared_to_hf(self) | {"max_position_embeddings": self.max_positions + self.position_offset}


class SelfAttention(nn.Module):
  config: EncoderConfig
  train: bool

  @nn.compact
  def __call__(self, x, mask):
    c = self.config
    def dense(name):
      return layers.linear(c, self.train, c.hidden_size, name)
    q, k, v = (dense(name)(x).reshape(*x.shape[:2], c.num_heads, -1) for name in ("q_proj", "k_proj", "v_proj"))
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0)
    return dense("o_proj")(out.reshape(x.shape))


class MLP(nn.Module):
  config: family.SharedConfig
  train: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    up = layers.linear(c, self.train, c.intermediate_size, "up_proj")(x)
    return layers.linear(c, self.train, c.hidden_size, "down_proj")(heads.gelu(up))


class Block(nn.Module):
  config: family.EncoderShared
  train: bool
  attention: type[nn.Module] = SelfAttention

  @nn.compact
  def __call__(self, x, mask, *others):
    """others: further arguments of the family's attention module."""
    c, x = self.config, sharding.split_rows(x)
    def add(y, name):
      y = layers.dropout(c.hidden_dropout, self.train)(y)
      return layers.layer_norm(c.layer_norm_eps, name)(x + y).astype(x.dtype)
    x = add(self.attention(c, self.train, name="attn")(x, mask, *others), "attn_norm")
    return add(MLP(c, self.train, name="mlp")(x), "mlp_norm"), None


class Embeddings(nn.Module):
  config: EncoderConfig

  @nn.compact
  def __call__(self, input_ids, segment_ids, packed):
    c = self.config
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    if packed:  # without packing, positions include padding on the left, like in transformers
      positions -= layers.text_starts(segment_ids)
    if c.model_type in ROBERTAS:  # padding has position pad_token_id, real tokens count from pad_token_id + 1
      real = input_ids != c.pad_token_id
      positions = layers.count_in_text(real, segment_ids) * real + c.pad_token_id
    def embed(size, name, kind=nn.Embed):
      return layers.embed(c, size, name, kind, c.embedding_size)
    x = embed(c.vocab_size, "word_embeddings", layers.Tokens)(input_ids)
    x += embed(c.max_positions + c.position_offset, "position_embeddings")(positions)
    if c.type_vocab_size:
      x += embed(c.type_vocab_size, "token_type_embeddings")(jnp.zeros_like(input_ids))
    return layers.layer_norm(c.layer_norm_eps, "norm")(x)


class EncoderClassifier(nn.Module):
  """Encoder with transformers' pooler and classifier, or, if `config.feature_width` is set, with the W2S widening head.
  """
  config: EncoderConfig
  train: bool = False

  lm_logits = staticmethod(heads.masked_lm_logits)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply, with padding on the right, and returns a ClassifierOutput."""
    c, x = self.config, stream
    embeddings = Embeddings(c, name="embeddings")
    if stream is None:
      x = embeddings(input_ids, segment_ids, texts is not None)
      x = layers.dropout(c.hidden_dropout, self.train)(x).astype(c.dtype)
      if c.embedding_size:
        x = layers.Dense(c.hidden_size, True, c.initializer_range, name="embeddings_project")(x)
    x = layers.layer_stack(Block, c, self.train, x, layers.text_mask(segment_ids))
    def pooler(pooled):
      if c.model_type in (*ROBERTAS, "electra"):
        pooled = layers.dropout(c.head_dropout, self.train)(pooled)
      pooled = layers.Dense(c.hidden_size, True, c.initializer_range, name="pooler")(pooled)
      return {"distilbert": nn.relu, "electra": heads.gelu}.get(c.model_type, jnp.tanh)(pooled)
    hidden = x.astype(jnp.float32)
    return heads.outputs(c, self.train, embeddings, heads.PredictionHead(c, name="lm_head"), pooler,
                         heads.first_token(hidden, texts), hidden, x)


def _tensors(name, prefix, embeddings, layer, parts, head, lm_head, unused):
  """The Checkpoint of one model type, from transformers' module names.

  Args:
    parts: modules of a layer, in the order q, k, v, o, norm, up, down, norm.
    head: (our module, transformers' module) pairs of the classifier's head.
    lm_head: the language-model head's dense layer, its norm, and the module that has its bias.
  """
  q, k, v, o, attn_norm, up, down, mlp_norm = (f"{prefix}{layer}.{{}}.{part}" for part in parts)
  return Checkpoint(name, prefix, {
      **{f"embeddings/{e}_embeddings/embedding": f"{prefix}embeddings.{e}_embeddings.weight" for e in embeddings},
      **modules((("layers/attn/q_proj", q), ("layers/attn/k_proj", k), ("layers/attn/v_proj", v),
                 ("layers/attn/o_proj", o), ("layers/mlp/up_proj", up), ("layers/mlp/down_proj", down))),
      **modules((("embeddings/norm", f"{prefix}embeddings.LayerNorm"), ("layers/attn_norm", attn_norm),
                 ("layers/mlp_norm", mlp_norm)), "scale"),
      **modules(head),
      **modules((("lm_head/dense", lm_head[0]),)), **modules((("lm_head/norm", lm_head[1]),), "scale"),
      "lm_head/bias": f"{lm_head[2]}.bias",
  }, unused, language_model="ForMaskedLM")


_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
_DISTILBERT = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
               "ffn.lin1", "ffn.lin2", "output_layer_norm")
# Rules for the leaves that these encoders and DeBERTa share. L layers, F feed-forward width, V vocabulary,
# W feature width, C classes.
SHARDINGS = (
    (r"embeddings/word_embeddings/embedding", P("tensor", "fsdp")),      # [V, E]
    (r"layers/attn/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor")),     # [L, D, D]
    (r"layers/attn/o_proj/kernel", P(None, "tensor", "fsdp")),           # [L, D, D]
    (r"layers/mlp/up_proj/kernel", P(None, "fsdp", "tensor")),           # [L, D, F]
    (r"layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),         # [L, F, D]
    (r"layers/(attn|mlp)/.*/bias", P()),
    (r"(embeddings/norm|layers/(attn|mlp)_norm|lm_head/norm)/(scale|bias)", P()),
    (r"(pooler|widen|lm_head/dense)/kernel", P("fsdp", None)),           # [D, D], [D, W] and [D, E]
    (r"classifier/kernel", P("fsdp", None)),                             # [D or W, C]
    (r"(pooler|widen|classifier|lm_head/dense)/bias", P()),
    (r"lm_head/bias", P("tensor")),                                      # [V]
)
FAMILY = family.Family(
    config=EncoderConfig, module=EncoderClassifier,
    tensors={
        "bert": _tensors(
            "Bert", "bert.", ("word", "position", "token_type"), "encoder.layer", _BERT,
            (("pooler", "bert.pooler.dense"), ("classifier", "classifier")),
            ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
            r"bert\.embeddings\.position_ids|bert\.pooler\.dense\..*|classifier\.(weight|bias)|cls\..*"),
        **{model_type: _tensors(
            name, "roberta.", ("word", "position", "token_type"), "encoder.layer", _BERT,
            (("pooler", "classifier.dense"), ("classifier", "classifier.out_proj")),
            ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
            r"roberta\.embeddings\.position_ids|(roberta\.pooler|lm_head|classifier)\..*")
           for model_type, name in zip(ROBERTAS, ("Roberta", "XLMRoberta", "Camembert"))},
        "distilbert": _tensors(
            "DistilBert", "distilbert.", ("word", "position"), "transformer.layer", _DISTILBERT,
            (("pooler", "pre_classifier"), ("classifier", "classifier")),
            ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
            r"distilbert\.embeddings\.position_ids"
            r"|(vocab_(transform|layer_norm|projector)|(pre_)?classifier)\..*"),
        "electra": _tensors(
            "Electra", "electra.", ("word", "position", "token_type"), "encoder.layer", _BERT,
            (("embeddings_project", "electra.embeddings_project"), ("pooler", "classifier.dense"),
             ("classifier", "classifier.out_proj")),
            ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
            r"electra\.embeddings\.position_ids"
            r"|(generator_(predictions|lm_head)|discriminator_predictions|classifier)\..*")},
    shardings=(
        (r"embeddings/(position|token_type)_embeddings/embedding", P(None, "fsdp")),  # [positions, E]
        (r"embeddings_project/kernel", P(None, "fsdp")),                 # [E, D]
        (r"embeddings_project/bias", P()),
        *SHARDINGS,
    ),
    vocabulary=("embeddings", "word_embeddings"))
