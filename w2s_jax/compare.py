"""Put finished runs side by side: every row, means over seeds, and differences between settings.

  python -m w2s_jax.compare runs/llama_badnet runs/three_shapes
  python -m w2s_jax.compare runs/badnet-* --csv=rows.csv --latex=table.tex

Runs whose configs differ only in seeds or mesh share a letter. Their rows are averaged together in the means.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import statistics
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from w2s_jax import InputError, results
from w2s_jax.arguments import Parser
from w2s_jax.report import paired, tables

FREE = ("seed", "defend.seeds", "mesh.data", "mesh.fsdp", "mesh.tensor")   # may differ between runs of one letter
RATES = ("ca", "asr", "asr_floor", "false_rate")
CONTROL = results.CONTROL


class Compared(NamedTuple):
  """A finished run.

  Attributes:
    name: the workdir; for a grid's table, the name of the cell.
    seed: the run's seed, from which student and teacher were made.
    fields: {field of the config: value}, without the fields in FREE.
    rows: the rows of results.json, as dicts with every field of results.Row.
    columns: names of the columns of the run's table.
    implanted: False if the attack's backdoor was not implanted (measure/attacked.py). Means and differences leave out
      such a run.
  """
  name: str
  seed: int
  fields: dict[str, Any]
  rows: list[dict]
  columns: tuple[str, ...]
  implanted: bool = True


def read(workdir: str | Path) -> Compared:
  """Reads the run in a workdir.

  Raises:
    InputError: the workdir has no finished run, or it cannot be read.
  """
  from w2s_jax import claims  # late: it loads JAX, which the help of `w2s-jax` does not need
  files = Path(workdir) / "results.json", Path(workdir) / "config.json"
  for file in files:
    if not file.is_file():
      raise InputError(f"{workdir} has no {file.name}: give the --workdir of a finished run")
  empty = {field.name: None for field in dataclasses.fields(results.Row)}
  try:
    saved, config = (json.loads(file.read_text()) for file in files)
    fields = claims.flat(dict(config))
    return Compared(str(workdir), fields["seed"], {k: v for k, v in fields.items() if k not in FREE},
                    [empty | row for row in saved["rows"]],
                    tuple(name for name in saved["meta"]["columns"] if name in results.COLUMNS),
                    saved["meta"].get("implanted", True))
  except OSError as e:
    raise InputError(f"cannot read {workdir} ({e.strerror}): give another workdir") from None
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise InputError(f"{workdir} has no readable results of a run ({type(e).__name__}: {e}): give the --workdir of a "
                     "finished run") from None


def check_different(runs: Sequence[Compared]) -> None:
  """Raises InputError if two rows have the same letter, attack, model and seeds, because a mean would count both."""
  seen = {}
  for letter, run in zip(letters(runs), runs):
    for row in run.rows:
      key = letter, run.seed, row["attack"], row["model"], row["seed"]
      if key in seen:
        raise InputError(f"{seen[key]} and {run.name} have the same config and seed: leave one of them out")
      seen[key] = run.name


def letters(runs: Sequence[Compared]) -> list[str]:
  """One letter (A, B, ..., Z, A1, ...) per run. Runs with equal fields share a letter."""
  different = []
  for run in runs:
    if run.fields not in different:
      different.append(run.fields)
  places = [different.index(run.fields) for run in runs]
  return [string.ascii_uppercase[place % 26] + (str(place // 26) if place >= 26 else "") for place in places]


def legend(runs: Sequence[Compared]) -> list[str]:
  """One line per letter: its runs, and the values of the fields in which they differ from the first run."""
  runs_of = {}
  for letter, run in zip(letters(runs), runs):
    runs_of.setdefault(letter, []).append(run)
  out = []
  for letter, group in runs_of.items():
    first, own = runs[0].fields, group[0].fields
    names = [name for name in sorted({*first, *own}) if first.get(name) != own.get(name)]
    text = f"{letter} = {', '.join(run.name + ('' if run.implanted else ' (not implanted)') for run in group)}"
    if own.get("teach.poison_rate"):
      text += ", with a POISONED teacher"
    if names:
      text += (f": {', '.join(f'{name}={_value(own, name)}' for name in names)} "
               f"(in A: {', '.join(_value(first, name) for name in names)})")
    out.append(text)
  return out


def _value(fields, name):
  """The field's value as text; a run of an older version lacks some fields."""
  if name not in fields:
    return "not set"
  value = fields[name]
  return ",".join(map(str, value)) if isinstance(value, list) else "empty" if value == "" else str(value)


def all_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """The header, then the cells of every row of every run, with each column that any of the runs' tables has."""
  names = [name for name in results.COLUMNS if any(name in run.columns for run in runs)]
  names = names if "attack" in names else [names[0], "attack", *names[1:]]
  marked = [(letter, row) for letter, run in zip(letters(runs), runs) for row in run.rows]
  head, *cells = tables.cells([row for _, row in marked], tuple(names))
  return [("run", "seed", *head), *((letter, str(row["seed"]), *line) for (letter, row), line in zip(marked, cells))]


