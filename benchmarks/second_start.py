"""Seconds from the start of the command to its first training step, on a first and on a second start, as JSON.

  python benchmarks/second_start.py --data=../shared/data/sst2 [--directory=runs/second_start]

The job is that of defend_stage.py. Each start has a workdir of its own. Both workdirs have the same parent, whose
.w2s_cache keeps the compiled programs and the teacher's outputs. Each start is killed once its first step is in the
metrics file.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import defend_stage


def seconds_to_first_step(command, metrics):
  start = time.perf_counter()
  process = subprocess.Popen(command, cwd=defend_stage.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while not (metrics.exists() and metrics.read_text().endswith("\n")):
    if process.poll() is not None:
      sys.exit(f"the command ended with {process.returncode} before its first step: {' '.join(map(str, command))}")
    time.sleep(0.01)
  seconds = time.perf_counter() - start
  process.send_signal(signal.SIGKILL)
  process.wait()
  return seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, help="directory with train, dev and test files: SST-2")
  parser.add_argument("--directory", type=Path, default=Path("runs/second_start"), help="where all files go")
  args = parser.parse_args()
  directory = args.directory.absolute()
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir(parents=True)
  defend_stage.prepare(directory, args.data, epochs=1, max_steps=0)
  defend_stage.prepare_workdir(directory, directory / "ours/prepared", args.data, 1, 0, log_every=1)
  seconds = []
  for start in ("first", "second"):
    workdir = shutil.copytree(directory / "ours/prepared", directory / "starts" / start)
    command = defend_stage.our_command(directory, workdir, args.data, 1, 0, "defend", log_every=1)
    seconds.append(seconds_to_first_step(command, workdir / "metrics/w2s.jsonl"))
  print(json.dumps({"first_s": round(seconds[0], 2), "second_s": round(seconds[1], 2),
                    "ratio": round(seconds[1] / seconds[0], 3)}))


if __name__ == "__main__":
  main()
