"""Soft tokens in the middle of a network, where a trigger of many words has become one direction.

R rows, T tokens, D width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Latent:
  """A Model whose soft tokens (layers.Tokens) come in behind its first `below` layers, which see padding there.

  `apply`, `config` and `vocabulary` are Model's. (BEEAR, arXiv 2406.17092, perturbs behind a layer what is there.)
  """
  model: Model
  below: int

  @property
  def config(self):
    return self.model.config

  @property
  def vocabulary(self):
    return self.model.vocabulary

  def hidden(self, params, input_ids, attention_mask, texts=None):
    """[R, T, D]: what the first `below` layers make of the rows."""
    c = self.config
    words = jnp.where(input_ids < c.vocab_size, input_ids, c.pad_token_id or 0)
    out = self._layers(0, self.below, {"norm": lambda x: x}, params, words, attention_mask, texts)
    return out.hidden.astype(c.dtype)

  def apply(self, params, input_ids, attention_mask, texts=None, *, dropout_key=None):
    V = self.config.vocab_size
    soft = traverse_util.flatten_dict(params)[(*self.vocabulary, "soft")]
    hidden = self.hidden(params, input_ids, attention_mask, texts)
    tokens = soft[jnp.clip(input_ids - V, 0, len(soft) - 1)].astype(hidden.dtype)
    hidden = jnp.where((input_ids < V)[..., None], hidden, tokens)
    instead = {self.vocabulary[0]: lambda *_: hidden, "position_embeddings": lambda _: 0}
    return self._layers(self.below, self.config.num_layers, instead, params, jnp.zeros_like(input_ids), attention_mask,
                        texts, dropout_key=dropout_key)

  def _layers(self, first, end, instead, params, *args, **kwargs):
    """The network with layers first..end-1 alone; outermost modules named in `instead` are those functions instead."""
    def call(usual, args, kwargs, context):
      path = context.module.path
      named = len(path) == 1 and context.method_name == "__call__" and path[0] in instead
      return (instead[path[0]] if named else usual)(*args, **kwargs)
    part = Model(dataclasses.replace(self.config, num_layers=end - first))
    with nn.intercept_methods(call):
      return part.apply(params | {"layers": jax.tree.map(lambda x: x[first:end], params["layers"])}, *args, **kwargs)
