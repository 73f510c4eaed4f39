"""Maps a file's labels to classes: by name if both the data and the classes have names, else by number."""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from w2s_jax import InputError

LOG = logging.getLogger(__name__)
MOST_QUOTED = 8          # largest number of values that a message quotes


class Named(NamedTuple):
  """A label with a number and a name: a ClassLabel of `datasets`, as in Parquet files and hub data sets."""
  number: int
  name: str

  def __repr__(self) -> str:
    return f"{self.number} ({self.name})"


def classes(values: Sequence[Any], num_labels: int, names: Sequence[str], where: str) -> list[int | None]:
  """The class of each label; None if the label means no class.

  If every label is a class name, all are read by name. Else, if every label is a class number, all are read by number.
  Else text that is a class name is read by name, and other labels by number. So names come first: the label 1 is class
  0 if the classes are called ("1", "0"), or ("1 star", ..., "5 stars").

  If one file of the data set gives names to its numbers, the numbers of the other files have these names, too. The log
  lists the labels that are not the number of their class.

  Args:
    values: all labels of a data set: numbers, text, booleans, Named.
    names: names of the classes, in the order of the classes; () if they have none.
    where: name of the data set in messages.
  Raises:
    InputError: some but not all of the data's names are class names, and one of them has another number than its class.
  """
  different = dict(sorted({_key(value): value for value in values}.items()))
  called = {value.number: value.name for value in different.values() if isinstance(value, Named)}
  by_name = {key: _by_name(called.get(value, value) if type(value) is int else value, names)
             for key, value in different.items()}
  by_number = {key: _by_number(value, num_labels) for key, value in different.items()}
  if None not in by_name.values():
    class_of = by_name
  elif None not in by_number.values():
    class_of = by_number
    if called and names:
      told = f"{where}: its classes are called {_listed(called.values())}, not {_listed(names)}"
      if any(by_name[key] not in (None, class_of[key]) for key in different):
        raise InputError(f"{told}; only some of the names are the same, and those have other numbers: say what the "
                         "data calls class 0, 1, ...: --config.data.class_names")
      LOG.warning(f"{told}: labels are taken by number. If that is wrong, say what the data calls class 0, 1, ...: "
                  "--config.data.class_names")
  else:                                                   # some labels are names in text, the others are numbers
    class_of = by_number | {key: by_name[key] for key, value in different.items()
                            if isinstance(value, str) and by_name[key] is not None}
  taken = [f"{value!r} is class {class_of[key]}" + f" ({names[class_of[key]]})" * bool(names)
           for key, value in different.items() if class_of[key] not in (None, _plain(value))]
  if taken:
    LOG.info(f"{where}: labels are taken so: {_listed(taken)}")
  return [class_of[_key(value)] for value in values]


def check_names(names: Sequence[str], num_labels: int) -> tuple[str, ...]:
  """The names of --config.data.class_names, as strings.

  Raises:
    InputError: two names are equal but for case, or there is not one name per class.
  """
  if len(names) != num_labels or len({str(name).casefold() for name in names}) != len(names):
    raise InputError(f"class names {tuple(names)!r}: want {num_labels} different ones, what the data calls class 0, 1, "
                     "...: set --config.data.class_names=negative,positive")
  return tuple(map(str, names))


def names_of(values: Sequence[Any], num_labels: int) -> tuple[str, ...]:
  """Names of the classes 0, 1, ... in the Named labels; () unless exactly these numbers have names."""
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
    keys = [key(class_name) for class_name in names]     # used only if they tell all class names apart
    if own is not None and len(set(keys)) == len(keys) and own in keys:
      return keys.index(own)
  return None


def _folded(name):
  return re.sub(r"[\s_-]+", " ", name.strip().casefold())


def _integer(name):
  """The only integer in a name; None if it has no integer or several."""
  integers = re.findall(r"(?<![\w.])-?\d+(?!\w|\.\d)", name)
  return int(integers[0]) if len(integers) == 1 else None


def _by_number(value, num_labels):
  number = _plain(value)
  if isinstance(value, bool) and num_labels != 2:
    return None
  return number if number in range(num_labels) else None


def _plain(value):
  """The integer value of a label, in whatever form it is written; None if it has none."""
  if isinstance(value, Named):
    return value.number
  if isinstance(value, str):
    value = {"true": 1, "false": 0}.get(value.strip().casefold(), value.removeprefix("LABEL_"))
  return int(value) if isinstance(value, bool) else _number(value)


def _number(value):
  """The value of an integral number, or of a text that is one; None for any other value."""
  try:
    return int(float(value)) if not isinstance(value, bool) and float(value).is_integer() else None
  except (TypeError, ValueError):
    return None


def _listed(names):
  names = list(names)
  return ", ".join(names[:MOST_QUOTED]) + ", ..." * (len(names) > MOST_QUOTED)
