"""DeBERTa-v2 and -v3 encoder with disentangled attention (He et al., arXiv 2006.03654).

An attention score depends on the contents of two tokens and on the distance between them. R rows, T tokens per row,
D width, S = 2 T - 1 distances within a row, M rows of the distance table.
"""

import dataclasses
import functools
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError
from w2s_jax.models import encoder, family, heads, layers
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields, short
from w2s_jax.models.hf.formats import Checkpoint, modules

TERMS = ("c2p", "p2c")     # terms of a score besides content to content: content to position, position to content


@dataclasses.dataclass(frozen=True)
class DebertaConfig(family.EncoderShared):
  """Shape of the network (transformers' config.json) and of our head."""
  model_type: str = "deberta-v2"
  vocab_size: int = 128100
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_layers: int = 12
  num_heads: int = 12
  max_positions: int = 512            # largest intended number of tokens of a text; the network accepts longer ones
  max_distance: int = 512             # in tokens; larger distances are treated as this one
  distance_buckets: int = 256         # rows per side, the far half of them log-spaced; 0: one row per distance
  terms: tuple[str, ...] = TERMS
  share_keys: bool = True             # the tokens' q_proj and k_proj also project the distances
  norm_distances: bool = True         # apply a layer norm to the distance table
  layer_norm_eps: float = 1e-7
  hidden_dropout: float = 0.1         # after embeddings, attention and feed-forward, and on distances, while training
  attention_dropout: float = 0.1      # on the attention probabilities, while training
  pooler_dropout: float = 0.0         # before the pooler, while training
  head_dropout: float = 0.1           # before the classifier, while training
  pad_token_id: int | None = 0

  @property
  def span(self) -> int:
    """M / 2, the number of rows of the distance table for keys on one side of a query."""
    return self.distance_buckets or self.max_distance

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    for name, wanted in (("relative_attention", True), ("position_biased_input", False)):
      if fields.flag(name, not wanted) != wanted:          # transformers' default is `not wanted`
        raise InputError(f"the model's config.json: {name} {str(not wanted).lower()}, or none, is not supported (want "
                         f"{str(wanted).lower()})")
    fields.only(hidden_act="gelu", pooler_hidden_act="gelu", type_vocab_size=0, conv_kernel_size=0,
                embedding_size=width, pooler_hidden_size=width, attention_head_size=width // num_heads)
    if runtime.get("head") == "lm":
      fields.only(tie_word_embeddings=True, legacy=True)
    positions = fields.integer("max_position_embeddings", 512)
    distance = fields.integer("max_relative_positions", -1, -1)
    distance = distance if distance > 0 else positions
    buckets = max(fields.integer("position_buckets", -1, -1), 0)
    if buckets:                                            # beyond these bounds `distance_rows` would divide by 0
      fields.integer("position_buckets", low=2, high=2 * distance - 3)
    hidden_dropout = fields.rate("hidden_dropout_prob", 0.1)
    return cls(
        hidden_size=width, intermediate_size=fields.integer("intermediate_size"), num_heads=num_heads,
        num_layers=fields.integer("num_hidden_layers", high=MOST_LAYERS), max_positions=positions,
        max_distance=distance, distance_buckets=buckets, terms=_terms(fields),
        share_keys=fields.flag("share_att_key", False),
        norm_distances=fields.string("norm_rel_ebd", "none", ("none", "layer_norm")) == "layer_norm",
        layer_norm_eps=fields.positive("layer_norm_eps", 1e-7), hidden_dropout=hidden_dropout,
        attention_dropout=fields.rate("attention_probs_dropout_prob", 0.1),
        pooler_dropout=fields.rate("pooler_dropout", 0.0), head_dropout=fields.rate("cls_dropout", hidden_dropout),
        **family.shared_from_hf(fields), **runtime)

  def to_hf(self) -> dict:
    """transformers' config.json for this shape. With the W2S head it describes the backbone alone."""
    return family.shared_to_hf(self) | {
        "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
        "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads, "hidden_act": "gelu",
        "max_position_embeddings": self.max_positions, "type_vocab_size": 0, "position_biased_input": False,
        "relative_attention": True, "max_relative_positions": self.max_distance,
        "position_buckets": self.distance_buckets or -1, "pos_att_type": list(self.terms),
        "share_att_key": self.share_keys, "norm_rel_ebd": "layer_norm" if self.norm_distances else "none",
        "layer_norm_eps": self.layer_norm_eps, "hidden_dropout_prob": self.hidden_dropout,
        "attention_probs_dropout_prob": self.attention_dropout, "pooler_dropout": self.pooler_dropout,
        "pooler_hidden_act": "gelu", "pooler_hidden_size": self.hidden_size, "cls_dropout": self.head_dropout}


def _terms(fields):
  """The names in `pos_att_type`, in the order of TERMS. The field is a list, or a string with | between the names."""
  value = fields.values.get("pos_att_type")
  names = [part.strip() for part in value.lower().split("|")] if isinstance(value, str) else value
  if not (isinstance(names, list) and names and all(name in TERMS for name in names)):
    raise InputError(f"the model's config.json: pos_att_type is {short(value)}, wanted c2p, p2c or c2p|p2c")
  return tuple(term for term in TERMS if term in names)


def distance_rows(config: DebertaConfig, tokens: int) -> np.ndarray:
  """[S] int, the row of the distance table for each distance from 1 - T to T - 1.

  A distance is the query's position minus the key's. The logarithm is computed in float32, like in transformers'
  make_log_bucket_position, so that values near an integer are rounded in the same way.
  """
  distance, span = np.arange(1 - tokens, tokens), config.span
  if config.distance_buckets:
    middle = config.distance_buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
    share = np.log(far) / np.log(np.float32((config.max_distance - 1) / middle))
    bucket = np.ceil(share * np.float32(middle - 1)).astype(int) + middle
    distance = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * bucket)
  return np.clip(distance + span, 0, 2 * span - 1)


