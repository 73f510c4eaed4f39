"""Put finished runs side by side: every row, means over seeds, and differences between settings.

  python -m w2s_jax.compare runs/llama_badnet runs/three_shapes
  python -m w2s_jax.compare runs/badnet-* --csv=rows.csv --latex=table.tex

Runs whose configs differ in seeds alone have one letter. Their rows count together in the means.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from w2s_jax import InputError, results
from w2s_jax.arguments import Parser
from w2s_jax.report import tables

CONTROL = "lora_ce"                  # the defense with which the others of the same run and seed are compared
SEEDS = ("seed", "defend.seeds")     # fields in which runs of one letter may differ
RATES = ("ca", "asr", "asr_floor", "false_rate")
HEADS = {"ca": "CA", "asr": "ASR", "asr_floor": "ASR floor", "false_rate": "false rate"}


class Compared(NamedTuple):
  """A finished run.

  Attributes:
    name: the workdir, as it was typed.
    fields: {field of the config: value}, without the seeds.
    rows: the rows of results.json, as dicts with every field of results.Row.
    columns: names of its table's columns.
  """
  name: str
  fields: dict
  rows: list[dict]
  columns: tuple[str, ...]


def read(workdir: str | Path) -> Compared:
  """Reads the run in a workdir.

  Raises:
    InputError: the workdir has no finished run.
  """
  files = Path(workdir) / "results.json", Path(workdir) / "config.json"
  for file in files:
    if not file.is_file():
      raise InputError(f"{workdir} has no {file.name}: give the --workdir of a finished run")
  try:
    saved, config = (json.loads(file.read_text()) for file in files)
    from flax import traverse_util  # late: it loads JAX, which the help of `w2s-jax` does not need
    fields = traverse_util.flatten_dict(dict(config), sep=".")
    empty = {field.name: None for field in dataclasses.fields(results.Row)}
    rows = [empty | row for row in saved["rows"]]
    return Compared(str(workdir), {k: v for k, v in fields.items() if k not in SEEDS}, rows,
                    tuple(name for name in saved["meta"]["columns"] if name in results.COLUMNS))
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise InputError(f"{workdir} has files that are not those of a run ({type(e).__name__}: {e})") from None


def check_different(runs: Sequence[Compared]) -> None:
  """Raises InputError if two rows have the same letter, trigger, model and seed: they would count twice in a mean."""
  seen = {}
  for letter, run in zip(letters(runs), runs):
    for row in run.rows:
      key = letter, row["attack"], row["model"], row["seed"]
      if key in seen:
        raise InputError(f"{seen[key]} and {run.name} have the same config and seed: leave one of them out")
      seen[key] = run.name


def letters(runs: Sequence[Compared]) -> list[str]:
  """One letter (A, B, ..., Z, AA, ...) per run; runs with equal fields have the same."""
  names = ("".join(letters) for size in itertools.count(1)
           for letters in itertools.product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=size))
  different = []
  for run in runs:
    if run.fields not in different:
      different.append(run.fields)
  by_place = list(itertools.islice(names, len(different)))
  return [by_place[different.index(run.fields)] for run in runs]


def legend(runs: Sequence[Compared]) -> list[str]:
  """One line per letter: its runs, and the fields in which it differs from the first."""
  groups = {}
  for letter, run in zip(letters(runs), runs):
    groups.setdefault(letter, []).append(run)
  out = []
  for letter, group in groups.items():
    first, own = runs[0].fields, group[0].fields
    changes = [f"{name}={_value(own.get(name))}" for name in sorted({*first, *own}) if first.get(name) != own.get(name)]
    text = f": {', '.join(changes)} (in A: {', '.join(_value(first.get(c.partition('=')[0])) for c in changes)})"
    out.append(f"{letter} = {', '.join(run.name for run in group)}" + (text if changes else ""))
  return out


def _value(value):
  return ",".join(map(str, value)) if isinstance(value, list) else "-" if value in (None, "") else str(value)


def all_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """Head and cells of every row of every run, with the columns that some run's table has."""
  names = [name for name in results.COLUMNS if any(name in run.columns for run in runs)]
  names = names if "attack" in names else [names[0], "attack", *names[1:]]
  marked = [(letter, row) for letter, run in zip(letters(runs), runs) for row in run.rows]
  head, *cells = tables.cells([row for _, row in marked], tuple(names))
  return [("run", "seed", *head), *((letter, str(row["seed"]), *line) for (letter, row), line in zip(marked, cells))]


