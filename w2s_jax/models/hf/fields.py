"""config.json of a model directory, field by field: it may come from a stranger, and says what memory is allocated."""

import re
import reprlib
from collections.abc import Collection
from typing import Any, NoReturn

from w2s_jax import InputError

MOST = 2**24               # no dimension of a real model is larger
MOST_LAYERS = 1024
LISTED = 5000              # characters of a list of tensors in an error
_SHOWN = reprlib.Repr()    # however deep or long a value is, unlike repr
_SHOWN.maxstring = _SHOWN.maxother = 80


class Fields:
  """The fields of config.json, each read with its type and range; null counts as absent.

  Raises:
    InputError: (every method) a field that is absent without a default, of the wrong type or out of range.
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
    """A number that something is divided by or raised from."""
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
    """The named fields must be absent or have the one value that is implemented."""
    for name, value in wanted.items():
      if name in self and self.values[name] != value:
        got = f"{name} {short(self.values[name])}"
        raise InputError(f"the model's {self.where}: {got} is not supported (want {short(value)})")

  def one_of(self, **names: str) -> None:
    """{another name: ours} of one thing, of which transformers may take either: they must not differ."""
    for other, name in names.items():
      if other in self and name in self and self.values[other] != self.values[name]:
        raise InputError(f"the model's {self.where} has {name} {short(self.values[name])} and {other} "
                         f"{short(self.values[other])}, two names of one thing: keep one")

  def token(self, name: str) -> int | None:
    """A token id; None where the field is absent."""
    return self.integer(name, low=-1) if name in self else None

  def tokens(self, name: str) -> int | tuple[int, ...] | None:
    """As `token`, or a list of ids."""
    value = self.values.get(name)
    if isinstance(value, list) and len(value) < 100:
      return tuple(Fields({name: one}, self.where).integer(name, low=-1) for one in value)
    return self.token(name)

  def entries(self, name: str, low: int = 0, high: int = MOST_LAYERS) -> list["Fields"]:
    """The entries of a list, each as the one field `name`; low and high are of its length."""
    value = self._get(name, None)
    if not isinstance(value, list) or not low <= len(value) <= high:
      raise self._wrong(name, value, f"a list of {low}..{high} entries")
    return [Fields({name: one}, self.where) for one in value]

  def section(self, *names: str) -> "Fields":
    """The first of these fields that is there; empty where none is."""
    for name in names:
      if name in self:
        if not isinstance(self.values[name], dict):
          raise self._wrong(name, self.values[name], "an object")
        return Fields(self.values[name], f"{self.where}, {name}")
    return Fields({}, f"{self.where}, {names[0]}")

  def labels(self, num_labels: int) -> tuple[str, ...]:
    """Names of the classes in `id2label`, in their order; () where they are LABEL_0..., or of another number."""
    names = self.values.get("id2label")
    keys = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    if not isinstance(names, dict) or names == keys or set(names) != set(keys):
      return ()
    if not all(isinstance(label, (str, int)) for label in names.values()):
      raise self._wrong("id2label", names, "names of the classes")
    return tuple(str(names[key])[:200] for key in keys)


def finite_json(value: str) -> NoReturn:
  """For json.loads(parse_constant=...): Infinity and NaN are no numbers of a config."""
  raise ValueError(f"{value} is not a JSON number")


def short(value: object) -> str:
  """A value that came from outside, in one line of at most 80 characters."""
  return re.sub(r"\s+", " ", _SHOWN.repr(value))[:80]


def listed(names: list[str]) -> str:
  """A list in an error, which may be a stranger's: at most LISTED characters of it."""
  text = str(names or "none")
  return text if len(text) <= LISTED else f"{text[:LISTED]}... ({len(names)} in all)"