def by_key(scores: jax.Array) -> jax.Array:
  """[..., T, S] scores of each token at offsets from 1 - T to T - 1 -> [..., T, T] scores with each other token.

  Row t needs the T scores from index T - 1 - t on. Padding and reshaping shift them into place, in 0.10 CPU seconds
  forward and backward. A gather from the scores of the M table rows takes 0.18 (our measurement: 8 rows of 128 tokens,
  12 heads of width 64, M 512).
  """
  *front, T, S = scores.shape
  flat = jnp.pad(scores, [(0, 0)] * len(front) + [(0, 0), (0, 1)]).reshape(*front, -1)
  return flat[..., T - 1:T - 1 + T * S].reshape(*front, T, S)[..., :T]


class SelfAttention(nn.Module):
  config: DebertaConfig
  train: bool

  @nn.compact
  def __call__(self, x, mask, distances):
    """distances: [S, D], embeddings of the distances in ascending order."""
    c = self.config
    dense = functools.partial(layers.linear, c, self.train, c.hidden_size)
    def split_heads(y):
      return y.reshape(*y.shape[:-1], c.num_heads, -1)
    query, key = dense("q_proj"), dense("k_proj")
    q, k, v = split_heads(query(x)), split_heads(key(x)), split_heads(dense("v_proj")(x))
    distances = layers.dropout(c.hidden_dropout, self.train)(distances)
    bias = 0.0
    if "c2p" in c.terms:
      # Reversed, because the key's offset from the query ascends as the distance falls.
      distance_keys = split_heads((key if c.share_keys else dense("pos_k_proj"))(distances[::-1]))
      bias += by_key(jnp.einsum("rqhd,shd->rhqs", q, distance_keys))
    if "p2c" in c.terms:
      distance_queries = split_heads((query if c.share_keys else dense("pos_q_proj"))(distances))
      bias += by_key(jnp.einsum("rkhd,shd->rhks", k, distance_queries)).swapaxes(-1, -2)
    scale = (q.shape[-1] * (1 + len(c.terms)))**-0.5
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0, bias * scale, scale)
    return dense("o_proj")(out.reshape(x.shape))


class Block(encoder.Block):
  attention: type[nn.Module] = SelfAttention


