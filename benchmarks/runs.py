"""Shared by the benchmarks of defenses: runs of the program, each on a CPU core of its own, and rates of models."""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from w2s_jax import processes, sharding  # noqa: E402
from w2s_jax.data import tokenization  # noqa: E402
from w2s_jax.models import load_pretrained  # noqa: E402
from w2s_jax.tasks import CLASSIFICATION  # noqa: E402
from w2s_jax.training import inference  # noqa: E402

STUDENT = ("base", "clean", "poisoned")


def workdir_of(out, attack, seed):
  return out / f"{attack}-{seed}"


def take_over(source, target):
  """Copies a directory unless the target exists. An interrupted copy is made again."""
  if not target.exists():
    processes.copy_whole(source, target)


def run_cell(attack, seed, out, config, extra, core, models=()):
  """Runs the program for one cell, and returns its results.json; None if it failed.

  Args:
    out: directory of all cells; the workdir is OUT/ATTACK-SEED.
    config: the config file; "{attack}" in it is replaced.
    extra: further flags of w2s_jax.main.
    core: the CPU core to run on.
    models: {NAME: directory} of finished models to copy into the workdir before the run.
  """
  workdir = workdir_of(out, attack, seed)
  for name, source in dict(models).items():
    take_over(source, workdir / "models" / name)
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "ab") as log:  # a complete cell returns at once; other flags are refused
    start = log.tell()
    code = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-m", "w2s_jax.main", f"--config={config.format(attack=attack)}",
         f"--config.seed={seed}", f"--workdir={workdir}", *extra], stdout=log, stderr=log).returncode
  if code:
    lines = (workdir / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
    print(f"{workdir}: exit code {code}", *lines[-1:], sep=": ", file=sys.stderr, flush=True)
    return None
  return json.loads((workdir / "results.json").read_text())


def models_of(workdir, names):
  """{name: directory} of these models in a workdir."""
  return {name: workdir / "models" / name for name in names}


def predicted(directory, rows, data):
  """[N] int, the class that the model in a directory predicts for each row; `data` is the section of a config."""
  model, params = load_pretrained(directory, data.num_labels)
  arrays = tokenization.encode(tokenization.load(directory, model.config.vocab_size), [r["text"] for r in rows],
                               data.max_length)
  logits, _ = inference.outputs(model, params, arrays, sharding.make_mesh(), batch_size=data.eval_batch_size,
                                buckets=data.buckets)
  return CLASSIFICATION.predict(logits)


def measured(metrics, directory, rows, data, target):
  """The rates of the model in a directory; `metrics` is clean_metrics or attack_metrics (measure/metrics.py)."""
  return metrics(predicted(directory, rows, data), np.array([r["label"] for r in rows]), target)


def write_data(directory, **splits):
  """Writes SPLIT.json for each split, with only text and label of the rows: a data set for --config.data.*."""
  directory.mkdir(parents=True, exist_ok=True)
  for name, rows in splits.items():
    (directory / f"{name}.json").write_text(json.dumps([{k: row[k] for k in ("text", "label")} for row in rows]))


def on_cores(task, items, jobs):
  """Yields task(item, core) of each item, in order. Up to `jobs` tasks run at a time, each on a core of its own."""
  free = sorted(os.sched_getaffinity(0))[:jobs]
  def one(item):
    core = free.pop()
    try:
      return task(item, core)
    finally:
      free.append(core)
  with concurrent.futures.ThreadPoolExecutor(len(free)) as pool:
    yield from pool.map(one, items)


def mean_sd(values):
  return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}"


def seed_list(text):
  low, _, high = text.partition("-")
  return list(range(int(low), int(high or low) + 1))


def job_count(text):
  if int(text) < 1:
    raise argparse.ArgumentTypeError(f"got {text}, want at least one")
  return int(text)


def runs_parser(doc):
  """A parser with the arguments of every benchmark of defenses."""
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True, type=Path)
  parser.add_argument("--jobs", default=len(os.sched_getaffinity(0)), type=job_count)
  parser.add_argument("extra", nargs="*", help="further flags of w2s_jax.main, after --")
  return parser


def make_parser(doc, seeds, names):
  """runs_parser with --config, --attacks, --seeds (default `seeds`) and --only, which selects from `names`."""
  parser = runs_parser(doc)
  parser.add_argument("--config", default="configs/llama_{attack}.py")
  parser.add_argument("--attacks", default="badnet,insent")
  parser.add_argument("--seeds", default=seeds, type=seed_list)
  parser.add_argument("--only", default=",".join(names), help="comma-separated checks to run (default: %(default)s)")
  return parser


def parse(parser, names):
  """Parses and checks the arguments. --attacks and --only become lists."""
  args = parser.parse_args()
  args.attacks = args.attacks.split(",")
  if len(args.attacks) > 1 and "{attack}" not in " ".join([args.config, *args.extra]):
    parser.error(f"--config {args.config}: want {{attack}} in the config's name or a further flag where there is more "
                 "than one attack")
  args.only = [name for name in args.only.split(",") if name]
  if unknown := set(args.only) - set(names):
    parser.error(f"--only: got {', '.join(sorted(unknown))}, want names among {', '.join(names)}")
  return args


def end(failed):
  """Exits with code 1 if cells failed."""
  if failed:
    sys.exit(f"failed cells (see log.txt in each): {failed}")
