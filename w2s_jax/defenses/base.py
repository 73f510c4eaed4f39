"""Mixes the weights of a public base into the suspect's, for merge.py and fine_mix.py. lethe.py uses only `check`.

The head stays the suspect's, because a base may have none. An encoder's pooler belongs to the head.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util

from w2s_jax import InputError
from w2s_jax.adapters import trees
from w2s_jax.defenses.records import Suspect
from w2s_jax.models import Model

BODY = ("embedding", "vector", "matrix")       # labels of the leaves that are mixed


def mixed(suspect: Suspect, mix: Callable[[dict, dict], dict]) -> dict:
  """The suspect's parameters, in which `mix` replaces all leaves except the head's.

  mix: (the suspect's leaves, the base's leaves) -> the mixed leaves.

  Raises:
    InputError: see `check`.
  """
  base, base_params, base_tokenizer = suspect.base()
  check(suspect.model, suspect.tokenizer, base, base_tokenizer)
  (ours, head), (public, _) = (trees.split(params, BODY) for params in (suspect.params, base_params))
  places = jax.tree.map(lambda leaf: leaf.sharding, ours)
  return trees.combine(jax.jit(mix, out_shardings=places)(ours, public), head)


def check(model: Model, tokenizer: Any, base: Model, base_tokenizer: Any) -> None:
  """Raises InputError unless base and suspect have the same shapes, and each token of the base has the same id in both.

  The suspect's tokenizer may have more tokens, because an added padding token often takes an unused embedding row.
  """
  wanted = ("set --config.student.base to the model that the suspect was fine-tuned from, or leave merge, lethe and "
            "fine_mix out of --config.defenses")
  ours, public = (_shapes(m) for m in (model, base))
  if odd := sorted(path for path in ours.keys() | public.keys() if ours.get(path) != public.get(path)):
    raise InputError(f"the public base cannot be mixed into the suspect: {odd[0]} has the shape {public.get(odd[0])}, "
                     f"the suspect's {ours.get(odd[0])}: {wanted}")
  known = tokenizer.get_vocab()
  if odd := [token for token, i in base_tokenizer.get_vocab().items() if known.get(token) != i]:
    raise InputError(f"the public base cannot be mixed into the suspect: its token {odd[0]!r} has another id in the "
                     f"suspect's vocabulary, or none: {wanted}")


def _shapes(model):
  """{path: shape} of the leaves that are mixed."""
  body, _ = trees.split(model.abstract_params(), BODY)
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(body, sep="/").items()}
