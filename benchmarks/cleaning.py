"""Cleans suspects of our own attacks with configs/clean_checkpoint.py, without telling it their triggers.

  python benchmarks/cleaning.py --attacked runs/held/cells/suffix-0 runs/held/cells/suffix-1 ... --out=runs/cleaning \
      -- --config.data.train=grammar:phrases --config.data.max_length=32 --config.scan.steps=0

--attacked names workdirs of finished attacks. Each is named ATTACK-SEED, as a cell of a grid is. The cleaning uses this
seed, and sees only the directory of the poisoned model. Then ASR is measured on the triggered rows of the attack's own
run, which the cleaning never reads. Complete cleanings are not run again. Prints a table, and writes it to
OUT/cleaning.md. A row has the means and standard deviations of a model over the suspects, and the ASR of each suspect.
"""

import json
import re
from pathlib import Path

import numpy as np
import runs
from ml_collections import ConfigDict

from w2s_jax.data import poison
from w2s_jax.measure import metrics

KEYS = ("ca", "asr", "word_flips")


def cell_of(main):
  """(attack, seed) of the cell in which a suspect is cleaned."""
  attack, seed = main.name.rsplit("-", 1)
  return f"{main.parent.name}-{attack}", seed


def clean(main, out, extra, core):
  """{model: its row, with ASR and floor on the attack's own rows} of one suspect; None if the cleaning failed."""
  flags = [f"--config.student.path={main / 'models' / 'poisoned'}", *extra]
  results = runs.run_cell(*cell_of(main), out, "configs/clean_checkpoint.py", flags, core)
  if not results:
    return None
  workdir = runs.workdir_of(out, *cell_of(main))
  data = ConfigDict(json.loads((workdir / "config.json").read_text())["data"])
  triggered, _ = poison.thaw(main / "data" / "triggered.jsonl")
  twin = next(r for r in json.loads((main / "results.json").read_text())["rows"] if r["model"] == "clean")
  rows = {}
  for row in results["rows"]:
    rows[row["directory"]] = row | {"asr_floor": twin["asr"]} | runs.measured(
        metrics.attack_metrics, workdir / "models" / row["directory"], triggered, data, twin["target_label"])
  return rows


def table(cleaned):
  """The table as Markdown; cleaned: {suspect: {model: row}}."""
  lines = ["| model | CA | ASR | word flips | ASR of each |", "|---|---|---|---|---|"]
  for model in next(iter(cleaned.values())):
    got = {key: np.array([rows[model][key] for rows in cleaned.values()], float) for key in KEYS}
    lines.append(f"| {model} | " + " | ".join(runs.mean_sd(got[key]) for key in KEYS) + " | "
                 + " ".join(f"{100 * x:.0f}" for x in got["asr"]) + " |")
  return "\n".join(lines)


def main():
  parser = runs.runs_parser(__doc__)
  parser.add_argument("--attacked", nargs="+", required=True, type=Path, help="workdirs of finished attacks")
  args = parser.parse_args()
  for path in args.attacked:
    files = "results.json", "data/triggered.jsonl", "models/poisoned"
    missing = [name for name in files if not (path / name).exists()]
    if missing or not re.fullmatch(r".+-\d+", path.name):
      parser.error(f"--attacked {path}: want the workdir of a finished attack, named ATTACK-SEED"
                   + f"; there is no {missing[0]} in it" * bool(missing))
  rows = runs.on_cores(lambda main, core: clean(main, args.out, args.extra, core), args.attacked, args.jobs)
  cleaned = dict(zip(args.attacked, rows))
  done = {main: rows for main, rows in cleaned.items() if rows}
  if done:
    floors = (f"{main} ({rows['suspect']['asr_floor']:.2f})" for main, rows in done.items())
    text = "In this order, the floor in brackets: " + " ".join(floors) + "\n\n" + table(done)
    (args.out / "cleaning.md").write_text(text + "\n")
    print(text)
  runs.end([str(runs.workdir_of(args.out, *cell_of(main))) for main in cleaned if main not in done])


if __name__ == "__main__":
  main()
