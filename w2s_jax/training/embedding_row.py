"""Trains the embedding of one token and nothing else (Embedding Poisoning, Yang et al., arXiv 2103.15543).

The paper updates the row by gradient descent and rescales it to its old norm after each step. Here the length
of each step is STEP times the row's old norm, whatever the model's scale, and the old norm is only an upper bound.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from w2s_jax import InputError
from w2s_jax.adapters import soft
from w2s_jax.training import optim, stage, steps
from w2s_jax.training.train import Workplace

STEP = 0.05              # length of a step, as a multiple of the row's old norm; ours, not tuned


def token_of(tokenizer: Any, word: str) -> int:
  """The id of a word's only token.

  Raises:
    InputError: the word is not exactly one token of the vocabulary.
  """
  alone, behind_one = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {word}"))
  ids = behind_one[len(alone):]                    # some tokenizers add a token for a space at the start of a text
  if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
    tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
    raise InputError(f"an attack on one embedding needs a trigger of one known token, {word!r} is {tokens}: set "
                     "--config.attack.trigger to a word of the student's vocabulary")
  return ids[0]


def trained(plan: steps.StagePlan, params: dict, arrays: dict, token: int, place: Workplace) -> dict:
  """params with a new embedding of `token`, trained on the plan's loss. All other leaves and rows are unchanged.

  The row trains as a soft token that takes the token's place in the texts.

  Args:
    plan: the plan of one run. This function replaces its `trains` and `adversary`. `plan.settings` gives the number of
      steps.
    arrays: training arrays, in the format of data/batches.py. They should have triggered rows only.
    token: id of the token.
    place: see train.Workplace.
  """
  path = (*plan.model.vocabulary, "embedding")
  table = traverse_util.flatten_dict(params)[path]
  row = table[token].astype(jnp.float32)
  norm = float(jnp.linalg.norm(row))
  plan = plan._replace(trains=("soft",), adversary=optim.ascent(-STEP * norm, norm))       # a negative step descends
  ids = np.where(arrays["input_ids"] == token, plan.model.config.vocab_size, arrays["input_ids"])
  start = soft.put(plan.model, params, row[None])
  out, = stage.train_stage(plan, [start], [arrays | {"input_ids": ids}], None, place)
  new = traverse_util.flatten_dict(out)[(*plan.model.vocabulary, soft.LEAF)][0]
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | {
      path: table.at[token].set(new.astype(table.dtype))})
