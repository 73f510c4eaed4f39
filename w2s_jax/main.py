"""Poison a student, train a clean teacher, remove the backdoor, measure and report.

  python -m w2s_jax.main --config=configs/llama_badnet.py                        offline, two CPU cores, minutes
  python -m w2s_jax.main --config=configs/llama_badnet.py:data=DIR               real IMDB -> SST-2 files
  python -m w2s_jax.main --config=configs/llama_badnet.py:scale=8b               the released recipe, hub weights
  python -m w2s_jax.main --config=configs/clean_checkpoint.py --config.student.path=DIR --config.data.train=FILE
                                                                                 a suspicious checkpoint of yours
  ... --config.seed=1 --config.defend.learning_rate=1e-3 --workdir=runs/mine     any field of the config

A stage whose output is in the workdir is not run again; one that was cut off resumes.
"""

import difflib
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

for _name, _value in {  # what the libraries have to say of a mistake reaches the user as our one line
    "TF_CPP_MIN_LOG_LEVEL": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DATASETS_VERBOSITY": "critical",
    "HF_HUB_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}.items():
  os.environ.setdefault(_name, _value)

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from w2s_jax import InputError  # noqa: E402

STAGES = ("warmup", "poison", "teach", "defend", "evaluate", "report")
FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as FILE or FILE:ARGUMENT (configs/*.py).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results, models and checkpoints go; runs/CONFIG by default.")
_STAGE = flags.DEFINE_enum("stage", None, STAGES, "Run this stage alone (its inputs must be in the workdir).")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a user error.")


def _parse(argv):
  """absl's flags; a mistake in them or in the config file is one line and exit code 2."""
  if {"--help", "-help", "-h"} & set(argv):
    print(f"{__doc__}{FLAGS.main_module_help()}")
    sys.exit(0)
  try:
    _check_fields(argv, _read_config(argv))
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise InputError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest
  except (InputError, flags.Error) as e:
    _fail(e, "--debug" in argv)


def _typed_config(argv):
  typed = [a.split("=", 1)[1] for a in argv if re.match(r"--?config=.", a)]
  typed += [value for a, value in zip(argv, argv[1:]) if a in ("--config", "-config")]
  if not typed:
    raise InputError("no --config: give one, e.g. --config=configs/llama_badnet.py (--help lists the flags)")
  return typed[-1]


def _read_config(argv):
  """The config as its file makes it, before any --config.FIELD=VALUE; a file that makes none is an InputError."""
  file, colon, argument = _typed_config(argv).partition(":")
  if not Path(file).is_file():
    raise InputError(f"config file {file!r} does not exist: give one of configs/*.py")
  try:
    config = runpy.run_path(file)["get_config"](*[argument] * bool(colon))
  except InputError:
    raise
  except Exception as e:  # whatever a config file that someone wrote raises
    raise InputError(f"config file {file!r} does not make a config ({type(e).__name__}: {e}): want a Python file with "
                     "get_config(arg=None), as configs/*.py are") from e
  if not isinstance(config, ConfigDict):
    raise InputError(f"config file {file!r}: get_config gives a {type(config).__name__}, wanted an ml_collections "
                     "ConfigDict, as configs/*.py do")
  return config


def _check_fields(argv, config):
  """Refuses --config.FIELD=VALUE for a field that the config lacks, and names the nearest that it has."""
  def flat(tree, prefix=""):
    for name, value in tree.items():
      yield prefix + name
      if isinstance(value, ConfigDict):
        yield from flat(value, f"{prefix}{name}.")
  fields = list(flat(config))
  for field in (m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a))):
    if field not in fields:
      near = difflib.get_close_matches(field, fields, 3)
      raise InputError(f"config has no field {field!r}" + (
          f": did you mean {' or '.join(near)}?" if near else ": configs/common.py lists the fields"))


def _fail(error, debug):
  cause = error
  while cause is not None:  # ml_collections wraps what the config file itself raised, traceback and all
    error, cause = cause if isinstance(cause, InputError) else error, cause.__context__
  if debug:
    traceback.print_exc()
  print("error: " + re.sub(r"\s*\n\s*", " ", str(error)).strip(), file=sys.stderr)
  sys.exit(2)


def default_workdir(argv):
  """runs/CONFIG[-ARGUMENT] from the --config flag as it was typed."""
  file, _, argument = _typed_config(argv).partition(":")
  return Path("runs") / "-".join(filter(None, [Path(file).stem, re.sub(r"[^A-Za-z0-9]+", "-", argument).strip("-")]))


def main(argv):
  del argv
  logging.set_verbosity(logging.ERROR)
  import jax  # jax and transformers load only once the flags are known to be good

  from w2s_jax import stages
  workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(sys.argv)
  jax.config.update("jax_compilation_cache_dir", str(workdir.absolute().parent / ".w2s_cache" / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  try:
    stages.run(_CONFIG.value, workdir, _STAGE.value)
  except (InputError, FloatingPointError) as e:
    _fail(e, _DEBUG.value)
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
      raise
    _fail(InputError(f"out of memory ({str(e).splitlines()[0]}): lower --config.*.batch_size, .eval_batch_size or "
                     ".max_length, or set --config.student.remat=full"), _DEBUG.value)
  except KeyboardInterrupt:
    print("\ninterrupted: the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
