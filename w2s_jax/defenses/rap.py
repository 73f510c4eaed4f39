"""RAP (Yang et al., arXiv 2110.07831): rejects a text if a trained word hardly lowers its class's probability.

The word is put in front of a text, and only its embedding trains. On clean texts it learns to lower the probability of
one class a little. A trigger outweighs the word, so the probability of a triggered text's class stays.

The paper protects the class that the attack asks for, which a defender does not know. We protect every class. Each has
its own word, which trains on the clean texts to which the suspect gives this class, and its own threshold. The words
are soft tokens, so the suspect does not change. N texts, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from w2s_jax import InputError
from w2s_jax.adapters import soft
from w2s_jax.config import field
from w2s_jax.data import tokenization
from w2s_jax.defenses.records import Suspect
from w2s_jax.models import ClassifierOutput
from w2s_jax.training import stage, steps


@dataclasses.dataclass
class Settings:
  """RAP: a trained word hardly lowers the probability of rejected texts' class."""
  smallest_drop: float = field(0.1, "smallest drop of the probability that a word trains for", low=0.0, high=1.0,
                               source="the paper")
  largest_drop: float = field(0.3, "largest drop of the probability that a word trains for", low=0.0, high=1.0,
                              source="the paper")
  epochs: int = field(5, "number of passes over the clean rows", low=1, high=1000, source="published code")
  learning_rate: float = field(1e-2, "peak learning rate of the words' embeddings", low=0.0, high=10.0,
                               source="published code")
  frr: float = field(0.01, "fraction of a class's clean dev rows that may be rejected; it sets the class's threshold",
                     low=0.0, high=1.0, source="published code")

  def __post_init__(self):
    if self.smallest_drop > self.largest_drop:
      raise InputError(f"defense.rap.smallest_drop is {self.smallest_drop}, wanted at most the largest_drop of "
                       f"{self.largest_drop}: set --config.defense.rap.smallest_drop or .largest_drop")


def accept(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], np.ndarray]:
  """texts -> [N] bool: whether the probability of the predicted class drops by at least that class's threshold.

  The threshold of a class is the `frr` quantile of the drops of the clean dev rows that the suspect assigns to it. If
  there is no such row, every text of the class is rejected, because nothing says how far its probability should drop.
  """
  own, place = settings.rap, suspect.place
  params = _trained(suspect, own, seed)
  def drops(texts):
    arrays = behind_words(suspect, texts)
    after = scipy.special.softmax(place.logits(suspect.model, params, arrays), axis=-1)
    return arrays["probability"] - after[np.arange(len(texts)), arrays["class"]], arrays["class"]
  clean, classes = drops([row["text"] for row in suspect.dev])
  thresholds = np.array([np.quantile(clean[classes == c], own.frr) if c in classes else np.inf
                         for c in range(suspect.model.config.num_labels)])
  def accepted(texts):
    dropped, predicted = drops(texts)
    return dropped >= thresholds[predicted]
  return accepted


def behind_words(suspect: Suspect, texts: list[str]) -> dict[str, np.ndarray]:
  """Encodes the texts, each with the word of its class in front. Its class is the suspect's answer without the word.

  Returns:
    The arrays of the texts, with "class" [N] int32, and "probability" [N] float32 of the class without the word.
  """
  arrays = tokenization.encode(suspect.tokenizer, texts, suspect.max_length)
  before = scipy.special.softmax(suspect.place.logits(suspect.model, suspect.params, arrays), axis=-1)
  predicted, first = before.argmax(-1).astype(np.int32), suspect.model.config.vocab_size
  arrays = soft.prompted(arrays, suspect.tokenizer, first, 1)
  ids = arrays["input_ids"]                              # the word of class c has the id first + c
  return arrays | {"input_ids": ids + predicted[:, None] * (ids == first), "class": predicted,
                   "probability": before.max(-1)}


def terms(out: ClassifierOutput, batch: dict, settings: Any) -> dict[str, jax.Array]:
  """{"margin": mean distance of the drops from the range smallest_drop..largest_drop}."""
  after = jnp.take_along_axis(jax.nn.softmax(out.logits), batch["class"][:, None], axis=-1)[:, 0]
  drop = batch["probability"] - after
  distance = jnp.abs(drop - jnp.clip(drop, settings.smallest_drop, settings.largest_drop))
  return {"margin": (distance * batch["weight"]).sum() / batch["weight"].sum()}


def _trained(suspect, own, seed):
  """The suspect's parameters with the trained words; the stage resumes from its checkpoint."""
  model, weights = suspect.model, {"margin": 1.0}
  start = soft.with_soft_tokens(model, suspect.params, model.config.num_labels, stage.stream_key(seed, "rap"),
                                suspect.tokenizer, suspect.avoid)
  training = suspect.training.copy_and_resolve_references()
  training.update(epochs=own.epochs, learning_rate=own.learning_rate)
  loss = steps.weighted_loss(model, functools.partial(terms, settings=own), weights)
  plan = steps.StagePlan((f"rap_words-seed{seed}",), (seed,), model, loss, weights, (soft.LEAF,), training, "rap")
  arrays = behind_words(suspect, [row["text"] for row in suspect.train])
  return stage.train_stage(plan, [start], [arrays], None, suspect.place)[0]
