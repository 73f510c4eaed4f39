"""Raw rows of local data files: dictionaries of what is in their columns."""

import csv
import tempfile
from pathlib import Path

import datasets

from w2s_jax import InputError
from w2s_jax.data.labels import Named

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}       # names of their files


def read_file(file: str | Path) -> list[dict]:
  """Rows of a .json, .jsonl, .csv, .tsv or .parquet file; labels that the file has names for are labels.Named.

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
  try:
    if file.suffix == ".tsv":
      options |= {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL if _is_quoted(file) else csv.QUOTE_NONE}
    with tempfile.TemporaryDirectory() as cache:     # of datasets' own, which takes a changed file for the old one
      return rows_of(datasets.load_dataset(SUFFIXES[file.suffix], data_files=str(file), split="train",
                                           cache_dir=cache, **options))
  except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as e:  # the last: an empty file
    raise InputError(f"cannot read data file {file}: {e.__cause__ or str(e) or 'it is empty'}") from None


def rows_of(split: datasets.Dataset) -> list[dict]:
  """Rows of a split, the numbers of a ClassLabel with their names."""
  rows = split.to_list()
  for column, feature in split.features.items():
    if isinstance(feature, datasets.ClassLabel):
      for row in rows:
        if row[column] in range(feature.num_classes):
          row[column] = Named(row[column], feature.names[row[column]])
  return rows


def read_directory(directory: Path) -> dict[str, list[dict]]:
  """Rows of each of its train, dev (or validation) and test files.

  Raises:
    InputError: two files for one split; see `read_file`.
  """
  out = {}
  for split, names in SPLITS.items():
    found = [file for name in names for suffix in SUFFIXES if (file := directory / (name + suffix)).exists()]
    if len(found) > 1:
      raise InputError(f"{directory} has {' and '.join(f.name for f in found)}: keep one file per split")
    if found:
      out[split] = read_file(found[0])
  return out


def _is_quoted(file):
  """Whether a TSV has a line break or a tab in quotes, as pandas writes it; else a quote is a character like others."""
  with file.open(newline="", encoding="utf-8-sig", errors="replace") as f:
    raw = {line.rstrip("\r\n").count("\t") for line in f if line.strip("\r\n")}
    if len(raw) < 2:
      return False
    f.seek(0)
    return len({len(row) for row in csv.reader(f, delimiter="\t") if row}) == 1
