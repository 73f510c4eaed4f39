"""Inserts soft tokens between two layers. There a trigger of many words may already be a single direction.

R rows, T tokens, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from w2s_jax import sharding
from w2s_jax.models import layers
from w2s_jax.models.family import SharedConfig
from w2s_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Latent:
  """A Model whose soft tokens (layers.Tokens) enter after its first `below` layers.

  `below` is at least 1 and less than the number of layers. For the method `stream` it may also be 0. The first layers
  read the padding token at the positions of the soft tokens, and the attention mask treats it as a real token. `apply`,
  `config`, `shardings` and `vocabulary` work as in Model.
  """
  model: Model
  below: int

  @property
  def config(self) -> SharedConfig:
    return self.model.config

  @property
  def vocabulary(self) -> tuple[str, ...]:
    return self.model.vocabulary

  @property
  def shardings(self) -> tuple[tuple[str, P], ...]:
    return self.model.shardings

  def stream(self, params: dict, input_ids: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """[R, T, D], the output of the first `below` layers; the input of the first layer if `below` is 0."""
    words = jnp.where(input_ids < self.config.vocab_size, input_ids, self.config.pad_token_id or 0)
    return self._layers(0, self.below, params, words, *args, **kwargs).stream

  def token_states(self, params: dict, batch: dict[str, np.ndarray], special: Sequence[int],
                   mesh: jax.sharding.Mesh) -> np.ndarray:
    """[tokens, D] float32 on the host, the output of the first layers at a batch's real tokens.

    Args:
      batch: "input_ids", "segment_ids" [R, T].
      special: ids of tokens to leave out.
    """
    batch = {name: batch[name] for name in ("input_ids", "segment_ids")}
    global_batch = sharding.global_batch(batch, mesh)
    with sharding.on(mesh):
      stream = jax.jit(self.stream, out_shardings=sharding.replicated(mesh))(params, **global_batch)
    return np.asarray(stream, np.float32)[(batch["segment_ids"] > 0) & ~np.isin(batch["input_ids"], special)]

  def apply(self, params: dict, input_ids: jax.Array, *args: Any, stream: jax.Array | None = None,
            **kwargs: Any) -> layers.ClassifierOutput:
    """Works as Model.apply.

    stream: [R, T, D], input of the layer after the first `below`; None: the output of the first `below` layers, with
      the soft tokens.
    """
    if stream is None:
      soft = traverse_util.flatten_dict(params)[(*self.vocabulary, "soft")]
      words = self.stream(params, input_ids, *args, **kwargs)
      stream = layers.place_soft(words, input_ids, soft, self.config.vocab_size)
    return self._layers(self.below, self.config.num_layers, params, input_ids, *args, stream=stream, **kwargs)

  def _layers(self, first, end, params, *args, **kwargs):
    """The output of the network with only its layers first..end-1."""
    part = Model(dataclasses.replace(self.config, layers=(first, end)))
    flat = traverse_util.flatten_dict(params)
    flat.pop((*self.vocabulary, "soft"), None)  # `soft` is as wide as the stream; ELECTRA's embeddings may be narrower
    params = traverse_util.unflatten_dict(flat)
    return part.apply(params | {"layers": jax.tree.map(lambda x: x[first:end], params["layers"])}, *args, **kwargs)
