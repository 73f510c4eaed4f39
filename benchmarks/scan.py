"""Does the scan tell poisoned models from clean ones? Its ROC curve over models that are known to be either.

  python benchmarks/scan.py --clean='runs/*/models/clean' --poisoned='runs/*/models/poisoned' --data=grammar:reviews \
      --max-length=64 --out=runs/scan [--jobs=2]

The patterns name model directories, such as those of a grid. Of several directories with equal weights only one is
taken. Each model is scanned with `--config=configs/clean_checkpoint.py --stage=scan`. Finished scans are not repeated.
Prints a line per model and one JSON object, with the detection rate at 5% false alarms and at the program's own
threshold, and the area under the ROC curve. Models of every width are scanned, because the program's threshold is
calibrated with this script. A model without a verdict counts as strength 0.
"""

import glob
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runs import on_cores, runs_parser  # noqa: E402

from w2s_jax.measure.scan import EXIT_CODES, SUSPICIOUS, judged  # noqa: E402


def models(patterns):
  """Directories that match the patterns, one for each different model.safetensors."""
  found = {hashlib.sha256((Path(d) / "model.safetensors").read_bytes()).hexdigest(): d
           for pattern in patterns for d in sorted(glob.glob(pattern), reverse=True)}
  return sorted(found.values())


def scanned(directory, args, core):
  """Runs the scan of a model, and returns its findings per class (measure/scan.py)."""
  workdir = args.out / directory.strip("./").replace("/", "-")
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "a") as log:
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-m", "w2s_jax.main", "--stage=scan",
         "--config.scan.widest=1000000", *args.extra,
         "--config=configs/clean_checkpoint.py", f"--config.student.path={directory}",
         f"--config.data.train={args.data}", f"--config.data.max_length={args.max_length}", f"--workdir={workdir}"],
        stdout=log, stderr=log)
  if done.returncode not in EXIT_CODES.values():
    raise RuntimeError(f"{directory}: exit code {done.returncode}, see {workdir / 'log.txt'}")
  return json.loads((workdir / "scan/suspect.json").read_text())["classes"]


def roc(clean, poisoned):
  """The ROC curve of the strengths of clean and of poisoned models.

  Returns:
    {"area": area under the curve, "threshold": smallest strength with at most 5% of the clean models above it,
    "detected", "false_alarms": fractions of the poisoned and of the clean models above the threshold}.
  """
  clean, poisoned = np.array(clean), np.array(poisoned)
  threshold = np.sort(clean)[::-1][int(0.05 * len(clean))]
  wins = (poisoned[:, None] > clean).mean() + 0.5 * (poisoned[:, None] == clean).mean()
  return {"area": float(wins), "threshold": float(threshold), "detected": float((poisoned > threshold).mean()),
          "false_alarms": float((clean > threshold).mean())}


def main():
  parser = runs_parser(__doc__)
  parser.add_argument("--clean", nargs="+", required=True, help="patterns of directories of clean models")
  parser.add_argument("--poisoned", nargs="+", required=True, help="patterns of directories of poisoned models")
  parser.add_argument("--data", required=True, help="clean rows of the models' own task, as --config.data.train")
  parser.add_argument("--max-length", default=128, type=int, help="length to which texts are truncated, in tokens")
  args = parser.parse_args()
  def judged_scan(directory, core):
    return judged(scanned(directory, args, core))
  directories_of = {kind: models(getattr(args, kind)) for kind in ("clean", "poisoned")}
  if empty := [kind for kind, directories in directories_of.items() if not directories]:
    parser.error(f"no directory matches --{empty[0]}, and a ROC curve needs models of both kinds")
  strengths = {}
  for kind, directories in directories_of.items():
    for directory, top in zip(directories, on_cores(judged_scan, directories, args.jobs)):
      print(f"{kind:8} {directory}: " + (f"{top['strength']:.2f}, class {top['class']}, behind layer {top['layer']} "
                                         f"{' '.join(top['nearest'])}" if top else "no verdict"), flush=True)
      strengths.setdefault(kind, []).append(top["strength"] if top else 0.0)
  out = {"models": {kind: len(values) for kind, values in strengths.items()}, **roc(**strengths),
         "own_threshold": SUSPICIOUS,
         **{f"above_own_threshold_{kind}": float((np.array(values) >= SUSPICIOUS).mean())
            for kind, values in strengths.items()}, "strengths": {k: sorted(v) for k, v in strengths.items()}}
  (args.out / "roc.json").write_text(json.dumps(out, indent=2))
  print(json.dumps(out))


if __name__ == "__main__":
  main()
