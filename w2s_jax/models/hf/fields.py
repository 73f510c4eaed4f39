"""Reads config.json of a model directory field by field.

The file may come from a stranger, and its numbers decide how much memory is allocated.
"""

import re
import reprlib
from collections.abc import Collection
from typing import Any, NoReturn

from w2s_jax import InputError

MOST = 2**24               # largest accepted integer; no dimension of a real model is larger
MOST_LAYERS = 1024
LISTED = 5000              # largest number of characters of a list in an error message
_SHOWN = reprlib.Repr()    # shortens deep and long values, unlike repr
_SHOWN.maxstring = _SHOWN.maxother = 80


class Fields:
  """The fields of config.json. A method reads one field and checks its type and range; null counts as absent.

  Raises:
    InputError: (every method) the field is absent and has no default, or has a wrong type, or is out of range.
  """

  def __init__(self, values, where="config.json"):
    self.values, self.where = values, where

  def __contains__(self, name):
    return self.values.get(name) is not None

  def _get(self, name, default):
    if name in self:
      return self.values[name]
    if default is None:
      raise InputError(f"the model's {self.where} has no field {name!r}")
    return default

  def _wrong(self, name, value, wanted):
    return InputError(f"the model's {self.where}: {name} is {short(value)}, wanted {wanted}")

  def integer(self, name: str, default: int | None = None, low: int = 1, high: int = MOST) -> int:
    value = self._get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
      raise self._wrong(name, value, f"an integer in {low}..{high}")
    return value

  def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e9) -> float:
    value = self._get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
      raise self._wrong(name, value, f"a number in {low:g}..{high:g}")
    return float(value)

  def positive(self, name: str, default: float | None = None) -> float:
    """A number above 0, such as a divisor or the base of a power."""
    return self.number(name, default, 1e-30)

  def rate(self, name: str, default: float) -> float:
    """A dropout rate."""
    return self.number(name, default, 0.0, 0.99)

  def flag(self, name: str, default: bool) -> bool:
    value = self._get(name, default)
    if not isinstance(value, bool):
      raise self._wrong(name, value, "true or false")
    return value

  def string(self, name: str, default: str | None, among: Collection[str]) -> str:
    value = self._get(name, default)
    if not isinstance(value, str) or value not in among:
      raise self._wrong(name, value, f"one of {', '.join(among)}")
    return value

  def only(self, **wanted: Any) -> None:
    """Checks that each named field is absent or has the only value that is implemented."""
    for name, value in wanted.items():
      if name in self and self.values[name] != value:
        got = f"{name} {short(self.values[name])}"
        raise InputError(f"the model's {self.where}: {got} is not supported (want {short(value)})")

  def one_of(self, **names: str) -> None:
    """Checks that two names of one field do not have different values, because transformers may read either.

    names: other name = the name that we read.
    """
    for other, name in names.items():
      if other in self and name in self and self.values[other] != self.values[name]:
        raise InputError(f"the model's {self.where} has {name} {short(self.values[name])} and {other} "
                         f"{short(self.values[other])}, two names of one thing: keep one")

  def token(self, name: str) -> int | None:
    """A token id; None if the field is absent."""
    return self.integer(name, low=-1) if name in self else None

  def tokens(self, name: str) -> int | tuple[int, ...] | None:
    """A token id, or a tuple if the field is a list of ids; None if the field is absent."""
    value = self.values.get(name)
    if isinstance(value, list) and len(value) < 100:
      return tuple(Fields({name: token_id}, self.where).integer(name, low=-1) for token_id in value)
    return self.token(name)

  def entries(self, name: str, low: int = 0, high: int = MOST_LAYERS) -> list["Fields"]:
    """The entries of the list `name`, each as Fields with the single field `name`.

    low, high: bounds of the list's length.
    """
    value = self._get(name, None)
    if not isinstance(value, list) or not low <= len(value) <= high:
      raise self._wrong(name, value, f"a list of {low}..{high} entries")
    return [Fields({name: entry}, self.where) for entry in value]

  def layer_types(self, among: Collection[str], num_layers: int) -> list[str] | None:
    """The kind of each layer, one of `among`; None if the field is absent."""
    kinds = self.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != num_layers or any(
        kind not in among for kind in kinds)):
      raise self._wrong("layer_types", kinds, f"a list of {num_layers}, each {' or '.join(among)}")
    return kinds

  def section(self, *names: str) -> "Fields":
    """The object in the first of these fields that is present; empty if none is."""
    for name in names:
      if name in self:
        if not isinstance(self.values[name], dict):
          raise self._wrong(name, self.values[name], "an object")
        return Fields(self.values[name], f"{self.where}, {name}")
    return Fields({}, f"{self.where}, {names[0]}")

  def num_labels(self) -> int:
    """The number of names in `id2label`. If transformers left its default names out, `num_labels`, or 2."""
    names = self.values.get("id2label")
    return len(names) if isinstance(names, dict) else self.integer("num_labels", 2, 2)

  def labels(self, num_labels: int) -> tuple[str, ...]:
    """Names of the classes 0, 1, ... from `id2label`; () if they are LABEL_0, ..., or its keys are not 0, 1, ..."""
    names = self.values.get("id2label")
    keys = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    if not isinstance(names, dict) or names == keys or set(names) != set(keys):
      return ()
    if not all(isinstance(label, (str, int)) for label in names.values()):
      raise self._wrong("id2label", names, "names of the classes")
    return tuple(str(names[key])[:200] for key in keys)


def finite_json(value: str) -> NoReturn:
  """`parse_constant` of json.loads: refuses Infinity and NaN, which no config needs."""
  raise ValueError(f"{value} is not a JSON number")


def short(value: object) -> str:
  """A value from outside as one line of at most 80 characters, for messages."""
  return re.sub(r"\s+", " ", _SHOWN.repr(value))[:80]


def listed(names: list[str]) -> str:
  """A list from outside as text of about LISTED characters at most, for messages."""
  text = str(names or "none")
  return text if len(text) <= LISTED else f"{text[:LISTED]}... ({len(names)} in all)"
