"""P-tuning: trained virtual tokens in front of every text (Liu et al., arXiv 2103.10385), as peft runs it.

An MLP of three layers makes the embeddings of the virtual tokens from vectors that train with it. The paper also has an
LSTM below the MLP, and other places for the tokens. After training only the embeddings are kept. They cannot be merged
into the model's weights.

The virtual tokens come before the text's special tokens, too. An encoder that classifies by a text's first token
therefore reads the first virtual token. A decoder reads the text's last token, even if that is the padding token. peft
does the same for one text without padding. Here padding in a batch does not change a text's answer. In peft it changes
the answers of decoders, which read the last position of a padded row.

S virtual tokens, E width of the embeddings, R rows, T tokens, G groups, B texts, D width.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KIND = "p_tuning"
LEAF = "virtual"             # [S, E] float32, the virtual tokens after training
VECTORS = "p_tuning_vectors"     # [S, E], input of the MLP
LAYERS = tuple(f"p_tuning_{name}" for name in ("in", "middle", "out"))


def new(key: jax.Array, tokens: int, width: int, hidden: int) -> dict[str, jax.Array]:
  """{leaf name: float32 array} of random vectors [tokens, width] and an MLP of width `hidden`, drawn as in PyTorch."""
  keys = jax.random.split(key, 1 + 2 * len(LAYERS))
  out = {VECTORS: jax.random.normal(keys[0], (tokens, width))}
  widths = (width, hidden, hidden, width)
  for i, name in enumerate(LAYERS):
    bound = 1 / math.sqrt(widths[i])
    out[name] = jax.random.uniform(keys[1 + 2 * i], widths[i:i + 2], jnp.float32, -bound, bound)
    out[f"{name}_bias"] = jax.random.uniform(keys[2 + 2 * i], widths[i + 1:i + 2], jnp.float32, -bound, bound)
  return out


def tokens_of(leaves: Mapping[str, jax.Array]) -> jax.Array | None:
  """[S, E] float32, the virtual tokens from the leaves beside the vocabulary's embeddings; None if there are none."""
  if VECTORS not in leaves:
    return leaves.get(LEAF)
  x = leaves[VECTORS]
  for name in LAYERS:
    x = jnp.matmul(x, leaves[name], precision="highest") + leaves[f"{name}_bias"]
    x = x if name == LAYERS[-1] else jax.nn.relu(x)
  return x


def export(leaves: Mapping[str, np.ndarray], heads: int, layers: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """({peft's tensor name: array}, {field of adapter_config.json: value}); peft's file has no MLP either.

  heads, layers: numbers of the model's attention heads and layers, which peft does not find in every config.json.
  """
  tokens = np.asarray(tokens_of(leaves))
  return {"prompt_embeddings": tokens}, {
      "peft_type": "P_TUNING", "num_virtual_tokens": tokens.shape[0], "token_dim": tokens.shape[1],
      "num_transformer_submodules": 1, "num_attention_heads": heads, "num_layers": layers,
      "encoder_reparameterization_type": "MLP",
      "encoder_hidden_size": leaves[LAYERS[0]].shape[1] if VECTORS in leaves else tokens.shape[1]}


def in_front(tokens: int, first_id: int, input_ids: jax.Array, segment_ids: jax.Array, texts: jax.Array | None,
             padding: int) -> tuple[jax.Array, jax.Array]:
  """Puts the ids first_id, first_id + 1, ... of S virtual tokens in front of every text.

  Args:
    tokens: S.
    input_ids, segment_ids: [R, T]; texts: [G, B / G, 2] or None; see Model.apply.
    padding: the padding token.
  Returns:
    (input_ids, segment_ids), one text per row: [R, S + T], or with `texts` [B, S + T].
  """
  if texts is not None:
    places = texts[..., :1] + jnp.arange(input_ids.shape[1])                 # [G, B / G, T]
    def one_per_row(values, fill):
      found = jnp.take_along_axis(values.reshape(len(texts), 1, -1), places, axis=2, mode="clip")
      return jnp.where(places <= texts[..., 1:], found, fill).reshape(-1, values.shape[1])
    input_ids, segment_ids = one_per_row(input_ids, padding), one_per_row(segment_ids, 0)
  def after(front, values):
    return jnp.concatenate([jnp.broadcast_to(front, (len(values), tokens)).astype(values.dtype), values], axis=1)
  return after(first_id + jnp.arange(tokens), input_ids), after(segment_ids.max(axis=1, keepdims=True), segment_ids)


def behind(tokens: int, hidden: jax.Array, shape: tuple[int, int], texts: jax.Array | None) -> jax.Array:
  """The vectors of the texts' own tokens, at the places that the tokens had before `in_front`.

  Args:
    tokens: S.
    hidden: [R, S + T, D], or with `texts` [B, S + T, D].
    shape: (R, T).
    texts: [G, B / G, 2] or None; see Model.apply.
  Returns:
    [R, T, D]; the vectors of padding mean nothing.
  """
  if texts is None:
    return hidden[:, tokens:]
  (R, T), (first, last) = shape, (texts[..., :1], texts[..., 1:])
  place = jnp.arange(R // len(texts) * T)                          # index in a group's tokens, as in `texts`
  text = jnp.argmax((first <= place) & (place <= last), axis=1)    # the first match: texts of weight 0 come last
  places = text * (tokens + T) + tokens + place - jnp.take_along_axis(first[..., 0], text, axis=1)
  groups = hidden.reshape(len(texts), -1, hidden.shape[-1])
  return jnp.take_along_axis(groups, places[..., None], axis=1, mode="clip").reshape(R, T, -1)
