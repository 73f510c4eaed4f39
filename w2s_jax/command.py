"""The command line that main and plan share: --config, its fields, and mistakes as one line."""

import difflib
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from w2s_jax import InputError

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as FILE or FILE:ARGUMENT (configs/*.py).")
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a user error.")


def parse(argv, doc):
  """absl's flags; a mistake in them or in the config file is one line and exit code 2."""
  if {"--help", "-help", "-h"} & set(argv):
    print(f"{doc}{FLAGS.main_module_help()}\n{FLAGS.module_help(__name__)}\n{_fields_help(argv)}")
    sys.exit(0)
  try:
    check_fields(argv, _read_config(argv))
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise InputError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest
  except (InputError, flags.Error) as e:
    fail(e, "--debug" in argv)


def _fields_help(argv):
  """Every field of the config that --config names; of configs/llama_badnet.py where it names none."""
  from w2s_jax.config import describe  # these load JAX: only where they are asked for
  from w2s_jax.defenses import SETTINGS
  named = any(re.match(r"--?config(=|$)", arg) for arg in argv)
  file = [] if named else ["--config=configs/llama_badnet.py"]
  try:
    config = _read_config([*argv, *file])
  except InputError as e:
    return f"Give --config=FILE to see the fields of a config ({e})."
  return "\n".join([f"Fields of {typed_config([*argv, *file])}, with their values there:", *describe(config, SETTINGS)])


def typed_config(argv):
  typed = [a.split("=", 1)[1] for a in argv if re.match(r"--?config=.", a)]
  typed += [value for a, value in zip(argv, argv[1:]) if a in ("--config", "-config")]
  if not typed:
    raise InputError("no --config: give one, e.g. --config=configs/llama_badnet.py (--help lists the flags)")
  return typed[-1]


def _read_config(argv):
  """The config as its file makes it, before any --config.FIELD=VALUE; a file that makes none is an InputError."""
  file, colon, argument = typed_config(argv).partition(":")
  if not Path(file).is_file():
    near = difflib.get_close_matches(Path(file).stem, [path.stem for path in Path("configs").glob("*_*.py")], 2)
    raise InputError(f"config file {file!r} does not exist: "
                     + _meant([f"configs/{name}.py" for name in near], "give one of configs/*.py"))
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


def check_fields(argv, config):
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
      raise InputError(f"config has no field {field!r}: " + _meant(near, "configs/common.py lists the fields"))


def _meant(near, otherwise):
  return f"did you mean {' or '.join(near)}?" if near else otherwise


def fail(error, debug):
  cause = error
  while cause is not None:  # ml_collections wraps what the config file itself raised, traceback and all
    error, cause = cause if isinstance(cause, InputError) else error, cause.__context__
  if debug:
    traceback.print_exc()
  print("error: " + re.sub(r"\s*\n\s*", " ", str(error)).strip(), file=sys.stderr)
  sys.exit(2)
