"""Poison a student, train a clean teacher, remove the backdoor, measure and report.

  python -m w2s_jax.main --config=configs/llama_badnet.py                        offline, two CPU cores, minutes
  python -m w2s_jax.main --config=configs/llama_badnet.py:data=DIR               real IMDB -> SST-2 files
  python -m w2s_jax.main --config=configs/llama_badnet.py:scale=8b               the released recipe, hub weights
  python -m w2s_jax.main --config=configs/clean_checkpoint.py --config.student.path=DIR --config.data.train=FILE
                                                                                 your suspicious checkpoint
  ... --config.seed=1 --config.defend.learning_rate=1e-3 --workdir=runs/mine     any field of the config
  ... --seeds=0,1,2 --jobs=2                                                     three runs, means and deviations

A stage whose output is in the workdir does not run again; an interrupted stage resumes.
"""

import os
import re
import sys
from pathlib import Path

for _name, _value in {  # silences the libraries, so that a user's mistake is reported in one line alone
    "TF_CPP_MIN_LOG_LEVEL": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DATASETS_VERBOSITY": "critical",
    "HF_HUB_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}.items():
  os.environ.setdefault(_name, _value)

from absl import flags  # noqa: E402
from absl import logging as absl_logging  # noqa: E402

from w2s_jax import InputError, command, results  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for all output; runs/CONFIG or runs/CONFIG-ARGUMENT by "
                               "default, with -seeds at its end if --seeds is given.")
_STAGE = flags.DEFINE_enum("stage", None, results.STAGES, "Run this stage alone. Its inputs must be in the workdir. "
                           "scan and search make the models that they need.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, if there are several.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Let JAX find the other processes (TPU pod, SLURM, Kubernetes, "
                                                          "MPI).")

_SEEDS = flags.DEFINE_list("seeds", None, "Run the config once for each of these seeds, such as 0,1,2, instead of "
                           "--config.seed: a grid with one table.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Number of a grid's cells that run at the same time, each in a process of its "
                             "own on an equal share of the CPU cores.", lower_bound=1)


def default_workdir(argv: list[str], ending: str = "") -> Path:
  """The default of --workdir: runs/CONFIG[-ARGUMENT][-ENDING], from the --config flag as the user typed it."""
  file, _, argument = command.typed_config(argv).partition(":")
  parts = [Path(file).stem, re.sub(r"[^A-Za-z0-9]+", "-", argument).strip("-"), ending]
  return Path("runs") / "-".join(filter(None, parts))


def _connect(processes):
  """Joins the other processes if the flags ask for it, and returns whether it did. Then only process 0 prints."""
  address = {"coordinator_address": _COORDINATOR.value, "num_processes": _PROCESSES.value, "process_id": _PROCESS.value}
  missing = [f"--{name}" for name, value in address.items() if value is None]
  if not missing or _DISTRIBUTED.value:
    try:
      processes.connect(*address.values())
    except (RuntimeError, ValueError) as e:
      raise InputError(f"the other processes were not found ({str(e).splitlines()[0]}): give --coordinator_address, "
                       "--num_processes and --process_id to each process") from e
    if not processes.writes():
      sys.stdout = open(os.devnull, "w")
    return True
  if len(missing) < len(address):
    raise InputError(f"each of several processes also needs {', '.join(missing)}")
  return False


def _find_devices():
  import jax
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:          # AssertionError: the platform's plugin is not installed
    platforms = os.environ.get("JAX_PLATFORMS", "")
    reason = str(e).splitlines()[0] if str(e) else "its plugin is not installed"
    hint = "check whether another program uses it"
    if platforms:
      hint = f"unset JAX_PLATFORMS={platforms}, or install JAX for that platform"
    raise InputError(f"JAX finds no device ({reason}): {hint}") from e


def main(argv: list[str]) -> int:
  del argv
  absl_logging.set_verbosity(absl_logging.ERROR)
  import jax  # late: JAX, transformers and PyTorch take seconds to load, and the flags are checked before

  from w2s_jax import grid, processes, stages, workers
  if _JOBS.value > 1:
    jax.config.update("jax_platforms", "cpu")    # this process trains nothing and leaves the devices to the cells
  if not _connect(processes):
    _find_devices()
  elif _JOBS.value > 1:
    raise InputError("--jobs starts its own processes on one machine: leave it out if there are several processes")
  workers.show_log()
  ending = "" if _SEEDS.value is None else "seeds"
  workdir = Path(os.path.expanduser(_WORKDIR.value)) if _WORKDIR.value else default_workdir(sys.argv, ending)
  if not jax.config.jax_compilation_cache_dir:     # else the user has set JAX_COMPILATION_CACHE_DIR
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute().parent / ".w2s_cache" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  config = command.CONFIG.value
  if _SEEDS.value is not None:
    config = grid.over_seeds(config, _SEEDS.value)
  try:
    if "grid" not in config:
      if _JOBS.value > 1:
        raise InputError(f"--jobs={_JOBS.value} is for a grid, and this config is one run: leave out --jobs, or give "
                         "several --seeds")
      return stages.run(config, workdir, _STAGE.value)
    if _STAGE.value:
      raise InputError(f"--stage={_STAGE.value} is for one run, and this is a grid: leave out --stage")
    return grid.run(config, workdir, _JOBS.value)
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
      if jax.process_count() == 1 or command.DEBUG.value:
        raise
      print(f"error: process {jax.process_index()} of {jax.process_count()} lost another process "
            f"({str(e).splitlines()[0][:200]}): start all processes again to continue from the last checkpoint",
            file=sys.stderr, flush=True)
      os._exit(processes.LOST_CODE)                # a normal exit would wait for the lost process, and then abort
    raise InputError(f"out of memory ({str(e).splitlines()[0]}): lower --config.*.batch_size, .eval_batch_size or "
                     ".max_length, or set --config.student.remat=full") from e
  except processes.Stopped as e:
    print(f"\n{e}: run the same command again to continue from there", file=sys.stderr)
    sys.exit(processes.STOPPED_CODE)


if __name__ == "__main__":
  command.run(main, __doc__)
