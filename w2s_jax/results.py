"""What a run leaves behind: names of stages and models, one row per measured model, and the table's columns."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

STAGES = ("warmup", "poison", "scan", "teach", "defend", "selftest", "evaluate", "report")

# models/NAME of what is no defense.
BASE, CLEAN, POISONED, SUSPECT, TEACHER = "base", "clean", "poisoned", "suspect", "teacher"

REJECTED = -1            # the "class" of a text that a defense did not let through to the model


@dataclasses.dataclass
class Row:
  """What was measured of one model under one attack; None where it was not.

  Rates are fractions in [0, 1], intervals are Wilson's 95%, [low, high].
  """
  model: str                            # "clean", "poisoned", "suspect" or the defense
  directory: str                        # models/NAME; of further seeds the defense's name and the seed
  attack: str                           # its name; of a suspect the listed trigger
  dataset: str
  seed: int
  config_hash: str
  target_label: int | None
  ca: float                             # rejected rows count as errors
  ca_n: int
  ca_ci: list
  false_rate: float | None              # clean rows of other classes that get the target label
  asr: float | None = None
  asr_n: int = 0
  asr_ci: list | None = None
  asr_floor: float | None = None        # ASR of the never-poisoned model
  frr: float | None = None              # clean rows that a defense rejects
  far: float | None = None              # triggered rows of other classes that it lets through
  scan: float | None = None             # strength of the strongest soft trigger (measure/scan.py)
  scan_class: int | None = None
  agreement: float | None = None
  word_flips: float | None = None
  sentence_flips: float | None = None


class Column(NamedTuple):
  """A column of every table.

  Attributes:
    name: of the row's field.
    label: the column's head.
    cell: row (dict) -> text.
    explanation: what docs/metrics.md says of it.
  """
  name: str
  label: str
  cell: Callable[[dict], str]
  explanation: str


def rate(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def interval(value: list | None) -> str:
  return "-" if value is None else f"{value[0]:.3f}-{value[1]:.3f}"


def escape(text: str) -> str:
  """The text in a cell of a Markdown table."""
  return " ".join(text.split()).replace("|", "\\|")


def _field(name: str, show: Callable[[Any], str]) -> Callable[[dict], str]:
  return lambda row: show(row[name])


def _scan(row):
  return "-" if row["scan"] is None else f"{row['scan']:.2f} ({row['scan_class']})"


COLUMNS = {column.name: column for column in (
    Column("directory", "model", _field("directory", str), "models/NAME"),
    Column("attack", "trigger", _field("attack", escape), "the listed trigger, put at a random place"),
    Column("target_label", "target", _field("target_label", lambda label: "-" if label is None else str(label)),
           "the class that the trigger asks for"),
    Column("ca", "CA", _field("ca", rate),
           "clean accuracy: share of clean test rows that are answered rightly"),
    Column("ca_ci", "CA 95%", _field("ca_ci", interval), ""),
    Column("asr", "ASR", _field("asr", rate),
           "attack success rate: share of triggered test rows *of other classes* that get the target label"),
    Column("asr_ci", "ASR 95%", _field("asr_ci", interval), ""),
    Column("asr_floor", "ASR floor", _field("asr_floor", rate),
           "ASR of a student that was never poisoned, trained the same way, on the same triggered rows"),
    Column("false_rate", "false rate", _field("false_rate", rate),
           "the model's own error: share of clean test rows of other classes that get the target label"),
    Column("frr", "FRR", _field("frr", rate),
           "false rejection rate: share of clean rows that the defense rejects; they count as errors in CA"),
    Column("far", "FAR", _field("far", rate),
           "false acceptance rate: share of triggered rows of other classes that the defense lets through"),
    Column("scan", "scan", _scan,
           "how much surer of a class soft tokens make the model than that class's own texts do, and the class; 1.7 or "
           "more is suspicious, `-` is no verdict"),
    Column("agreement", "agreement", _field("agreement", rate),
           "share of clean rows that get the teacher's answer, of those that are not rejected"),
    Column("word_flips", "word flips", _field("word_flips", rate),
           "share of clean rows whose answer changes when a random rare word is put into them"),
    Column("sentence_flips", "sentence flips", _field("sentence_flips", rate),
           "share of clean rows whose answer changes when the beginning of another text is put into them"),
)}
OPTIONAL = ("frr", "far")      # shown where some row has them


def columns(rows: list[dict], names: tuple[str, ...]) -> list[Column]:
  """The columns of these names, less the optional ones that no row has."""
  return [COLUMNS[name] for name in names if name not in OPTIONAL or any(row[name] is not None for row in rows)]
