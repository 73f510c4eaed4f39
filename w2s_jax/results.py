"""Names of stages and models, the record of a row in results.json, and the columns of the tables."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

STAGES = ("warmup", "poison", "scan", "teach", "search", "defend", "selftest", "evaluate", "report")

# NAME in models/NAME for the models that no defense makes.
BASE, CLEAN, POISONED, SUSPECT, TEACHER, REFERENCE = "base", "clean", "poisoned", "suspect", "teacher", "reference"

CONTROL = "lora_ce"      # the defense with which every other defense is compared
REJECTED = -1            # predicted class of a text that a defense rejects


def is_from_base(name: str) -> bool:
  """Whether a model has no weight of the suspect. `name` is its defense or its NAME in models/NAME."""
  return name.startswith("from_base")


@dataclasses.dataclass
class Row:
  """Measurements of one model under one attack; None: not measured. COLUMNS explains the rates.

  Rates are fractions in [0, 1]. Intervals are Wilson's 95% intervals, [low, high].
  """
  model: str                            # "clean", "poisoned", "suspect" or the defense
  directory: str                        # NAME in models/NAME: DEFENSE for its first seed, DEFENSE-seedSEED for others
  attack: str                           # the attack's name; for a given checkpoint, the listed trigger or file
  dataset: str                          # source of the defended domain; for a given checkpoint, of its clean rows
  seed: int
  config_hash: str
  target_label: int | None
  ca: float                             # clean accuracy; rejected rows count as errors
  ca_n: int                             # number of rows
  ca_ci: list
  false_rate: float | None              # fraction of clean rows of other classes that get the target label
  asr: float | None = None
  asr_n: int = 0                        # number of rows
  asr_ci: list | None = None
  asr_floor: float | None = None        # ASR of the never-poisoned model
  nearer_target: float | None = None    # fraction of triggered rows of other classes whose features are nearer to the
                                        # mean of the target class's clean rows than to that of their own class
  frr: float | None = None              # fraction of clean rows that the defense rejects
  far: float | None = None              # fraction of triggered rows of other classes that the defense accepts
  scan: float | None = None             # strength of the strongest soft trigger (measure/scan.py)
  scan_class: int | None = None         # class of that soft trigger
  agreement: float | None = None
  found: float | None = None            # fraction of rows of other classes that the search's string turns to its class
  word_flips: float | None = None
  sentence_flips: float | None = None


class Column(NamedTuple):
  """A column of every table.

  Attributes:
    name: field of Row that the column shows.
    label: the column's header.
    cell: row (dict) -> text of the cell.
    explanation: description of the column, as in docs/metrics.md; "": the interval of the column before it.
  """
  name: str
  label: str
  cell: Callable[[dict], str]
  explanation: str


def rate(value: float | None) -> str:
  """The rate with three decimals; "-" if it was not measured."""
  return "-" if value is None else f"{value:.3f}"


def interval(value: list | None) -> str:
  """The interval as "low-high", with three decimals; "-" if it was not measured."""
  return "-" if value is None else f"{value[0]:.3f}-{value[1]:.3f}"


def escape(text: str) -> str:
  """The text on one line, escaped for a cell of a Markdown table."""
  return " ".join(text.split()).replace("|", "\\|")


def _field(name: str, show: Callable[[Any], str]) -> Callable[[dict], str]:
  return lambda row: show(row[name])


def _scan(row):
  return "-" if row["scan"] is None else f"{row['scan']:.2f} ({row['scan_class']})"


COLUMNS = {column.name: column for column in (
    Column("directory", "model", _field("directory", str), "models/NAME"),
    Column("attack", "trigger", _field("attack", escape), "the listed trigger, inserted at a random place"),
    Column("target_label", "target", _field("target_label", lambda label: "-" if label is None else str(label)),
           "the class that the trigger asks for"),
    Column("ca", "CA", _field("ca", rate),
           "clean accuracy: share of clean test rows that the model answers correctly"),
    Column("ca_ci", "CA 95%", _field("ca_ci", interval), ""),
    Column("asr", "ASR", _field("asr", rate),
           "attack success rate: share of triggered test rows *of other classes* that get the target label"),
    Column("asr_ci", "ASR 95%", _field("asr_ci", interval), ""),
    Column("asr_floor", "ASR floor", _field("asr_floor", rate),
           "ASR, on the same triggered rows, of a student that was trained the same way but never poisoned"),
    Column("false_rate", "false rate", _field("false_rate", rate),
           "the model's own error: share of clean test rows of other classes that get the target label"),
    Column("frr", "FRR", _field("frr", rate),
           "false rejection rate: share of clean rows that the defense rejects; they count as errors in CA"),
    Column("far", "FAR", _field("far", rate),
           "false acceptance rate: share of triggered rows of other classes that the defense lets through"),
    Column("scan", "scan", _scan,
           "strength of the strongest soft trigger, and its class: log-odds of the class on other texts with the soft "
           "tokens, divided by log-odds on the class's own texts; 1.7 or more is suspicious, `-` means no verdict"),
    Column("agreement", "agreement", _field("agreement", rate),
           "share of clean rows on which the model agrees with the teacher; rejected rows are left out"),
    Column("found", "found", _field("found", rate),
           "share of clean rows of other classes that get the class of the search's string when the string is "
           "inserted"),
    Column("word_flips", "word flips", _field("word_flips", rate),
           "share of clean rows whose answer changes when a random rare word is inserted"),
    Column("sentence_flips", "sentence flips", _field("sentence_flips", rate),
           "share of clean rows whose answer changes when the beginning of another text is inserted"),
)}
OPTIONAL = ("frr", "far")      # columns that a table has only if one of its rows has a value


def columns(rows: list[dict], names: tuple[str, ...]) -> list[Column]:
  """The columns with these names, except the optional columns for which no row has a value."""
  return [COLUMNS[name] for name in names if name not in OPTIONAL or any(row[name] is not None for row in rows)]
