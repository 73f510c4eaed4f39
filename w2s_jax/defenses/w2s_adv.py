"""W2S with an adversary: trainable soft tokens in a copy of each text, updated to *increase* the loss.

The student is trained to match the teacher's output on the unmodified text. All texts share one set of soft tokens, as
in BEEAR (arXiv 2406.17092, on generation). The tokens ascend the loss with the gradient of the same step in which the
student descends it, as in "free" adversarial training (Shafahi et al., arXiv 1904.12843). They are a leaf of the
parameter tree with its own label, `soft`, for which optax.partition has its own optimizer. N texts, T tokens, K soft
triggers of S tokens each, V vocabulary, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from w2s_jax.adapters import soft
from w2s_jax.config import field
from w2s_jax.data import streams
from w2s_jax.defenses.records import Recipe
from w2s_jax.models import ClassifierOutput
from w2s_jax.tasks import Task
from w2s_jax.training import optim, stage


@dataclasses.dataclass
class Settings:
  """Settings of every defense with soft tokens; ours (docs/notes/w2s_adv_offline.md)."""
  triggers: int = field(8, "number of soft triggers", low=1)
  tokens: int = field(5, "number of soft tokens per trigger; a text gets the first k of them, k at random", low=1)
  replace: float = field(0.0, "fraction of texts in which soft tokens replace tokens; in the others they are inserted",
                         low=0.0, high=1.0)
  step_size: float = field(0.5, "ascent step size of each token", low=0.0, high=100.0,
                           unit="mean norms of the vocabulary's embeddings")
  norm: float = field(1.5, "bound on each token's norm", low=1e-3, high=100.0,
                      unit="mean norms of the vocabulary's embeddings")
  weight: float = field(1.0, "weight of the loss on texts with soft tokens; clean texts have 1", low=0.0, high=1e6)


def with_adversary(recipe: Recipe) -> Recipe:
  """The recipe with two views of each text: the clean text, and the text with soft tokens, which ascend the loss."""
  both_terms = functools.partial(terms, recipe.terms)
  def weights(settings, width):
    return loss_weights(recipe.weights(settings, width), settings.adversary.weight)
  return recipe._replace(terms=both_terms, weights=weights, augment=_augment, views=2, adversary=_ascent,
                         soft_tokens=lambda settings: settings.adversary.triggers * settings.adversary.tokens)


def _augment(suspect, settings, params, arrays, seed):
  own, model, tokenizer = settings.adversary, suspect.model, suspect.tokenizer
  params = soft.with_soft_tokens(model, params, own.triggers * own.tokens, stage.stream_key(seed, "adversary"),
                                 tokenizer, suspect.avoid)
  return params, perturbed(arrays, tokenizer, model.config.vocab_size, own, seed)


def _ascent(suspect, settings):
  unit = soft.mean_norm(suspect.model, suspect.params)
  return optim.ascent(settings.adversary.step_size * unit, settings.adversary.norm * unit)


def terms(clean_terms: Callable, student: ClassifierOutput, batch: dict, settings: Any,
          task: Task) -> dict[str, jax.Array]:
  """`clean_terms` on the clean texts, and as `adv_TERM` on the texts with soft tokens."""
  out = {}
  for prefix, in_view in (("", 1 - batch["soft"]), ("adv_", batch["soft"])):
    values = clean_terms(student, batch | {"weight": batch["weight"] * in_view}, settings, task)
    out |= {prefix + name: value for name, value in values.items()}
  return out


def loss_weights(clean_weights: dict[str, float], weight: float) -> dict[str, float]:
  """The weights of the terms from `terms`. The weight of `adv_TERM` is `weight` times the clean weight of TERM."""
  return clean_weights | {f"adv_{name}": weight * value for name, value in clean_weights.items()}


def perturbed(arrays: dict[str, np.ndarray], tokenizer: Any, vocab_size: int, settings: Any,
              seed: int) -> dict[str, np.ndarray]:
  """Appends to the N texts N copies with soft tokens at a random place between the special tokens.

  Trigger, number of tokens and place are drawn once for each text and stay the same in every epoch.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], any others [N, ...], which both views of a text share}.
    tokenizer: tokenizer of the texts, for the number of special tokens.
    vocab_size: V; the ids of soft tokens start there.
    settings: has `triggers`, `tokens` and `replace`, as in `Settings`.
  Returns:
    The arrays, with "input_ids" [2 N, T], "length" [2 N], and "soft" [2 N] float32: 1 for texts with soft tokens.
  """
  rng = streams.rng(seed, "soft tokens")
  def with_trigger(words, room):
    tokens = vocab_size + settings.tokens * rng.integers(settings.triggers)
    tokens = tokens + np.arange(rng.integers(settings.tokens) + 1)
    if rng.random() < settings.replace:
      tokens = tokens[:max(len(words), 1)]
      place = rng.integers(len(words) - len(tokens) + 1) if len(words) else 0
      after = words[place + len(tokens):]
    else:
      tokens = tokens[:max(room - 1, 1)]
      words = words[:room - len(tokens)]
      place = rng.integers(len(words) + 1)
      after = words[place:]
    return np.concatenate([words[:place], tokens, after])
  ids, lengths = soft.rewritten(arrays, tokenizer, with_trigger)
  return arrays | {"input_ids": np.concatenate([arrays["input_ids"], ids]),
                   "length": np.concatenate([arrays["length"], lengths]),
                   "soft": np.repeat(np.float32([0, 1]), len(lengths))}
