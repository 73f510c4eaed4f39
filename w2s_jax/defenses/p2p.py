"""P2P, "Poison-to-Poison" (Zhao et al., arXiv 2510.04503): plants a benign backdoor that asks for classes of its own.

Part of the training rows get a benign trigger, and their label changes from class c to c + C. At test time every text
gets the benign trigger, so that the answer is one of the second C classes. No trigger of an attacker asks for these.

Ours: the training rows are clean, the paper's may be poisoned. A row with the trigger replaces the original row, so
that the student trains as many steps as in other defenses. The new outputs start as copies of the old ones. The paper
reads c and c + C as the same answer. We drop the first C outputs after the training, so the cleaned model has the
classes of the suspect. It answers rightly only if its texts begin with the benign trigger. Behind the trigger, a long
text loses its last tokens to truncation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import InputError
from w2s_jax.config import field
from w2s_jax.data import insertions, streams
from w2s_jax.defenses import distill, lora_ce
from w2s_jax.defenses.records import Suspect
from w2s_jax.models import Model

KNOB = "--config.defense.p2p.trigger"


@dataclasses.dataclass
class Settings:
  """P2P: a benign trigger is planted, and put into every text."""
  trigger: str = field("qzxv", "benign trigger, put before every text; no text may have one of its words",
                       source="ours; longer than any rare word that is drawn")
  share: float = field(0.5, "fraction of the training rows that get the benign trigger", low=0.01, high=1.0,
                       source="ours; not tuned")

  def __post_init__(self):
    if not insertions.words_of([self.trigger]):
      raise InputError(f"defense.p2p.trigger is {self.trigger!r}, wanted a word or several: set {KNOB}")


def weights(suspect: Suspect, settings: Any, runs: dict[str, int]) -> list[dict]:
  """The parameters of each run, with the outputs that answer to the benign trigger.

  Dev rows with the trigger choose the checkpoint. All runs have the trigger in the same rows.

  Raises:
    InputError: see `check`; a trigger that ASR is measured with may have no word of the benign one either.
  """
  check(settings, [*(row["text"] for row in suspect.train + suspect.dev), *suspect.avoid])
  own, classes = settings.p2p, suspect.model.config.num_labels
  chosen = set(streams.rng(0, "p2p").permutation(len(suspect.train))[:round(own.share * len(suspect.train))].tolist())
  def planted(row):
    return row | {"text": f"{own.trigger} {row['text']}", "label": row["label"] + classes}
  twice = Model(dataclasses.replace(suspect.model.config, num_labels=2 * classes, labels=()))
  before, after = (traverse_util.flatten_dict(model.abstract_params()) for model in (suspect.model, twice))
  outputs = {path for path in before if before[path].shape != after[path].shape}
  def on_outputs(change, params):
    return traverse_util.path_aware_map(lambda path, leaf: change(leaf) if path in outputs else leaf, params)
  taught = suspect._replace(
      model=twice, params=on_outputs(lambda leaf: jnp.concatenate([leaf, leaf], axis=-1), suspect.params),
      train=[planted(row) if i in chosen else row for i, row in enumerate(suspect.train)],
      dev=[planted(row) for row in suspect.dev])
  trained = distill.train(lora_ce.RECIPE, taught, settings, runs)
  return [on_outputs(lambda leaf: leaf[..., classes:], params) for params in trained]


def text(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], list[str]]:
  """texts -> the texts, each behind the benign trigger."""
  del suspect, seed
  return lambda texts: [f"{settings.p2p.trigger} {text}" for text in texts]


def check(settings: Any, texts: list[str]) -> None:
  """Raises InputError if one of the texts has a word of the benign trigger."""
  if words := insertions.words_of([settings.p2p.trigger]) & insertions.words_of(texts):
    raise InputError(f"defense 'p2p': the texts or triggers have the word {sorted(words)[0]!r} of the benign trigger "
                     f"{settings.p2p.trigger!r}, wanted words that none of them has: set {KNOB}")
