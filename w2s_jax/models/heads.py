"""Heads of encoders: classes from a text's pooled vector, the vocabulary from a token's.

B texts, D width, E embeddings' width, V vocabulary, C classes.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from w2s_jax import InputError
from w2s_jax.models import layers
from w2s_jax.models.family import SharedConfig

gelu = functools.partial(nn.gelu, approximate=False)


class PredictionHead(nn.Module):
  """Dense, GELU, norm: in masked language models before the vocabulary, in ModernBERT before the classes too."""
  config: SharedConfig
  dense_bias: bool = True
  norm_bias: bool = True
  vocabulary_bias: bool = True

  @nn.compact
  def __call__(self, x, table=None):
    """x: [..., D]; table: the word embeddings [V, E] -> logits [..., V]; None -> [..., D]."""
    c = self.config
    width = c.hidden_size if table is None else table.shape[1]
    x = gelu(layers.Dense(width, self.dense_bias, c.initializer_range, name="dense")(x))
    x = layers.layer_norm(c.layer_norm_eps, "norm", self.norm_bias)(x)
    if table is None:
      return x
    logits = x @ table.T.astype(x.dtype)
    return logits + self.param("bias", nn.initializers.zeros, (len(table),)) if self.vocabulary_bias else logits


def lm_logits(head: PredictionHead, params: dict, hidden: jax.Array) -> jax.Array:
  """An encoder's logits [..., V] of the token in each place, from hidden [..., D].

  Raises:
    InputError: the model has a classifier for its head.
  """
  if head.config.head != "lm":
    raise InputError(layers.NO_LANGUAGE_MODEL)
  table = params["embeddings"]["word_embeddings"]["embedding"]
  return head.apply({"params": params["lm_head"]}, hidden, table)


def masked_lm_logits(config: SharedConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """As `lm_logits`, of a language-model head without options."""
  return lm_logits(PredictionHead(config), params, hidden)


def outputs(config: SharedConfig, train: bool, embeddings: nn.Module, predict: nn.Module,
            pooler: Callable[[jax.Array], jax.Array], features: jax.Array, hidden: jax.Array,
            stream: jax.Array) -> layers.ClassifierOutput:
  """What an encoder returns, by `config.head`; for use inside a compact module.

  Args:
    embeddings: its table of the vocabulary is called "word_embeddings".
    predict: (features, table [V, E]) -> language-model logits [B, V], for config.head "lm".
    pooler: see `classify`, for the other heads.
    features: [B, D], the pooled vectors.
    hidden, stream: see ClassifierOutput.
  """
  if config.head == "lm":
    table = embeddings.variables["params"]["word_embeddings"]["embedding"]
    return layers.ClassifierOutput(predict(features, table), features, hidden, stream)
  logits, features = classify(config, train, features, pooler)
  return layers.ClassifierOutput(logits, features, hidden, stream)


def first_token(hidden: jax.Array, texts: jax.Array | None) -> jax.Array:
  """[B, D], each text's first token of hidden [R, T, D]; texts: see Model.apply."""
  return layers.pool(hidden, jnp.zeros((len(hidden), 1), int) if texts is None else texts[..., 0])


def classify(config: SharedConfig, train: bool, features: jax.Array,
             pooler: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
  """(logits [B, C], features) of the pooled vectors [B, D]; for use inside a compact module.

  Args:
    pooler: the layers of the family's own head between the pooled vector and its dropout and classifier. With
      config.feature_width the W2S teacher's widening layer stands for them, and what it gives are the features.
  """
  def dense(width, name):
    return layers.Dense(width, True, config.initializer_range, name=name)
  if config.feature_width:
    pooled = features = nn.relu(dense(config.feature_width, "widen")(features))
  else:
    pooled = pooler(features)
  return dense(config.num_labels, "classifier")(layers.dropout(config.head_dropout, train)(pooled)), features