class Embeddings(nn.Module):
  config: DebertaConfig

  @nn.compact
  def __call__(self, input_ids, segment_ids):
    c = self.config
    x = layers.embed(c, c.vocab_size, "word_embeddings", layers.Tokens)(input_ids)
    x = layers.layer_norm(c.layer_norm_eps, "norm")(x)
    return jnp.where((segment_ids > 0)[..., None], x, 0)


class DebertaClassifier(nn.Module):
  """Encoder with transformers' pooler and classifier, or, if `config.feature_width` is set, with the W2S widening head.

  Without packing, the pooler reads the first token of a row, like transformers. With padding on the left this is a
  padding token. The embedding of padding is 0, and padding attends to all tokens with equal weights.
  """
  config: DebertaConfig
  train: bool = False

  lm_logits = staticmethod(heads.masked_lm_logits)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply, with padding on the right, and returns a ClassifierOutput."""
    c, x = self.config, stream
    embeddings = Embeddings(c, name="embeddings")
    if stream is None:
      x = layers.dropout(c.hidden_dropout, self.train)(embeddings(input_ids, segment_ids)).astype(c.dtype)
    distances = layers.embed(c, 2 * c.span, "distance_embeddings")(distance_rows(c, segment_ids.shape[1]))
    if c.norm_distances:
      distances = layers.layer_norm(c.layer_norm_eps, "distance_norm")(distances)
    mask = layers.text_mask(segment_ids) & (segment_ids > 0)[:, None, :, None]
    x = layers.layer_stack(Block, c, self.train, x, mask, distances.astype(c.dtype))
    def pooler(pooled):
      pooled = layers.dropout(c.pooler_dropout, self.train)(pooled)
      return heads.gelu(layers.Dense(c.hidden_size, True, c.initializer_range, name="pooler")(pooled))
    hidden = x.astype(jnp.float32)
    return heads.outputs(c, self.train, embeddings, heads.PredictionHead(c, name="lm_head"), pooler,
                         heads.first_token(hidden, texts), hidden, x)


_LAYER = "deberta.encoder.layer.{}"
FAMILY = family.Family(
    config=DebertaConfig, module=DebertaClassifier,
    tensors={"deberta-v2": Checkpoint("DebertaV2", "deberta.", {
        "embeddings/word_embeddings/embedding": "deberta.embeddings.word_embeddings.weight",
        "distance_embeddings/embedding": "deberta.encoder.rel_embeddings.weight",
        **modules((f"layers/attn/{ours}_proj", f"{_LAYER}.attention.self.{theirs}_proj") for ours, theirs in (
            ("q", "query"), ("k", "key"), ("v", "value"), ("pos_q", "pos_query"), ("pos_k", "pos_key"))),
        **modules((("layers/attn/o_proj", f"{_LAYER}.attention.output.dense"),
                   ("layers/mlp/up_proj", f"{_LAYER}.intermediate.dense"),
                   ("layers/mlp/down_proj", f"{_LAYER}.output.dense"),
                   ("pooler", "pooler.dense"), ("classifier", "classifier"),
                   ("lm_head/dense", "cls.predictions.transform.dense"))),
        **modules((("embeddings/norm", "deberta.embeddings.LayerNorm"), ("distance_norm", "deberta.encoder.LayerNorm"),
                   ("layers/attn_norm", f"{_LAYER}.attention.output.LayerNorm"),
                   ("layers/mlp_norm", f"{_LAYER}.output.LayerNorm"),
                   ("lm_head/norm", "cls.predictions.transform.LayerNorm")), "scale"),
        "lm_head/bias": "cls.predictions.bias",
    }, unused=r"deberta\.embeddings\.(position_ids|position_embeddings\.weight)"     # in Microsoft's files
              r"|(pooler\.dense|classifier)\.(weight|bias)|(cls|(lm|mask)_predictions)\..*",
        language_model="ForMaskedLM")},
    shardings=(
        (r"distance_embeddings/embedding", P(None, "fsdp")),             # [M, D]
        (r"distance_norm/(scale|bias)", P()),
        (r"layers/attn/pos_(q|k)_proj/kernel", P(None, "fsdp", "tensor")),  # [L, D, D]
        *encoder.SHARDINGS,
    ),
    vocabulary=("embeddings", "word_embeddings"))
