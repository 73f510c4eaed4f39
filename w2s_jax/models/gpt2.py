"""GPT-2 decoder: learned positions, one fused projection to q, k and v. D width."""

import dataclasses
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from w2s_jax import sharding
from w2s_jax.models import family, layers
from w2s_jax.models.hf.fields import MOST_LAYERS, Fields
from w2s_jax.models.hf.formats import Checkpoint, modules


@dataclasses.dataclass(frozen=True)
class GPT2Config(family.SharedConfig):
  """Shape of the network (transformers' config.json)."""
  model_type: str = "gpt2"
  vocab_size: int = 50257
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_layers: int = 12
  num_heads: int = 12
  max_positions: int = 1024
  layer_norm_eps: float = 1e-5
  tie_embeddings: bool = True
  embedding_dropout: float = 0.1      # on the embeddings, while training
  hidden_dropout: float = 0.1         # after attention and feed-forward, while training
  attention_dropout: float = 0.1      # on the attention probabilities, while training
  bos_token_id: int | None = None
  eos_token_id: int | tuple | None = None

  @classmethod
  def from_hf(cls, fields: Fields, **runtime: Any) -> Self:
    """Reads transformers' config.json (v4 or v5)."""
    fields.only(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                add_cross_attention=False)
    fields.one_of(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
                  max_position_embeddings="n_positions")
    width = fields.integer("n_embd")
    return cls(hidden_size=width, intermediate_size=fields.integer("n_inner", 4 * width),
               num_layers=fields.integer("n_layer", high=MOST_LAYERS), num_heads=fields.integer("n_head"),
               max_positions=fields.integer("n_positions", 1024),
               layer_norm_eps=fields.positive("layer_norm_epsilon", 1e-5),
               embedding_dropout=fields.rate("embd_pdrop", 0.1), hidden_dropout=fields.rate("resid_pdrop", 0.1),
               attention_dropout=fields.rate("attn_pdrop", 0.1),
               **family.decoder_from_hf(fields, tied=True), **runtime)

  def to_hf(self) -> dict:
    return family.decoder_to_hf(self) | {
        "n_embd": self.hidden_size, "n_inner": self.intermediate_size, "n_layer": self.num_layers,
        "n_head": self.num_heads, "n_positions": self.max_positions, "layer_norm_epsilon": self.layer_norm_eps,
        "embd_pdrop": self.embedding_dropout, "resid_pdrop": self.hidden_dropout,
        "attn_pdrop": self.attention_dropout, "activation_function": "gelu_new"}


class Attention(nn.Module):
  config: GPT2Config
  train: bool

  @nn.compact
  def __call__(self, x, mask):
    c = self.config
    fused = layers.linear(c, self.train, 3 * c.hidden_size, "c_attn")(x)
    q, k, v = (y.reshape(*x.shape[:2], c.num_heads, -1) for y in jnp.split(fused, 3, axis=-1))
    out = layers.attention(q, k, v, mask, c.attention_dropout if self.train else 0.0)
    return layers.linear(c, self.train, c.hidden_size, "c_proj")(out.reshape(x.shape))


class MLP(nn.Module):
  config: GPT2Config
  train: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    hidden = nn.gelu(layers.linear(c, self.train, c.intermediate_size, "c_fc")(x))
    return layers.linear(c, self.train, c.hidden_size, "c_proj")(hidden)


class Block(nn.Module):
  config: GPT2Config
  train: bool

  @nn.compact
  def __call__(self, x, mask):
    c, x = self.config, sharding.split_rows(x)
    def dropped(y):
      return layers.dropout(c.hidden_dropout, self.train)(y)
    def norm(name):
      return layers.layer_norm(c.layer_norm_eps, name)(x).astype(x.dtype)
    x += dropped(Attention(c, self.train, name="attn")(norm("attn_norm"), mask))
    x += dropped(MLP(c, self.train, name="mlp")(norm("mlp_norm")))
    return x, None


class GPT2Classifier(nn.Module):
  """Decoder whose head reads the last token that is not padding. Left and right padding give the same logits."""
  config: GPT2Config
  train: bool = False

  lm_logits = staticmethod(layers.next_token_logits)

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    """Takes the arguments of Model.apply and returns a ClassifierOutput."""
    c, x = self.config, stream
    embed_tokens = layers.embed(c, c.vocab_size, "embed_tokens", layers.Tokens)
    if stream is None:
      x = embed_tokens(input_ids)
      x += layers.embed(c, c.max_positions, "position_embeddings")(layers.real_positions(segment_ids))
      x = layers.dropout(c.embedding_dropout, self.train)(x).astype(c.dtype)
    x = layers.layer_stack(Block, c, self.train, x, layers.causal_mask(segment_ids))
    norm = layers.layer_norm(c.layer_norm_eps, "norm")
    return layers.decoder_head(c, embed_tokens, norm, x, input_ids, segment_ids, texts)


# L layers, F feed-forward width, V vocabulary, C classes.
FAMILY = family.Family(
    config=GPT2Config, module=GPT2Classifier,
    tensors={"gpt2": Checkpoint("GPT2", "transformer.", {
        "embed_tokens/embedding": "transformer.wte.weight", "position_embeddings/embedding": "transformer.wpe.weight",
        **modules((f"layers/{block}/{m}", f"transformer.h.{{}}.{block}.{m}") for block, m in (
            ("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))),
        **modules((("layers/attn_norm", "transformer.h.{}.ln_1"), ("layers/mlp_norm", "transformer.h.{}.ln_2"),
                   ("norm", "transformer.ln_f")), "scale"),
        "score/kernel": "score.weight", "lm_head/embedding": "lm_head.weight",
    }, unused=r"score\.weight|lm_head\.weight|transformer\.h\.\d+\.attn\.(masked_)?bias", transposed=False,
        language_model="LMHeadModel")},
    shardings=(
        (r"embed_tokens/embedding", P("tensor", "fsdp")),                # [V, D]
        (r"position_embeddings/embedding", P(None, "fsdp")),             # [positions, D]
        (r"layers/attn/c_attn/kernel", P(None, "fsdp", "tensor")),       # [L, D, 3*D]: q, k and v side by side
        (r"layers/mlp/c_fc/kernel", P(None, "fsdp", "tensor")),          # [L, D, F]
        (r"layers/(attn|mlp)/c_proj/kernel", P(None, "tensor", "fsdp")),  # [L, D or F, D]
        (r"layers/.*/bias", P()),
        (r"(layers/(attn|mlp)_)?norm/scale", P()),
        (r"norm/bias", P()),
        (r"score/kernel", P("fsdp", None)),                              # [D, C]
        (r"lm_head/embedding", P("tensor", "fsdp")),                     # [V, D]
    ),
    vocabulary=("embed_tokens",))
