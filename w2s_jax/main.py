"""Poison a student, train a clean teacher, remove the backdoor, measure and report.

  python -m w2s_jax.main --config=configs/llama_badnet.py                        offline, two CPU cores, minutes
  python -m w2s_jax.main --config=configs/llama_badnet.py:data=DIR               real IMDB -> SST-2 files
  python -m w2s_jax.main --config=configs/llama_badnet.py:scale=8b               the released recipe, hub weights
  ... --config.seed=1 --config.defend.learning_rate=1e-3 --workdir=runs/mine     any field of the config

A stage whose output is in the workdir is not run again; one that was cut off resumes.
"""

import os
import re
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from w2s_jax import InputError  # noqa: E402

STAGES = ("warmup", "poison", "teach", "defend", "evaluate", "report")
FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as FILE or FILE:ARGUMENT (configs/*.py).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results, models and checkpoints go; runs/CONFIG by default.")
_STAGE = flags.DEFINE_enum("stage", None, STAGES, "Run this stage alone (its inputs must be in the workdir).")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a user error.")


def _parse(argv):
  """absl's flags, with its errors and the config file's as one line and exit code 2."""
  try:
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise InputError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    if _CONFIG.value is None:
      raise InputError("no --config: give one, e.g. --config=configs/llama_badnet.py (--help lists the flags)")
    return rest
  except (InputError, flags.Error, AttributeError, KeyError, TypeError, FileNotFoundError) as e:
    _fail(e, "--debug" in argv)


def _fail(error, debug):
  if debug:
    traceback.print_exc()
  message = str(error) if isinstance(error, (InputError, OSError, flags.Error)) else f"{type(error).__name__}: {error}"
  print("error: " + re.sub(r"\s*\n\s*", " ", message).strip(), file=sys.stderr)
  sys.exit(2)


def default_workdir(argv):
  """runs/CONFIG[-ARGUMENT] from the --config flag as it was typed."""
  typed = next(a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a))
  file, _, argument = typed.partition(":")
  return Path("runs") / "-".join(filter(None, [Path(file).stem, re.sub(r"[^A-Za-z0-9]+", "-", argument).strip("-")]))


def main(argv):
  del argv
  logging.set_verbosity(logging.ERROR)
  import jax  # jax and transformers load only once the flags are known to be good

  from w2s_jax import stages
  workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(sys.argv)
  jax.config.update("jax_compilation_cache_dir", str(workdir.absolute().parent / ".jax_cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  try:
    stages.run(_CONFIG.value, workdir, _STAGE.value)
  except InputError as e:
    _fail(e, _DEBUG.value)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
