"""Labelled texts: the offline grammar, local files, or a hub data set -> rows {"id", "text", "label"}."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from w2s_jax import InputError
from w2s_jax.data import grammar, streams

LOG = logging.getLogger(__name__)

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "sentences"), ("label", "labels")
GRAMMAR_SIZES = {"train": 4000, "dev": 1000, "test": 1821}
SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load(source: str, sizes: Any, num_labels: int, seed: int = 0) -> dict[str, list[dict]]:
  """Train, dev and test rows of one domain.

  Args:
    source: "grammar:reviews", "grammar:phrases"; a directory with train, dev and test as .json (lines or one
      array), .jsonl, .csv, .tsv or .parquet; or a hub id.
    sizes: {"train", "dev", "test": rows to keep; 0: all of a file's, none of the grammar's}; a seeded random choice
      where there are more.
    num_labels: labels must lie in 0..num_labels-1.
    seed: of the choice, and of the dev split carved out of train where the source has none.
  Returns:
    {"train": rows, "dev": rows, "test": rows}.
  Raises:
    InputError: see `check`; or the source is not there.
  """
  if source.startswith("grammar:"):
    return _grammar(source, sizes)
  splits = _need_splits(_local(Path(source)) if Path(source).is_dir() else _hub(source), source)
  out = {split: check(rows, f"{source} ({split})", num_labels) for split, rows in splits.items()}
  rng = streams.rng(seed, "held out")
  if "dev" not in out:
    out |= _hold_out(out["train"], "dev", min(sizes["dev"] or 1000, max(1, len(out["train"]) // 10)), rng, source)
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

  Args:
    files: {"train": a file, a directory, a hub id or "grammar:phrases"; "dev", "test": a file, or "" for what `train`
      has of it}. A split that is nowhere is held out of train, which is said: a tenth for dev, a fifth for test.
    num_labels: labels must lie in 0..num_labels-1, and each of them must occur in train.
    seed: of what is held out.
    text_column, label_column: their names; "": found.
    names: of the classes, which labels may be too.
  Raises:
    InputError: see `check`; or a class has no training row.
  """
  source = files["train"]
  path = Path(source)
  if source.startswith("grammar:"):
    splits = _grammar(source, GRAMMAR_SIZES)
  elif path.is_dir():
    splits = _local(path)
  else:
    splits = {"train": read_file(path)} if path.suffix in SUFFIXES or path.is_file() else _hub(source)
  splits |= {split: read_file(file) for split, file in files.items() if file and split != "train"}
  if "train" not in splits:
    raise InputError(f"data source {source} has no train split: set --config.data.train")
  out = {split: check(rows, f"{files[split] or source} ({split})", num_labels, text_column, label_column,
                      names) for split, rows in splits.items()}
  rng = streams.rng(seed, "held out")
  for split, share in (("test", 5), ("dev", 10)):
    if split not in out:
      out |= _hold_out(out["train"], split, max(1, len(out["train"]) // share), rng, source)
  classes = {row["label"] for row in out["train"]}
  if missing := sorted(set(range(num_labels)) - classes):
    raise InputError(f"{source}: none of the {len(out['train'])} rows that are left to train on has label "
                     f"{', '.join(map(str, missing))}: give more rows, of all {num_labels} classes")
  return out


def _hold_out(train, name, size, rng, source):
  """{name: `size` of the rows, "train": the others}."""
  order = rng.permutation(len(train))
  LOG.info(f"{source} has no {name} split: {size} of its {len(train)} train rows are held out as one")
  return {name: [train[i] for i in sorted(order[:size])], "train": [train[i] for i in sorted(order[size:])]}


def read_file(file: str | Path) -> list[dict]:
  """Raw rows of a .json, .jsonl, .csv, .tsv or .parquet file.

  Raises:
    InputError: no such file, another kind of file, or one that does not parse.
  """
  file = Path(file)
  if not file.is_file():
    raise InputError(f"data file {file} does not exist: give one that does (--config.data.*, --config.attack.*)")
  if file.suffix not in SUFFIXES:
    raise InputError(f"data file {file}: want one of {', '.join(SUFFIXES)}")
  options = {}
  if SUFFIXES[file.suffix] == "csv":
    options = {"keep_default_na": False}             # a text may read "NA" or "null"
  if file.suffix == ".tsv":
    options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
  try:
    return datasets.load_dataset(SUFFIXES[file.suffix], data_files=str(file), split="train", **options).to_list()
  except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as e:  # the last: an empty file
    raise InputError(f"cannot read data file {file}: {e.__cause__ or str(e) or 'it is empty'}") from None


def _local(directory):
  out = {}
  for split in ("train", "dev", "test"):
    found = [directory / (split + suffix) for suffix in SUFFIXES if (directory / (split + suffix)).exists()]
    if len(found) > 1:
      raise InputError(f"{directory} has {' and '.join(f.name for f in found)}: keep one file per split")
    if found:
      out[split] = read_file(found[0])
  return out


def _hub(name):
  if name.startswith((".", "/", "~")) or name.count("/") > 1:
    raise InputError(f"data directory {name!r} does not exist: set :data=DIR (:data=DIR,attack=NAME,defend=NAME "
                     "where they are called otherwise), or --config.data.attack_source, .defend_source, .train")
  try:
    splits = datasets.load_dataset(name)
  except Exception as e:  # whatever the hub client raises without a network or for a wrong name
    raise InputError(f"data set {name!r} is neither a local directory nor to be had from the hub "
                     f"({type(e).__name__}): give a directory with train, dev and test files "
                     "(:data=DIR, or --config.data.attack_source, .defend_source, .train)") from e
  names = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
  return {names[k]: v.to_list() for k, v in splits.items() if k in names}


def _need_splits(splits, source):
  missing = [s for s in ("train", "test") if s not in splits]
  if missing:
    raise InputError(f"data source {source} has no {' and no '.join(missing)} split (want train, test and, if there "
                     "is one, dev)")
  return splits


def check(rows: list[dict], where: str, num_labels: int, text_column: str = "", label_column: str = "",
          names: Sequence[str] = ()) -> list[dict]:
  """Rows with columns found by name (or given) and labels checked.

  Raises:
    InputError: no rows, no text or label column, a text that is not a string, or a label that is neither an integer in
      range (as a number or text) nor one of the classes' names, LABEL_0... where they have none.
  """
  if not rows:
    raise InputError(f"{where}: no rows")
  wanted = [(text_column,) if text_column else TEXT_COLUMNS, (label_column,) if label_column else LABEL_COLUMNS]
  text, label = found = [next((n for n in names if n in rows[0]), None) for names in wanted]
  missing = ["|".join(names) for names, column in zip(wanted, found) if column is None]
  if missing:
    raise InputError(f"{where}: no column {' and no column '.join(missing)} among {', '.join(rows[0])}: rename "
                     "yours, or give their names (clean_checkpoint: --config.data.text_column, .label_column)")
  out = []
  for i, row in enumerate(rows):
    if not isinstance(row[text], str) or not row[text].strip():
      raise InputError(f"{where}: row {i} has {text} {row[text]!r}, wanted a non-empty string")
    if (number := _label(row[label], num_labels, names)) is None:
      named = f" or one of {', '.join(names)}" if names else ""
      raise InputError(f"{where}: row {i} has {label} {row[label]!r}, wanted an integer in 0..{num_labels - 1}{named} "
                       "(hub test sets with hidden labels have -1): give rows of the model's own classes, or set "
                       "--config.data.num_labels (:data=DIR,labels=C)")
    out.append({"id": i, "text": row[text], "label": number})
  return out


def _label(value, num_labels, names):
  """The class, or None where it is none."""
  if value in names:
    return names.index(value)
  if isinstance(value, str) and not names:
    value = value.removeprefix("LABEL_")       # what transformers calls classes without names
  try:
    number = None if isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    return None
  return int(number) if number in range(num_labels) else None
