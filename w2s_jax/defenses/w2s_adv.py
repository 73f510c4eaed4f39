"""W2S with an adversary: soft tokens, put into every text, walk the backdoor's path, and the student must answer there
as the teacher answers the clean text.

The tokens are universal, as in BEEAR (arXiv 2406.17092, on generation), and move uphill by the gradient of the very
step that moves the student downhill, as in "free" adversarial training (Shafahi et al., arXiv 1904.12843). They are a
leaf of the parameter tree with a label of its own, `soft`: optax.partition gives it its rule. N texts, T tokens, K soft
triggers of S tokens each, V vocabulary, D width.
"""

import numpy as np

from w2s_jax.adapters.soft import rewritten


def terms(clean_terms, student, batch, temperature):
  """`clean_terms` of the clean texts, and the same again as `adv_...` of those with soft tokens."""
  out = {}
  for prefix, here in (("", 1 - batch["soft"]), ("adv_", batch["soft"])):
    values = clean_terms(student, batch | {"weight": batch["weight"] * here}, temperature)
    out |= {prefix + name: value for name, value in values.items()}
  return out


def loss_weights(clean_weights, weight):
  """The weights of `terms`: of the clean texts as they are, of the others `weight` times as much."""
  return clean_weights | {f"adv_{name}": weight * value for name, value in clean_weights.items()}


def perturbed(arrays, tokenizer, vocab_size, settings, seed):
  """The arrays with N more texts behind the N: each again, with soft tokens at a random place between its special ones.

  Trigger, number of tokens and place are drawn once for each text, and are the same in every epoch.

  Args:
    arrays: {"input_ids" [N, T], "length" [N], any others [N, ...], which both views of a text share}.
    settings: of the config's `adversary`: `triggers`, `tokens`, `replace`.
  Returns:
    The arrays, "input_ids" [2 N, T], "length" [2 N], and "soft" [2 N] float32, 1 where there are soft tokens.
  """
  rng = np.random.default_rng([seed, 6])
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
  ids, lengths = rewritten(arrays, tokenizer, with_trigger)
  return arrays | {"input_ids": np.concatenate([arrays["input_ids"], ids]),
                   "length": np.concatenate([arrays["length"], lengths]),
                   "soft": np.repeat(np.float32([0, 1]), len(lengths))}
