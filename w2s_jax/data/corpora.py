"""Labelled texts from the offline grammar, local files or a hub data set, as rows {"id", "text", "label"}."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from w2s_jax import InputError
from w2s_jax.data import files as data_files
from w2s_jax.data import grammar, labels, streams

LOG = logging.getLogger(__name__)

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "sentences"), ("label", "labels")
GRAMMAR_SIZES = {"train": 4000, "dev": 1000, "test": 1821}


def load(source: str, sizes: Any, num_labels: int, seed: int = 0, names: Sequence[str] = ()) -> dict[str, list[dict]]:
  """Train, dev and test rows of one domain.

  Args:
    source: see `read`.
    sizes: {"train", "dev", "test": number of rows to keep}. Rows of a file are chosen at random. 0 keeps every row of a
      file, and no row of the grammar.
    num_labels: labels must lie in 0..num_labels-1.
    seed: seed of this choice, and of the dev split that is held out of train if the source has none.
    names: names of the classes. A label may be such a name instead of a number.
  Returns:
    {"train": rows, "dev": rows, "test": rows}.
  Raises:
    InputError: see `read` and `check`; or the source has no dev split, and none can be held out.
  """
  return prepare(read(source, sizes), source, sizes, num_labels, seed, names)


def read(source: str, sizes: Any) -> dict[str, list[dict]]:
  """Raw rows of each split of a source.

  Args:
    source: "grammar:reviews" or "grammar:phrases"; a directory that files.read_directory can read; or a hub id.
    sizes: number of rows per split, for the grammar.
  Raises:
    InputError: the source does not exist, is a file, or has no train or no test split; see also files.read_directory.
  """
  if source.startswith("grammar:"):
    return _grammar(source, sizes)
  path = Path(os.path.expanduser(source))
  if path.is_file():
    raise InputError(f"data source {source} is a file: give a directory with train, dev and test files "
                     "(--config.data.attack_source, .defend_source)")
  splits = data_files.read_directory(path) if path.is_dir() else _hub(source)
  missing = [split for split in ("train", "test") if split not in splits]
  if missing:
    raise InputError(f"data source {source} has no {' and no '.join(missing)} split (want train, test and, if there "
                     "is one, dev)")
  return splits


def prepare(splits: dict[str, list[dict]], source: str, sizes: Any, num_labels: int, seed: int = 0,
            names: Sequence[str] = ()) -> dict[str, list[dict]]:
  """Does what `load` does, for splits that `read` has returned."""
  if source.startswith("grammar:"):
    return splits
  out = check({f"{source} ({split})": rows for split, rows in splits.items()}, source, num_labels, names=names)
  out = dict(zip(splits, out.values()))
  rng = streams.rng(seed, "held out")
  if "dev" not in out:
    out |= _hold_out(out["train"], "dev", min(sizes["dev"] or 1000, max(1, len(out["train"]) // 10)), rng, source)
  _warn_of_shared(out, source)
  for split, rows in out.items():
    if sizes[split] and sizes[split] < len(rows):
      out[split] = [rows[i] for i in sorted(rng.permutation(len(rows))[:sizes[split]])]
  return out


def _grammar(source, sizes):
  domain = source.removeprefix("grammar:")
  if domain not in grammar.NOUNS:
    raise InputError(f"data source {source!r}: want one of {', '.join('grammar:' + d for d in grammar.NOUNS)}")
  return {split: grammar.rows(domain, split, size) for split, size in sizes.items()}


def load_clean(files: Mapping[str, str], num_labels: int, seed: int, text_column: str = "", label_column: str = "",
               names: Sequence[str] = ()) -> dict[str, list[dict]]:
  """Train, dev and test rows to clean a model with.

  If there is no test split, a fifth of train is held out for it. If there is no dev split, a tenth of the train rows
  that are left is held out. The log says so.

  Args:
    files: {"train": a file, or a source as in `read`; "dev", "test": a file, or "" for that split of the train source}.
    num_labels: labels must lie in 0..num_labels-1, and each of them must occur in train.
    seed: seed of the held-out splits.
    text_column, label_column: names of the columns; "": the first known name that the data has.
    names: names of the classes. A label may be such a name instead of a number.
  Raises:
    InputError: the source has no train split, or a class has no training row; see also `check` and files.read_file.
  """
  source = files["train"]
  path = Path(os.path.expanduser(source))
  if source.startswith("grammar:"):
    splits = _grammar(source, GRAMMAR_SIZES)
  elif path.is_dir():
    splits = data_files.read_directory(path)
  else:
    is_file = data_files.kind_of(path) or path.is_file()
    splits = {"train": data_files.read_file(path)} if is_file else _hub(source)
  splits |= {split: data_files.read_file(file) for split, file in files.items() if file and split != "train"}
  if "train" not in splits:
    raise InputError(f"data source {source} has no train split: set --config.data.train")
  where = [f"{files[split] or source} ({split})" for split in splits]
  out = dict(zip(splits, check(dict(zip(where, splits.values())), source, num_labels, text_column, label_column,
                               names).values()))
  rng = streams.rng(seed, "held out")
  for split, share in (("test", 5), ("dev", 10)):
    if split not in out:
      out |= _hold_out(out["train"], split, max(1, len(out["train"]) // share), rng, source)
  if not source.startswith("grammar:"):
    _warn_of_shared(out, source)
  classes = {row["label"] for row in out["train"]}
  if missing := sorted(set(range(num_labels)) - classes):
    raise InputError(f"{source}: none of the {len(out['train'])} rows that are left to train on has label "
                     f"{', '.join(map(str, missing))}: give more rows, of all {num_labels} classes")
  return out


def _hold_out(train, name, size, rng, source):
  """{name: about `size` rows, "train": the other rows}. Rows with the same text stay in the same split.

  A text with more rows than the new split has room for stays in train, so the split may be smaller than `size`. If no
  text fits, the text with the fewest rows is held out.
  """
  order, groups = rng.permutation(len(train)), {}
  for i in order:
    groups.setdefault(_text(train[i]), []).append(i)
  chosen = []
  for group in groups.values():
    if len(chosen) + len(group) <= min(size, len(train) - 1):
      chosen += group
  if not chosen and len(groups) > 1:
    chosen = min(groups.values(), key=len)
  repeated = len(train) - len(groups)
  LOG.info(f"{source} has no {name} split: {len(chosen)} of its {len(train)} train rows are held out as one"
           + f" ({repeated} rows repeat the text of another, and are in its split)" * bool(repeated))
  if not chosen:
    raise InputError(f"{source}: no {name} split can be held out, all {len(train)} rows have the same text: give "
                     "other rows")
  kept = set(chosen)
  return {name: [train[i] for i in sorted(chosen)], "train": [row for i, row in enumerate(train) if i not in kept]}


def _text(row):
  return " ".join(row["text"].split())


def _warn_of_shared(splits, source):
  """Logs how many dev and test rows have the text of a training row."""
  trained = {_text(row) for row in splits["train"]}
  for split in ("dev", "test"):
    if shared := sum(_text(row) in trained for row in splits.get(split, ())):
      LOG.warning(f"{source}: {shared} of {len(splits[split])} {split} rows have the text of a training row: what is "
                  f"measured on them is memory. Give {split} rows that are in no training file")


def _hub(name):
  if name.startswith((".", "/", "~")) or name.count("/") > 1:
    raise InputError(f"data directory {name!r} does not exist: set :data=DIR (:data=DIR,attack=NAME,defend=NAME if "
                     "its directories are not imdb and sst2), or --config.data.attack_source, .defend_source, .train")
  try:
    splits = datasets.load_dataset(name)
  except Exception as e:  # the hub client raises many types without a network or for a wrong name
    raise InputError(f"data set {name!r} is neither a local directory nor to be had from the hub "
                     f"({type(e).__name__}): give a directory with train, dev and test files "
                     "(:data=DIR, or --config.data.attack_source, .defend_source, .train)") from e
  return data_files.rows_of_splits(splits)


def check(splits: dict[str, list[dict]], source: str, num_labels: int, text_column: str = "", label_column: str = "",
          names: Sequence[str] = ()) -> dict[str, list[dict]]:
  """{split: rows {"id", "text", "label"}} with checked labels. Rows with an empty text are dropped.

  Args:
    splits: {name of the split in messages: raw rows}.
    source: name of the whole data set in messages.
    text_column, label_column: names of the columns; "": the first known name that the rows have.
  Raises:
    InputError: a split has no row with a text, the text or label column is missing, a text is not a string, or a label
      is neither a class name nor a class number. A number may be written as text: "1" and "LABEL_1" are 1. See also
      labels.classes.
  """
  wanted = [(text_column,) if text_column else TEXT_COLUMNS, (label_column,) if label_column else LABEL_COLUMNS]
  kept, columns = {}, {}
  for where, rows in splits.items():
    columns[where] = text, _ = _columns(rows, where, wanted)
    kept[where] = _with_text(rows, where, text)
  values = [row[columns[where][1]] for where, rows in kept.items() for row in rows.values()]
  numbers = iter(labels.classes(values, num_labels, names, source))
  return {where: [_checked(i, row, where, *columns[where], next(numbers), num_labels, names) for i, row in rows.items()]
          for where, rows in kept.items()}


def class_names(rows: list[dict], num_labels: int) -> tuple[str, ...]:
  """Names of the classes 0, 1, ... in the label column of raw rows; () unless every class has a name there."""
  column = next((name for name in LABEL_COLUMNS if rows and name in rows[0]), None)
  return labels.names_of([row[column] for row in rows], num_labels) if column else ()


def _columns(rows, where, wanted):
  """(text column, label column)."""
  if not rows:
    raise InputError(f"{where}: no rows")
  columns = [next((n for n in names if n in rows[0]), None) for names in wanted]
  missing = ["|".join(names) for names, column in zip(wanted, columns) if column is None]
  if missing:
    raise InputError(f"{where}: no column {' and no column '.join(missing)} among {', '.join(rows[0])}: rename "
                     "yours, or give their names (clean_checkpoint: --config.data.text_column, .label_column)")
  if unread := [name for name, value in rows[0].items() if name not in columns and isinstance(value, str)]:
    LOG.info(f"{where}: texts are column {columns[0]}; not read: {', '.join(unread)}")
  return columns


def _with_text(rows, where, text):
  """{index: row} of the rows whose text is not empty."""
  out = {i: row for i, row in enumerate(rows) if not (row[text] is None or str(row[text]).isspace() or row[text] == "")}
  if not out:
    raise InputError(f"{where}: row 0 has {text} {rows[0][text]!r}, wanted a non-empty string (all {len(rows)} rows "
                     "have an empty text)")
  if empty := len(rows) - len(out):
    first = next(i for i in range(len(rows)) if i not in out)
    LOG.warning(f"{where}: {empty} of {len(rows)} rows have an empty text and are left out (the first: row {first})")
  return out


def _short(value):
  return repr(value) if len(repr(value)) <= 80 else repr(value)[:80] + "..."


def _checked(i, row, where, text, label, number, num_labels, names):
  if not isinstance(row[text], str):
    whole = " (is it a file of columns? want an object for each row)" * isinstance(row[text], (list, dict))
    raise InputError(f"{where}: row {i} has {text} {_short(row[text])}, wanted a non-empty string{whole}")
  if number is None:
    wanted = f"an integer in 0..{num_labels - 1}" + f" or one of {', '.join(names)}" * bool(names)
    raise InputError(f"{where}: row {i} has {label} {_short(row[label])}, wanted {wanted} (hub test sets with hidden "
                     "labels have -1): give rows of the model's own classes, set --config.data.num_labels "
                     "(:data=DIR,labels=C), or say what the data calls them (--config.data.class_names)")
  return {"id": i, "text": row[text], "label": number}
