"""ONION (Qi et al., arXiv 2011.10369): removes words that make a text less likely under a language model.

The paper's language model is GPT-2; ours is a small decoder that trains on the clean rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from w2s_jax import InputError
from w2s_jax.adapters import trees
from w2s_jax.config import field
from w2s_jax.data import tokenization
from w2s_jax.defenses.records import Suspect
from w2s_jax.models import Model, config_from_hf
from w2s_jax.training import inference, stage, steps


@dataclasses.dataclass
class Settings:
  """ONION: words that make a text less likely are removed."""
  width: int = field(64, "hidden size of the language model", low=8, high=8192, source="ours; not tuned")
  num_layers: int = field(2, "number of layers of the language model", low=1, high=100, source="ours; not tuned")
  epochs: int = field(4, "number of passes over the clean rows", low=1, high=1000, source="ours; not tuned")
  learning_rate: float = field(3e-3, "peak learning rate", low=0.0, high=10.0, source="the offline student's warm-up")
  removed: float = field(0.01, "fraction of the clean dev rows' words that may be removed; it sets the threshold",
                         low=0.0, high=1.0, source="ours; not tuned")

  def __post_init__(self):
    if self.width % 8:
      raise InputError(f"defense.onion.width is {self.width}, wanted a multiple of 8 (4 heads, rotary positions): set "
                       "--config.defense.onion.width")


def text(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], list[str]]:
  """texts -> texts without the words that raise the perplexity by more than the threshold.

  The threshold is the (1 - `removed`) quantile of these rises over all words of the clean dev rows. A text of which no
  word would be left stays unchanged.
  """
  perplexity_of = perplexity(suspect, settings, seed)
  def gains(texts):
    """[words] for each text: perplexity with the word minus perplexity without it; -inf in a text of one word."""
    words = [text.split() for text in texts]
    variants = [" ".join(own[:i] + own[i + 1:]) for own in words for i in range(len(own)) if len(own) > 1]
    perplexities = perplexity_of([*texts, *variants])
    whole, rest = perplexities[:len(texts)], iter(perplexities[len(texts):])
    return [[p - next(rest) for _ in own] if len(own) > 1 else [-np.inf] for p, own in zip(whole, words)]
  clean = [gain for own in gains([row["text"] for row in suspect.dev]) for gain in own if np.isfinite(gain)]
  threshold = np.quantile(clean, 1 - settings.onion.removed) if clean else np.inf   # inf: no dev text has two words
  def without_outliers(texts):
    kept = [[word for word, gain in zip(text.split(), own) if gain <= threshold]
            for text, own in zip(texts, gains(texts))]
    return [" ".join(words) or text for words, text in zip(kept, texts)]
  return without_outliers


def perplexity(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], np.ndarray]:
  """texts -> [N] perplexity of each under a language model of the clean rows."""
  model, params = _language_model(suspect, settings.onion, seed)
  place = suspect.place
  def perplexities(texts):
    arrays = tokenization.encode(suspect.tokenizer, texts, suspect.max_length)
    return inference.perplexities(model, params, arrays, place.mesh, **place.eval_shapes())
  return perplexities


def _language_model(suspect, own, seed):
  """(Model, params) of a language model trained on the clean rows' texts; the stage resumes from its checkpoint."""
  arch = {"model_type": "llama", "vocab_size": suspect.model.config.vocab_size, "hidden_size": own.width,
          "intermediate_size": 3 * own.width, "num_hidden_layers": own.num_layers, "num_attention_heads": 4,
          "tie_word_embeddings": True, "max_position_embeddings": suspect.max_length, "initializer_range": 0.08}
  model = Model(config_from_hf(arch | {"pad_token_id": suspect.tokenizer.pad_token_id}))
  training = suspect.training.copy_and_resolve_references()
  training.update(epochs=own.epochs, learning_rate=own.learning_rate)
  loss = steps.language_model_loss(model)
  plan = steps.StagePlan((f"onion_lm-seed{seed}",), (seed,), model, loss, {"lm": 1.0}, trees.FULL, training, "onion_lm",
                         packed=False)
  start = model.init(stage.stream_key(seed, "onion_lm"), suspect.place.mesh)
  arrays = tokenization.full_rows(suspect.tokenizer, [row["text"] for row in suspect.train], suspect.max_length)
  return model, stage.train_stage(plan, [start], [arrays], None, suspect.place)[0]
