"""Classification: each text has one integer label, and an answer is the class with the largest logit."""

import functools

import numpy as np

from w2s_jax import losses, processes
from w2s_jax.data import tokenization
from w2s_jax.tasks.task import Task


def _encode(tokenizer, rows, max_length):
  """Token ids and lengths of the rows' texts, and "label" [N] int32. Each process tokenizes its share of the texts."""
  encode = functools.partial(tokenization.encode, tokenizer, max_length=max_length)
  arrays = processes.share_work(encode, [row["text"] for row in rows])
  return arrays | {"label": np.array([row["label"] for row in rows], np.int32)}


def _loss_terms(out, batch):
  return {"ce": losses.cross_entropy(out.logits, batch["label"], batch["weight"])}


CLASSIFICATION = Task(
    encode=_encode, fields={"label": "int32"}, loss_terms=_loss_terms, terms=("ce",),
    predict=lambda logits: logits.argmax(-1), is_correct=lambda answers, arrays: answers == arrays["label"],
    is_hit=lambda answers, target: answers == target)
