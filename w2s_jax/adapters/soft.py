"""Soft tokens are rows of a leaf `soft` beside the vocabulary's embeddings. Their ids in a text are V, V + 1, ...

An adversary's soft tokens ascend the loss (defenses/w2s_adv.py). A soft prompt (Lester et al., arXiv 2104.08691) trains
like any adapter. Neither can be merged into the model. N texts, T tokens, S soft tokens, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from w2s_jax import InputError

LEAF = "soft"


class Embedding(Protocol):
  """The part of a model that this file needs: the path of the module that embeds tokens."""

  @property
  def vocabulary(self) -> tuple[str, ...]: ...


def with_soft_tokens(model: Embedding, params: dict, count: int, key: jax.Array, tokenizer: Any,
                     avoid: Sequence[str] = ()) -> dict:
  """params with the leaf `soft` [count, D] float32, whose rows are copies of random embeddings of the vocabulary.

  avoid: triggers that ASR is measured with. No defense may start from one of their tokens.
  """
  never = {*tokenizer.all_special_ids, *(i for t in avoid for i in tokenizer(" " + t)["input_ids"])}
  rows = np.setdiff1d(np.arange(len(tokenizer)), list(never))
  chosen = jax.random.choice(key, rows, (count,))
  return put(model, params, _vocabulary(model, params)[chosen].astype(jnp.float32))


def put(model: Embedding, params: dict, soft: jax.Array | jax.ShapeDtypeStruct) -> dict:
  """params with `soft` [S, D] as a leaf beside the vocabulary's embeddings."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | {(*model.vocabulary, LEAF): soft})


def mean_norm(model: Embedding, params: dict) -> float:
  """Mean norm of the vocabulary's embeddings."""
  return float(jnp.linalg.norm(_vocabulary(model, params).astype(jnp.float32), axis=-1).mean())


def _vocabulary(model, params):
  return traverse_util.flatten_dict(params)[(*model.vocabulary, "embedding")]


def prompted(arrays: dict[str, np.ndarray], tokenizer: Any, vocab_size: int, tokens: int) -> dict[str, np.ndarray]:
  """Puts the same soft tokens at the front of every text, after its leading special tokens.

  Words at the end are cut off if the text becomes too long. A prompt affects only texts that contain it, so every text
  that the model reads later must pass through this function too.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], any others}.
    tokenizer: tokenizer of the texts, for the number of special tokens.
    vocab_size: V.
    tokens: S, the number of rows of the leaf `soft`; their ids are vocab_size .. vocab_size + S - 1.
  Returns:
    The arrays with new "input_ids" [N, T] and "length" [N].
  Raises:
    InputError: T tokens have no room for S soft tokens and a word.
  """
  prompt = vocab_size + np.arange(tokens)
  def behind_prompt(words, room):
    if room <= tokens:
      raise InputError(f"a prompt of {tokens} soft tokens leaves no room for a word among {room}: take fewer, or "
                       "longer texts (--config.data.max_length)")
    return np.concatenate([prompt, words[:room - tokens]])
  ids, lengths = rewritten(arrays, tokenizer, behind_prompt)
  return arrays | {"input_ids": ids, "length": lengths}


def rewritten(arrays: dict[str, np.ndarray], tokenizer: Any,
              rewrite: Callable[[np.ndarray, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """([N, T] ids, [N] lengths) of the texts after `rewrite` has replaced the ids between their special tokens.

  rewrite: (ids between the special tokens, room) -> the new ids, no fewer than before and at most `room`.
  """
  special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
  front, back = special.index(0), special[::-1].index(0)
  ids, lengths = np.array(arrays["input_ids"]), np.array(arrays["length"])
  room = ids.shape[1] - front - back
  for i, length in enumerate(arrays["length"]):
    text = ids[i, :length].copy()
    words, end = text[front:length - back], text[length - back:]
    text = np.concatenate([text[:front], rewrite(words, room), end])
    ids[i, :len(text)], lengths[i] = text, len(text)
  return ids, lengths
