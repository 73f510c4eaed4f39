"""Heads of encoders: the classifier on a text's pooled vector, and the language-model head on any token's vector.

B texts, D width, E width of the embeddings, V vocabulary, C classes.
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
  """Dense layer, GELU and layer norm before a masked language model's logits. ModernBERT's classifier has them too."""
  config: SharedConfig
  dense_bias: bool = True
  norm_bias: bool = True
  vocabulary_bias: bool = True

  @nn.compact
  def __call__(self, x, table=None):
    """x: [..., D]; table: the word embeddings [V, E]. Returns logits [..., V], or [..., D] without a table."""
    c = self.config
    width = c.hidden_size if table is None else table.shape[1]
    x = gelu(layers.Dense(width, self.dense_bias, c.initializer_range, name="dense")(x))
    x = layers.layer_norm(c.layer_norm_eps, "norm", self.norm_bias)(x)
    if table is None:
      return x
    logits = x @ table.T.astype(x.dtype)
    return logits + self.param("bias", nn.initializers.zeros, (len(table),)) if self.vocabulary_bias else logits


def lm_logits(head: PredictionHead, params: dict, hidden: jax.Array) -> jax.Array:
  """An encoder's language-model logits [..., V] of the token at each position, from hidden [..., D].

  Raises:
    InputError: the model's head is a classifier.
  """
  if head.config.head != "lm":
    raise InputError(layers.NO_LANGUAGE_MODEL)
  table = params["embeddings"]["word_embeddings"]["embedding"]
  return head.apply({"params": params["lm_head"]}, hidden, table)


def masked_lm_logits(config: SharedConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """`lm_logits` with the default settings of PredictionHead."""
  return lm_logits(PredictionHead(config), params, hidden)


def outputs(config: SharedConfig, train: bool, embeddings: nn.Module, predict: nn.Module,
            pooler: Callable[[jax.Array], jax.Array], features: jax.Array, hidden: jax.Array,
            stream: jax.Array) -> layers.ClassifierOutput:
  """The output of an encoder with the head `config.head`; for use inside a compact module.

  Args:
    embeddings: module whose table "word_embeddings" embeds the vocabulary.
    predict: (features, table [V, E]) -> language-model logits [B, V]; used if config.head is "lm".
    pooler: see `classify`; used for a classifier.
    features: [B, D], the pooled vectors.
    hidden, stream: see ClassifierOutput.
  """
  if config.head == "lm":
    table = embeddings.variables["params"]["word_embeddings"]["embedding"]
    return layers.ClassifierOutput(predict(features, table), features, hidden, stream)
  logits, features = classify(config, train, features, pooler)
  return layers.ClassifierOutput(logits, features, hidden, stream)


def first_token(hidden: jax.Array, texts: jax.Array | None) -> jax.Array:
  """[B, D], the vector of each text's first token in hidden [R, T, D]; texts: see Model.apply."""
  return layers.pool(hidden, jnp.zeros((len(hidden), 1), int) if texts is None else texts[..., 0])


def classify(config: SharedConfig, train: bool, features: jax.Array,
             pooler: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
  """(logits [B, C], features) from the pooled vectors [B, D]; for use inside a compact module.

  Args:
    pooler: the layers of the family's own head before its dropout and classifier. If config.feature_width is set, the
      W2S teacher's widening layer replaces them. The features are then the output of that layer.
  """
  def dense(width, name):
    return layers.Dense(width, True, config.initializer_range, name=name)
  if config.feature_width:
    pooled = features = nn.relu(dense(config.feature_width, "widen")(features))
  else:
    pooled = pooler(features)
  return dense(config.num_labels, "classifier")(layers.dropout(config.head_dropout, train)(pooled)), features
