"""Soft tokens: rows of a leaf `soft` beside the vocabulary's embeddings, and ids behind the vocabulary in the texts.

An adversary moves them uphill (defenses/w2s_adv.py). A soft prompt (Lester et al., arXiv 2104.08691) trains like any
adapter. Neither can be merged into the model. N texts, T tokens, S soft tokens, V vocabulary, D width.
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
  """What is asked of a models.Model, or of one that stands for it: the path of the module that embeds the tokens."""

  @property
  def vocabulary(self) -> tuple[str, ...]: ...


def with_soft_tokens(model: Embedding, params: dict, count: int, key: jax.Array, tokenizer: Any,
                     avoid: Sequence[str] = ()) -> dict:
  """params with the leaf `soft` [count, D] float32 beside the vocabulary's embeddings, begun as random rows of those.

  avoid: triggers that are known to whoever measures: no defense may start from one.
  """
  never = {*tokenizer.all_special_ids, *(i for t in avoid for i in tokenizer(" " + t)["input_ids"])}
  rows = np.setdiff1d(np.arange(len(tokenizer)), list(never))
  chosen = jax.random.choice(key, rows, (count,))
  return put(model, params, _vocabulary(model, params)[chosen].astype(jnp.float32))


def put(model: Embedding, params: dict, soft: jax.Array | jax.ShapeDtypeStruct) -> dict:
  """params with the leaf `soft` beside the vocabulary's embeddings."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | {(*model.vocabulary, LEAF): soft})


def mean_norm(model: Embedding, params: dict) -> float:
  """Mean norm of the vocabulary's embeddings."""
  return float(jnp.linalg.norm(_vocabulary(model, params).astype(jnp.float32), axis=-1).mean())


def _vocabulary(model, params):
  return traverse_util.flatten_dict(params)[(*model.vocabulary, "embedding")]


def prompted(arrays: dict[str, np.ndarray], tokenizer: Any, vocab_size: int, tokens: int) -> dict[str, np.ndarray]:
  """The arrays with the same soft tokens at the front of every text, behind its first special token where it has one.

  Words are cut off at the end where there is no room for all. The model answers to a prompt only in texts that have it:
  those that are measured, or sent by a user, go through here too.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], any others}.
    tokens: S, the rows of the leaf `soft`: ids vocab_size .. vocab_size + S - 1.
  Returns:
    The arrays with new "input_ids" [N, T] and "length" [N].
  Raises:
    InputError: texts of T tokens have no room for S and a word.
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
  """([N, T] ids, [N] lengths) of the texts with other words between their special tokens.

  rewrite: (words, room) -> at most `room` ids, at least as many as there are words.
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
