"""The command line of main and plan: reads --config and its fields, and reports a user's mistake in one line."""

import ast
import dataclasses
import difflib
import errno
import functools
import os
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from w2s_jax import InputError
from w2s_jax import config as config_lib

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, as FILE or FILE:ARGUMENT (configs/*.py).")
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a user error.")


def run(main: Callable[[list[str]], int | None], doc: str, spell: Callable[[str], str] = str) -> NoReturn:
  """Runs `main` and exits with the code that it returns.

  After a user's mistake, a value that is not finite or a full disk it prints one line and exits with code 2. After
  Ctrl-C it exits with code 130.

  Args:
    main: gets what remains of sys.argv without the flags.
    doc: first lines of --help.
    spell: rewrites an error message before it is printed. The console command uses it to replace names of flags.
  """
  escape_unprintable()
  try:
    app.run(main, flags_parser=functools.partial(parse, doc=doc))
  except (InputError, flags.Error, FloatingPointError) as e:
    _show(e, spell)
    sys.exit(2)
  except KeyboardInterrupt:                         # Ctrl-C, perhaps while JAX is imported, which takes seconds
    print("\ninterrupted: run the same command again to continue from the last checkpoint", file=sys.stderr)
    sys.exit(130)
  except Exception as e:
    if not (reason := _no_room(e)):
      raise
    _show(InputError(f"cannot write any more ({reason}): make room, then run the same command again to continue from "
                     "the last checkpoint"), spell)
    os._exit(2)                    # at a normal exit the checkpoint threads, which cannot write, print tracebacks


def _no_room(error):
  """The system's message if a full disk, quota, file-size limit or read-only file system caused the error, else None.

  It compares texts, because safetensors and Orbax raise these errors without an errno.
  """
  texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)]
  while error is not None:
    if reason := next((text for text in texts if text in str(error)), None):
      return reason
    error = error.__cause__ or error.__context__
  return None


def escape_unprintable() -> None:
  """Makes stdout print a character that its encoding lacks as an escape like \\u2192. By default it raises an error."""
  sys.stdout.reconfigure(errors="backslashreplace")


def print_text(text: str) -> None:
  """Prints the text. If the reader has closed the pipe, as `head` does, it exits with code 1 and without a message."""
  escape_unprintable()                              # `compare` does not come through `run`
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python flushes stdout once more at its exit
    sys.exit(1)


def parse(argv: list[str], doc: str) -> list[str]:
  """Parses absl's flags and returns argv without them. --help prints `doc`, the flags and the fields, and exits.

  Raises:
    InputError, flags.Error: a mistake in the flags or in the config file.
  """
  if {"--help", "-help", "-h"} & set(argv):
    print_text(f"{doc}{FLAGS.main_module_help()}\n{FLAGS.module_help(__name__)}\n{_help_of_fields(argv)}")
    sys.exit(0)
  config = _read_config(argv)
  check_fields(argv, config)
  rest = FLAGS(with_lists(argv, config))
  if len(rest) > 1:
    raise InputError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
  return rest


def _help_of_fields(argv):
  """Describes every field of the config that --config names, or of configs/llama_badnet.py without --config."""
  has_config = any(re.match(r"--?config(=|$)", arg) for arg in argv)
  try:
    return fields(argv if has_config else [*argv, "--config=configs/llama_badnet.py"])
  except InputError as e:
    return f"Give --config=FILE to see the fields of a config ({e})."


def fields(argv: list[str]) -> str:
  """Describes every field of the config that --config names (see `describe`).

  Raises:
    InputError: --config is missing, or its file does not make a config.
  """
  from w2s_jax.defenses import SETTINGS  # late: it takes a second, and only --help and `fields` need it
  config = _read_config(argv)
  return "\n".join([f"Fields of {typed_config(argv)} and their values:", *describe(config, SETTINGS)])


def describe(config: ConfigDict, settings: Mapping[str, type], width: int = 100) -> Iterator[str]:
  """Yields the lines of --help for every field: its value, type, range, unit, description and source.

  Args:
    settings: {section of config.defense: declaration}.
    width: length of a line, in columns.
  """
  of_defenses = {f"defense.{name}": (cls, config.defense[name]) for name, cls in settings.items()}
  for path, (cls, values) in (config_lib.sections(config) | of_defenses).items():
    yield ""
    yield from textwrap.wrap(f"{path or 'config'}: {' '.join((cls.__doc__ or '').split())}", width)
    for f in dataclasses.fields(cls):
      knob = ".".join(filter(None, ("--config", path, f.name)))
      yield from _entry(f"{knob}={values[f.name]!r}  ({_kind(f)})", _meaning(f), width)
    if "arch" in values:
      shape = ", ".join(f"{name}={value!r}" for name, value in values.arch.items())
      yield from _entry(f"--config.{path}.arch.NAME=VALUE", "shape of the new network if `path` is empty, with "
                        f"transformers' names: {shape}", width)


def _entry(head, text, width):
  """The wrapped lines of one field: `head`, then `text`, indented further."""
  for line, indent in ((head, "  "), (text, "      ")):
    yield from textwrap.wrap(line, width, initial_indent=indent, subsequent_indent="      ", break_long_words=False,
                             break_on_hyphens=False)


def _kind(declared):
  """The type, range and unit of a declared field."""
  low, high, among, unit = (declared.metadata[key] for key in ("low", "high", "among", "unit"))
  words = [getattr(declared.type, "__name__", declared.type)]
  if among:
    words.append(f"one of {config_lib.options(among)}")
  if low is not None and high is not None:
    words.append(f"{low:g} to {high:g}")
  elif low is not None:
    words.append(f"{low:g} or more")
  elif high is not None:
    words.append(f"{high:g} or less")
  return ", ".join([*words, unit] if unit else words)


def _meaning(declared):
  """The description of a declared field, and the source of its default."""
  doc, source = declared.metadata["doc"], declared.metadata["source"]
  return f"{doc}. Source: {source}." if source else f"{doc}."


def typed_config(argv: list[str]) -> str:
  """The value of --config, FILE or FILE:ARGUMENT, as the user typed it; InputError without --config."""
  typed = [a.split("=", 1)[1] for a in argv if re.match(r"--?config=.", a)]
  typed += [value for a, value in zip(argv, argv[1:]) if a in ("--config", "-config")]
  if not typed:
    raise InputError("no --config: give one, e.g. --config=configs/llama_badnet.py (--help lists the flags)")
  return typed[-1]


def _read_config(argv):
  """The config that the file returns, before any --config.FIELD=VALUE; InputError if the file returns no config."""
  file, colon, argument = typed_config(argv).partition(":")
  if not Path(file).is_file():
    similar = difflib.get_close_matches(Path(file).stem, [path.stem for path in Path("configs").glob("*_*.py")], 2)
    raise InputError(f"config file {file!r} does not exist: "
                     + _meant([f"configs/{name}.py" for name in similar], "give one of configs/*.py"))
  try:
    config = runpy.run_path(file)["get_config"](*[argument] * bool(colon))
  except InputError:
    raise
  except Exception as e:  # a user's config file can raise anything
    raise InputError(f"config file {file!r} does not make a config ({type(e).__name__}: {e}): want a Python file that "
                     "defines get_config(arg=None), like configs/*.py") from e
  if not isinstance(config, ConfigDict):
    raise InputError(f"config file {file!r}: get_config returns a value of type {type(config).__name__}, wanted an "
                     "ml_collections ConfigDict")
  return config


def check_fields(argv: list[str], config: ConfigDict) -> None:
  """Raises InputError if the config lacks the field of a --config.FIELD=VALUE; the message names similar fields."""
  def flat(tree, prefix=""):
    for name, value in tree.items():
      yield prefix + name
      if isinstance(value, ConfigDict):
        yield from flat(value, f"{prefix}{name}.")
  fields = list(flat(config))
  for field in (m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a))):
    if field not in fields:
      similar = difflib.get_close_matches(field, fields, 3)
      raise InputError(f"config has no field {field!r}: " + _meant(similar, "--help lists the fields"))


def with_lists(argv: list[str], config: ConfigDict) -> list[str]:
  """argv with lists in the form that ml_collections reads: A,B becomes ('A', 'B').

  If a flag with a list is repeated, only the last one is kept.

  Raises:
    InputError: a list cannot be parsed, or it has words where the config has numbers.
  """
  out, seen = [], set()
  for arg in reversed(argv):
    match = re.fullmatch(r"--?config\.([\w.]+)=(.*)", arg, re.DOTALL)
    default = functools.reduce(lambda section, name: section[name], match[1].split("."), config) if match else None
    if isinstance(default, tuple):
      if match[1] in seen:
        continue
      seen.add(match[1])
      arg = f"--config.{match[1]}={_list(*match.groups(), default)!r}"
    out.append(arg)
  return out[::-1]


def _list(field, text, default):
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    if text.lstrip()[:1] in tuple("([{\"'"):
      raise InputError(f"--config.{field}={text}: this is not a list: write A,B or \"('A','B')\", with the quotes"
                       ) from None
    value = tuple(text.split(",")) if " " not in text else (text,)        # commas in a sentence separate nothing
  value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
  if default and not isinstance(default[0], str) and not all(isinstance(item, (int, float)) for item in value):
    raise InputError(f"--config.{field}={text}: want numbers, e.g. {','.join(map(str, default))}")
  return value


def _meant(similar, otherwise):
  return f"did you mean {' or '.join(similar)}?" if similar else otherwise


def _show(error, spell):
  cause, debug = error, DEBUG.value if FLAGS.is_parsed() else "--debug" in sys.argv
  while cause is not None:  # ml_collections wraps the config file's own error and puts its traceback into the message
    error, cause = cause if isinstance(cause, InputError) else error, cause.__context__
  if debug:
    traceback.print_exc()
  print("error: " + spell(re.sub(r"\s*\n\s*", " ", str(error)).strip()), file=sys.stderr, flush=True)
