"""Which class a label of a file means: its name where both sides have names, its number where not."""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from w2s_jax import InputError

LOG = logging.getLogger(__name__)
SPOKEN = 8               # values that a message quotes at most


class Named(NamedTuple):
  """A label of a column that has names for its numbers: a ClassLabel of datasets, as Parquet files and the hub have."""
  number: int
  name: str

  def __repr__(self) -> str:
    return f"{self.number} ({self.name})"


def classes(values: Sequence[Any], num_labels: int, names: Sequence[str], where: str) -> list[int | None]:
  """The class of each label, None where it is none.

  Names come first, whatever the numbers say: with the classes' names ("1", "0") the label 1 is class 0, and with
  ("1 star", ..., "5 stars") the labels are 1 to 5. One rule holds for all of these labels.

  Numbers of a file without names mean what they mean in one of the same data set that has them.

  Args:
    values: all labels of a data set: numbers, text, booleans, Named.
    names: of the classes, in their order; () where they have none.
    where: the data set, for the line that says how labels were taken, unless each is simply its number.
  Raises:
    InputError: the data's names are partly the classes', in another order.
  """
  different = dict(sorted({_key(value): value for value in values}.items()))
  called = {value.number: value.name for value in different.values() if isinstance(value, Named)}
  by_name = {key: _by_name(called.get(value, value) if type(value) is int else value, names)
             for key, value in different.items()}
  by_number = {key: _by_number(value, num_labels) for key, value in different.items()}
  if None not in by_name.values():
    found = by_name
  elif None not in by_number.values():
    found = by_number
    if called and names:
      told = f"{where}: its classes are called {_listed(called.values())}, not {_listed(names)}"
      if any(by_name[key] not in (None, found[key]) for key in different):
        raise InputError(f"{told}; only some of the names are the same, and those have other numbers: say what the "
                         "data calls class 0, 1, ...: --config.data.class_names")
      LOG.warning(f"{told}: labels are taken by number. If that is wrong, say what the data calls class 0, 1, ...: "
                  "--config.data.class_names")
  else:                                                   # text that is a name, beside numbers
    found = by_number | {key: by_name[key] for key, value in different.items()
                         if isinstance(value, str) and by_name[key] is not None}
  taken = [f"{value!r} is class {found[key]}" + f" ({names[found[key]]})" * bool(names)
           for key, value in different.items() if found[key] not in (None, _plain(value))]
  if taken:
    LOG.info(f"{where}: labels are taken so: {_listed(taken)}")
  return [found[_key(value)] for value in values]


def check_names(names: Sequence[str], num_labels: int) -> tuple[str, ...]:
  """--config.data.class_names.

  Raises:
    InputError: two are the same, or there are not as many as classes.
  """
  if len(names) != num_labels or len({str(name).casefold() for name in names}) != len(names):
    raise InputError(f"class names {tuple(names)!r}: want {num_labels} different ones, what the data calls class 0, 1, "
                     "...: set --config.data.class_names=negative,positive")
  return tuple(map(str, names))


def names_of(values: Sequence[Any], num_labels: int) -> tuple[str, ...]:
  """What labels that have names call the classes 0, 1, ...; () where they do not, or not all."""
  names = {value.number: value.name for value in values if isinstance(value, Named)}
  return tuple(names[i] for i in range(num_labels)) if set(names) == set(range(num_labels)) else ()


def _key(value):
  return type(value).__name__, repr(value)                # 1, 1.0 and True would be one key of a dict


def _by_name(value, names):
  name = value.name if isinstance(value, Named) else value
  if name is None or not names:
    return None
  number = _number(name)
  written = None if number is None else str(number)
  for key, own in ((str, str(name)), (_folded, _folded(str(name))), (str, written), (_integer, number)):
    keys = [key(one) for one in names]                     # the first by which the names differ and one is the label's
    if own is not None and len(set(keys)) == len(keys) and own in keys:
      return keys.index(own)
  return None


def _folded(name):
  return re.sub(r"[\s_-]+", " ", name.strip().casefold())


def _integer(name):
  """The one integer in a name; None where there is none or more."""
  found = re.findall(r"(?<![\w.])-?\d+(?!\w|\.\d)", name)
  return int(found[0]) if len(found) == 1 else None


def _by_number(value, num_labels):
  number = _plain(value)
  if isinstance(value, bool) and num_labels != 2:
    return None
  return number if number in range(num_labels) else None


def _plain(value):
  """The integer that a label is, however it is written; None where it is none."""
  if isinstance(value, Named):
    return value.number
  if isinstance(value, str):
    value = {"true": 1, "false": 0}.get(value.strip().casefold(), value.removeprefix("LABEL_"))
  return int(value) if isinstance(value, bool) else _number(value)


def _number(value):
  """The integer that a number, or a text that is nothing else, stands for; None for others."""
  try:
    return int(float(value)) if not isinstance(value, bool) and float(value).is_integer() else None
  except (TypeError, ValueError):
    return None


def _listed(names):
  names = list(names)
  return ", ".join(names[:SPOKEN]) + ", ..." * (len(names) > SPOKEN)
