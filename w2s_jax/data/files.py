"""Raw rows of local data files: {column: value}."""

import codecs
import csv
import gzip
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import datasets

from w2s_jax import InputError
from w2s_jax.data.labels import Named

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}   # also with .gz
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}    # split -> names of its file


def kind_of(file: Path) -> str:
  """The file's suffix in lower case, without .gz; "" if SUFFIXES does not have it."""
  name = file.name.lower().removesuffix(".gz")
  return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_file(file: str | Path) -> list[dict]:
  """Rows of a .json, .jsonl, .csv, .tsv or .parquet file, gzipped or not.

  A label becomes a labels.Named if the file has a name for it.

  Args:
    file: path of the file. If its name has a `*`, all files that match are read, in the order of their names.
  Raises:
    InputError: the file does not exist, is of another kind, or does not parse. Or files that match have different
      columns.
  """
  file = Path(os.path.expanduser(file))            # Path.expanduser raises if ~NAME names no user
  if "*" in file.name and not file.exists():
    return _read_all(sorted(file.parent.glob(file.name)), file)
  if file.is_dir():
    raise InputError(f"data file {file} is a directory: give a file in it (--config.data.*, --config.attack.*, "
                     "--config.defense.*)")
  if not file.is_file():
    raise InputError(f"data file {file} does not exist: give one that does (--config.data.*, --config.attack.*, "
                     "--config.defense.*)")
  suffix = kind_of(file)
  if not suffix:
    raise InputError(f"data file {file}: want one of {', '.join(SUFFIXES)}")
  try:
    options = _csv_options(file) if SUFFIXES[suffix] == "csv" else {}
    with tempfile.TemporaryDirectory() as cache:     # datasets' shared cache would return a changed file's old rows
      link = Path(cache) / ("rows" + suffix + ".gz" * (file.suffix.lower() == ".gz"))
      link.symlink_to(file.absolute())               # datasets interprets `[` and `::` in a path
      return rows_of(datasets.load_dataset(SUFFIXES[suffix], data_files=str(link), split="train", cache_dir=cache,
                                           **options))
  except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration, EOFError, OSError, zlib.error) as e:
    cause = e.__cause__ or e                         # an empty file raises StopIteration
    said = " ".join(str(cause).split())[:300] or "it is empty"
    utf8 = ". Save it as UTF-8" if isinstance(cause, UnicodeDecodeError) or _is_utf16(file) else ""
    raise InputError(f"cannot read data file {file}: {said}{utf8}") from None


def _is_utf16(file):
  """Whether the file begins with the byte order mark of UTF-16."""
  with file.open("rb") as f:
    return f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _read_all(files, pattern):
  """Rows of all files, one after the other."""
  if not files:
    raise InputError(f"no data file matches {pattern}: give a pattern that one does (--config.data.*)")
  parts = [read_file(file) for file in files]
  columns = [set(part[0]) if part else set() for part in parts]
  for file, names in zip(files, columns):
    if names != columns[0]:
      raise InputError(f"{file} has columns {', '.join(sorted(names))}, {files[0].name} has "
                       f"{', '.join(sorted(columns[0]))}: give files with the same columns")
  return [row for part in parts for row in part]


def rows_of(split: datasets.Dataset) -> list[dict]:
  """Rows of a split; a ClassLabel's numbers become labels.Named."""
  rows = split.to_list()
  for column, feature in split.features.items():
    if isinstance(feature, datasets.ClassLabel):
      for row in rows:
        if row[column] in range(feature.num_classes):
          row[column] = Named(row[column], feature.names[row[column]])
  return rows


def rows_of_splits(found: Mapping[str, datasets.Dataset]) -> dict[str, list[dict]]:
  """{"train", "dev", "test": rows} of the data set's splits; an absent split has no key."""
  return {split: rows_of(found[name]) for split, names in SPLITS.items() for name in names if name in found}


def read_directory(directory: Path) -> dict[str, list[dict]]:
  """{split: rows} of a directory.

  The directory has train, dev (or validation, or valid) and test files, or it is a snapshot of a hub data set with
  data/train-*.parquet, or save_to_disk of `datasets` wrote it.

  Raises:
    InputError: two files for one split; see also `read_file`.
  """
  if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
    return _saved_to_disk(directory)
  out = {}
  for split, names in SPLITS.items():
    files = sorted((file for file in directory.iterdir() if file.is_file() and kind_of(file)
                    and file.name.lower().removesuffix(".gz").removesuffix(kind_of(file)) in names),
                   key=lambda file: ([*SUFFIXES].index(kind_of(file)), file.name))
    shards = sorted(file for name in names for file in directory.glob(f"data/{name}-*.parquet"))
    names = [f.name for f in files] + sorted({f"data/{f.name.split('-')[0]}-*.parquet" for f in shards})
    if len(names) > 1:
      raise InputError(f"{directory} has {' and '.join(names)}: keep one file per split")
    if files or shards:
      out[split] = [row for file in files or shards for row in read_file(file)]
  return out


def _saved_to_disk(directory):
  try:
    saved = datasets.load_from_disk(str(directory), keep_in_memory=True)
  except (ValueError, OSError, KeyError, TypeError) as e:
    raise InputError(f"cannot read {directory}, which looks like a data set of save_to_disk: {str(e)[:300]}") from None
  return rows_of_splits(saved if isinstance(saved, datasets.DatasetDict) else {"train": saved})


def _csv_options(file):
  """Options for reading a CSV or TSV file: its delimiter, and a TSV's quoting. "NA" and "null" stay texts."""
  options = {"keep_default_na": False}
  if kind_of(file) == ".tsv":
    return options | {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if _is_quoted(file) else csv.QUOTE_NONE}
  with _opened(file) as f:
    header = f.readline()
  return options | ({"delimiter": ";"} if ";" in header and "," not in header else {})


def _is_quoted(file):
  """Whether quotes in a TSV enclose line breaks or tabs, as in pandas' files. If not, they are ordinary characters."""
  with _opened(file) as f:
    if len({line.rstrip("\r\n").count("\t") for line in f if line.strip("\r\n")}) < 2:
      return False
  with _opened(file) as f:
    try:
      return len({len(row) for row in csv.reader(f, delimiter="\t") if row}) == 1
    except csv.Error:
      return False


def _opened(file) -> IO[str]:
  options = dict(newline="", encoding="utf-8-sig", errors="replace")
  return gzip.open(file, "rt", **options) if file.suffix.lower() == ".gz" else file.open(**options)