def means(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """The header, then cells: means ± standard deviations over seeds, paired differences to lora_ce, 95% intervals."""
  labels = [results.COLUMNS[rate].label for rate in RATES]
  out = [("run", "trigger", "model", "seeds", *labels, f"CA - {CONTROL}", f"ASR - {CONTROL}")]
  grouped = groups(runs)
  for (letter, attack, model), rows in grouped.items():
    control = grouped.get((letter, attack, CONTROL), {}) if model != CONTROL else {}
    out.append((letter, _line(attack), model, str(len(rows)),
                *(paired.mean([row[rate] for row in rows.values()]) for rate in RATES),
                *(paired.difference(_pairs(rows, control), rate) for rate in ("ca", "asr"))))
  return out


def differences(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """The header, then cells: CA and ASR of each model minus those of the same model in the runs of `_reference`.

  A difference is paired: both rows have the same model, attack and seed.
  """
  grouped, reference = groups(runs), _reference(runs)
  out = [("run", "trigger", "model", "seeds", f"CA - CA in {reference}", f"ASR - ASR in {reference}")]
  for (letter, attack, model), rows in grouped.items():
    pairs = _pairs(rows, grouped.get((reference, attack, model), {})) if letter != reference else []
    if pairs:
      out.append((letter, _line(attack), model, str(len(pairs)),
                  *(paired.difference(pairs, rate) for rate in ("ca", "asr"))))
  return out


def _reference(runs):
  """The letter with which each letter is compared: the first with an implanted backdoor, or "A" if none has one."""
  return next((letter for letter, run in zip(letters(runs), runs) if run.implanted), "A")


def groups(runs: Sequence[Compared]) -> dict[tuple[str, str, str], dict[int, dict]]:
  """{(letter, attack, model): {seed: row}} of the runs whose backdoor was implanted.

  If each letter has one run, `seed` is the row's seed. If any letter has several runs, `seed` is the run's seed under
  every letter. Then the rows that `defend.seeds` gives a defense in one run are averaged into one row. They are not
  independent, because they share the run's student.
  """
  named = list(zip(letters(runs), runs))
  by_run = len({letter for letter, _ in named}) < len(named)
  out = {}
  for letter, run in named:
    for row in run.rows if run.implanted else []:
      seed = run.seed if by_run else row["seed"]
      out.setdefault((letter, row["attack"], row["model"]), {}).setdefault(seed, []).append(row)
  return {key: {seed: _averaged(copies) for seed, copies in rows.items()} for key, rows in out.items()}


def _averaged(rows):
  """A single row is unchanged. Of several rows: the first, with the mean rates of all and without intervals."""
  if len(rows) == 1:
    return rows[0]
  means = {rate: statistics.mean(row[rate] for row in rows) for rate in RATES if rows[0][rate] is not None}
  return rows[0] | means | {"ca_ci": None, "asr_ci": None}


def _pairs(rows, others):
  return [(row, others[seed]) for seed, row in rows.items() if seed in others]


def _line(text):
  return " ".join(text.split())


def sections(runs: Sequence[Compared]) -> dict[str, list[tuple[str, ...]]]:
  """{heading: table} of every row, of the means if a model has several seeds, and of the differences if there are any.

  A table is a header and the cells of its rows.
  """
  out = {"Every row": all_rows(runs)}
  if any(len(rows) > 1 for rows in groups(runs).values()):
    out["Mean ± standard deviation over seeds; differences with 95% intervals"] = means(runs)
  if len(lines := differences(runs)) > 1:
    out[f"Differences to {_reference(runs)}, with 95% intervals"] = lines
  return out


def text(runs: Sequence[Compared]) -> str:
  """The comparison as Markdown."""
  (_, rows), *others = sections(runs).items()
  parts = ["\n".join(f"- {line}" for line in legend(runs)), tables.markdown(rows)]
  return "\n\n".join(parts + [part for heading, lines in others for part in (f"{heading}:", _table(lines))])


def _table(lines):
  return tables.markdown([tuple(map(results.escape, line)) for line in lines])


def to_csv(runs: Sequence[Compared]) -> str:
  """CSV text with every field of every row. An interval is two numbers with a space between them."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  names = [field.name for field in dataclasses.fields(results.Row)]
  writer.writerow(["run", "workdir", "implanted", *names])
  for letter, run in zip(letters(runs), runs):
    for row in run.rows:
      values = [" ".join(map(str, v)) if isinstance(v := row[name], list) else v for name in names]
      writer.writerow([letter, run.name, run.implanted, *values])
  return out.getvalue()


def to_latex(runs: Sequence[Compared]) -> str:
  """LaTeX text: the legend as comments, the means as a tabular and, if there are any, the differences as another."""
  comments = "".join(f"% {line}\n" for line in legend(runs))
  parts = [tables.latex(means(runs))] + [tables.latex(lines) for lines in [differences(runs)] if len(lines) > 1]
  return comments + "\n".join(parts)


def take_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of this program."""
  parser.add_argument("runs", metavar="RUN", nargs="+", help="workdir of a finished run")
  parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every field of every row to FILE")
  parser.add_argument("--latex", metavar="FILE", type=Path, help="also write means and differences to FILE, as LaTeX "
                                                                 "tables that need the package booktabs")


def compare(args: argparse.Namespace) -> None:
  """Prints the comparison of the runs in `args`, and writes the files that `args` names.

  Raises:
    InputError: a workdir has no finished run, two runs are the same one, or a file cannot be written.
  """
  runs = [read(Path(os.path.expanduser(run))) for run in args.runs]
  check_different(runs)
  for file, content in ((args.csv, to_csv), (args.latex, to_latex)):
    if file:
      try:
        Path(os.path.expanduser(file)).write_text(content(runs))
      except OSError as e:
        raise InputError(f"cannot write {file} ({e.strerror}): give another name") from None
  from w2s_jax import command  # late: it defines the flags of main and plan
  command.print_text(text(runs))


def main() -> None:
  """Compares the runs on the command line; exits with code 2 after a user's mistake."""
  parser = Parser("python -m w2s_jax.compare", description=__doc__)
  take_arguments(parser)
  try:
    compare(parser.parse_args())
  except InputError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
