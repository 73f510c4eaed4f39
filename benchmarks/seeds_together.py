"""Wall time of the W2S defense stage with several seeds as one program, divided by that with one seed, as JSON.

  python benchmarks/seeds_together.py --data=DIR [--size=1m] [--seeds=5] [--rounds=3] [--max-steps=0]

DIR has SST-2, as in defend_stage.py. The stage trains for one epoch. `wall_ratio` compares whole processes. Each of
them has imports, compilation and the teacher's single pass once. `stage_ratio` compares only the training loops, with
their dev evaluations.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import defend_stage


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True)
  parser.add_argument("--size", default="1m", help="size of the student, as in step.py")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--rounds", type=int, default=3, help="number of alternating runs of each")
  parser.add_argument("--max-steps", type=int, default=0, help="bound on the number of steps; 0: the whole epoch")
  parser.add_argument("--directory", type=Path, default=Path("runs/seeds_together"), help="where all files go")
  args = parser.parse_args()
  if args.seeds < 2:
    parser.error(f"--seeds={args.seeds}: want at least 2, which are compared with one")
  directory = args.directory.absolute()
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir(parents=True)
  steps, _ = defend_stage.prepare(directory, args.data, 1, args.max_steps, args.size)
  times = {1: [], args.seeds: []}
  for count in times:
    defend_stage.prepare_workdir(directory, directory / f"prepared{count}", args.data, 1, args.max_steps,
                                 **{"defend.seeds": tuple(range(count))})
  for i in range(args.rounds):
    for count, timings in times.items():
      out = directory / f"{count}-{i}"
      shutil.copytree(directory / f"prepared{count}", out / "run")
      command = defend_stage.our_command(directory, out / "run", args.data, 1, args.max_steps, "defend",
                                         **{"defend.seeds": tuple(range(count))})
      timing = defend_stage.timed(command, out / "log.txt")
      log = (out / "log.txt").read_text()
      if timing["rc"]:
        sys.exit(log)
      timings.append(timing | {"stage_s": float(re.search(r"^w2s: \d+ steps in (\d+) s", log, re.M)[1])})
      print(count, timings[-1], file=sys.stderr, flush=True)
  one, several = ({key: statistics.median(run[key] for run in timings) for key in ("wall_s", "stage_s", "peak_rss_mib")}
                  for timings in times.values())
  print(json.dumps({"size": args.size, "steps": steps, "seeds": args.seeds, "one": one, "several": several,
                    "wall_ratio": several["wall_s"] / one["wall_s"],
                    "stage_ratio": several["stage_s"] / one["stage_s"]}))


if __name__ == "__main__":
  main()