def means(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """Head and cells: mean ± standard deviation over seeds, and paired differences to lora_ce with 95% intervals."""
  out = [("run", "trigger", "model", "seeds", *(HEADS[rate] for rate in RATES), f"CA - {CONTROL}", f"ASR - {CONTROL}")]
  for (letter, attack, model), rows in _groups(runs).items():
    control = {row["seed"]: row for row in _groups(runs).get((letter, attack, CONTROL), [])}
    pairs = [(row, control[row["seed"]]) for row in rows if row["seed"] in control and model != CONTROL]
    out.append((letter, results.escape(attack), model, str(len(rows)),
                *(_mean([row[rate] for row in rows]) for rate in RATES),
                *(difference(pairs, rate) for rate in ("ca", "asr"))))
  return out


def differences(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
  """Head and cells: CA and ASR of each model minus those of the same model, trigger and seed in A."""
  groups = _groups(runs)
  out = [("run", "trigger", "model", "seeds", "CA - CA in A", "ASR - ASR in A")]
  for (letter, attack, model), rows in groups.items():
    first = {row["seed"]: row for row in groups.get(("A", attack, model), [])}
    pairs = [(row, first[row["seed"]]) for row in rows if row["seed"] in first and letter != "A"]
    if pairs:
      out.append((letter, results.escape(attack), model, str(len(pairs)), difference(pairs, "ca"),
                  difference(pairs, "asr")))
  return out


def _groups(runs):
  """{(letter, attack, model): rows}."""
  out = {}
  for letter, run in zip(letters(runs), runs):
    for row in run.rows:
      out.setdefault((letter, row["attack"], row["model"]), []).append(row)
  return out


def _mean(values):
  values = [value for value in values if value is not None]
  if not values:
    return "-"
  return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def difference(pairs: Sequence[tuple[dict, dict]], rate: str) -> str:
  """Mean of the rate in a row minus the rate in the row that it is paired with, and a 95% interval, as text.

  The interval of several pairs is Student's, over seeds. That of one pair is Newcombe's (Statistics in Medicine 17,
  1998, method 10): it covers the sampling of test rows alone, and treats the two samples as independent.

  Args:
    pairs: (row, row that it is compared with).
    rate: "ca" or "asr".
  """
  pairs = [(own, other) for own, other in pairs if own[rate] is not None and other[rate] is not None]
  if not pairs:
    return "-"
  gaps = [own[rate] - other[rate] for own, other in pairs]
  mean = statistics.mean(gaps)
  if len(pairs) > 1:
    import scipy.stats  # late: the import takes half a second
    half = scipy.stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    low, high = mean - half, mean + half
  else:
    (own, other), = pairs
    (p, (p_low, p_high)), (q, (q_low, q_high)) = ((row[rate], row[f"{rate}_ci"]) for row in (own, other))
    low, high = mean - math.hypot(p - p_low, q_high - q), mean + math.hypot(p_high - p, q - q_low)
  return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def text(runs: Sequence[Compared]) -> str:
  """The comparison as Markdown; a table of one line (means of one seed, differences to nothing) is left out."""
  parts = ["\n".join(f"- {line}" for line in legend(runs)), tables.markdown(all_rows(runs))]
  if any(len(rows) > 1 for rows in _groups(runs).values()):
    parts += ["Mean ± standard deviation over seeds; differences with 95% intervals:", tables.markdown(means(runs))]
  if len(lines := differences(runs)) > 1:
    parts += ["Differences to A, with 95% intervals:", tables.markdown(lines)]
  return "\n\n".join(parts)


def to_csv(runs: Sequence[Compared]) -> str:
  """Every field of every row; an interval is two numbers with a space between them."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  names = [field.name for field in dataclasses.fields(results.Row)]
  writer.writerow(["run", "workdir", *names])
  for letter, run in zip(letters(runs), runs):
    for row in run.rows:
      values = [" ".join(map(str, v)) if isinstance(v := row[name], list) else v for name in names]
      writer.writerow([letter, run.name, *values])
  return out.getvalue()


def take_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of this program."""
  parser.add_argument("runs", metavar="RUN", nargs="+", help="workdir of a finished run")
  parser.add_argument("--csv", metavar="FILE", type=Path, help="also write every field of every row to FILE")
  parser.add_argument("--latex", metavar="FILE", type=Path, help="also write the means to FILE, as a LaTeX table that "
                                                                 "needs the package booktabs")


def compare(args: argparse.Namespace) -> None:
  """Prints the comparison of the runs in `args`, and writes the files that `args` names.

  Raises:
    InputError: a workdir has no finished run, two runs are the same one, or a file cannot be written.
  """
  runs = [read(Path(run).expanduser()) for run in args.runs]
  check_different(runs)
  for file, content in ((args.csv, to_csv), (args.latex, lambda runs: tables.latex(means(runs)))):
    if file:
      try:
        file.expanduser().write_text(content(runs))
      except OSError as e:
        raise InputError(f"cannot write {file} ({e.strerror}): give another name") from None
  from w2s_jax import command  # late: it defines the flags of main and plan
  command.print_text(text(runs))


def main() -> NoReturn:
  """Compares the runs on the command line; exits with code 2 after a user's mistake."""
  parser = Parser("python -m w2s_jax.compare", description=__doc__)
  take_arguments(parser)
  try:
    compare(parser.parse_args())
  except InputError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  sys.exit()


if __name__ == "__main__":
  main()
