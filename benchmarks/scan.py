"""Does the verdict without a trigger tell poisoned models from clean ones? ROC over models whose answer is known.

  python benchmarks/scan.py --clean='runs/*/models/clean' --poisoned='runs/*/models/poisoned' --data=grammar:reviews \
      --max-length=64 --out=runs/scan [--jobs=2]

The patterns are of model directories (a grid leaves some); of one name and weights only one is taken. Each is scanned
as `--config=configs/clean_checkpoint.py --stage=scan` does it; finished ones are not scanned again. Prints a line per
model and one JSON object: detected at 5% false alarms and at the program's own threshold, area under the ROC curve.
Models of every width are scanned: this is what the program is calibrated by. A model that is wrong too often for a
verdict counts as strength 0.
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
  """Directories of different weights."""
  found = {hashlib.sha256((Path(d) / "model.safetensors").read_bytes()).hexdigest(): d
           for pattern in patterns for d in sorted(glob.glob(pattern), reverse=True)}
  return sorted(found.values())


def scanned(directory, args, core):
  """What `scan` says of each class of the model."""
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
  """{"area", "threshold": with at most 5% of the clean above it, "detected": of the poisoned, "false_alarms"}."""
  clean, poisoned = np.array(clean), np.array(poisoned)
  threshold = np.sort(clean)[::-1][int(0.05 * len(clean))]
  wins = (poisoned[:, None] > clean).mean() + 0.5 * (poisoned[:, None] == clean).mean()
  return {"area": float(wins), "threshold": float(threshold), "detected": float((poisoned > threshold).mean()),
          "false_alarms": float((clean > threshold).mean())}


def main():
  parser = runs_parser(__doc__)
  parser.add_argument("--clean", nargs="+", required=True, help="patterns of directories")
  parser.add_argument("--poisoned", nargs="+", required=True, help="patterns of directories")
  parser.add_argument("--data", required=True, help="clean rows of the models' own task, as --config.data.train")
  parser.add_argument("--max-length", default=128, type=int, help="tokens of a text")
  args = parser.parse_args()
  def one(directory, core):
    return judged(scanned(directory, args, core))
  strengths = {}
  for kind in ("clean", "poisoned"):
    directories = models(getattr(args, kind))
    for directory, most in zip(directories, on_cores(one, directories, args.jobs)):
      print(f"{kind:8} {directory}: " + (f"{most['strength']:.2f}, class {most['class']}, behind layer {most['layer']} "
                                         f"{' '.join(most['nearest'])}" if most else "no verdict"), flush=True)
      strengths.setdefault(kind, []).append(most["strength"] if most else 0.0)
  out = {"models": {kind: len(values) for kind, values in strengths.items()}, **roc(**strengths),
         "own_threshold": SUSPICIOUS,
         **{f"above_own_threshold_{kind}": float((np.array(values) >= SUSPICIOUS).mean())
            for kind, values in strengths.items()}, "strengths": {k: sorted(v) for k, v in strengths.items()}}
  (args.out / "roc.json").write_text(json.dumps(out, indent=2))
  print(json.dumps(out))


if __name__ == "__main__":
  main()
