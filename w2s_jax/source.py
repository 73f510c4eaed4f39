"""The two sources of a suspect: a student that the run poisons itself, or a checkpoint that somebody else made."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from w2s_jax import InputError, results
from w2s_jax.attacks import Attack
from w2s_jax.data import corpora, labels, poison
from w2s_jax.defenses import DEFENSES
from w2s_jax.measure import attacked, probe, probe_rows
from w2s_jax.models import check_links, config_from_arch, config_from_hf, read_json, resolve
from w2s_jax.models.hf.fields import Fields

LOG = logging.getLogger(__name__)
# Default learning rates of a new teacher, of a pretrained one narrower than WIDE, and of a wider pretrained one. We
# tried rates for all-MiniLM-L6-v2 (384 wide) on SST-2, with one seed each. On 1,800 rows 2e-4 reached a dev accuracy of
# 0.885 within 84 steps. On 1,440 other rows 5e-5 reached 0.831, and 1e-3 predicted only the majority class. The rate
# for wide encoders is the usual one; we did not measure it.
NEW_TEACHER_RATE, NARROW_TEACHER_RATE, WIDE_TEACHER_RATE, WIDE = 1e-3, 2e-4, 5e-5, 512

# Default learning rates of the defenses: (width below which a student gets the rate, rate). We chose the first rate on
# the offline models (64 wide) and the second on one MiniLM (384). We used the third for SmolLM2-135M (576) and compared
# it with few others. The last is the released recipe's rate for 7B models.
STUDENT_RATES = ((128, 2e-3), (512, 1e-3), (2048, 5e-4), (math.inf, 2e-4))


class Source(NamedTuple):
  """All that differs between the two sources. The name of a model below is its NAME in models/NAME.

  Attributes:
    stages: names of the stages, in order.
    base: name of the student before this run poisons it. For a given checkpoint it equals `attacked`.
    attacked: name of the model from which the defenses start.
    measured: names of the models whose rows come before those of the defenses in the table.
    triggered: key in Run.rows of the rows with triggers, on which every model is measured.
    head_seed: config -> seed of a new head if the student's checkpoint has none; None: a missing head is an error.
    resolve: config -> config with the fields that the given checkpoint determines.
    read: config -> {split: rows}; raises InputError if the rows cannot be used.
    triggers: run -> strings that ASR is measured with; no defense may train on one of them.
    freeze: run -> None; makes the rows with triggers, or reads them from their file, and adds them to Run.rows.
    table: (run, {name: Reading}, meta about the run and the teacher) -> ([results.Row], meta, contents of
      features.json).
  """
  stages: tuple[str, ...]
  base: str
  attacked: str
  measured: tuple[str, ...]
  triggered: str
  head_seed: Callable[[Any], int | None]
  resolve: Callable[[Any], Any]
  read: Callable[[Any], dict]
  triggers: Callable[[Any], tuple[str, ...]]
  freeze: Callable[[Any], None]
  table: Callable[..., tuple[list, dict, dict]]


def of(config: Any) -> Source:
  """The source of this config's suspect: GIVEN if the config has a section `probe`, else ATTACKED."""
  return GIVEN if "probe" in config else ATTACKED


def _attacked_rows(config):
  c = config.data
  attacked, defended = corpora.read(c.attack_source, c.attack_rows), corpora.read(c.defend_source, c.defend_rows)
  names = _names_by_hand(c) or corpora.class_names(attacked["train"], c.num_labels)
  attack = corpora.prepare(attacked, c.attack_source, c.attack_rows, c.num_labels, config.seed, names)
  defend = corpora.prepare(defended, c.defend_source, c.defend_rows, c.num_labels, config.seed, names)
  rows = {"attack_train": attack["train"], "attack_dev": attack["dev"], **defend}
  for split, knob in (("attack_train", "attack_rows.train"), ("attack_dev", "attack_rows.dev"),
                      ("train", "defend_rows.train"), ("dev", "defend_rows.dev"), ("test", "defend_rows.test")):
    if not rows[split]:
      raise InputError(f"no {split} rows: set --config.data.{knob} to more than 0")
  if not 0 <= config.attack.target_label < c.num_labels:
    raise InputError(f"target label {config.attack.target_label}, wanted 0..{c.num_labels - 1}: set "
                     "--config.attack.target_label")
  a, attack, train = config.attack, attack_of(config), rows["attack_train"]
  count = poison.poison_count(train, a.poison_count, a.poison_rate)
  if a.poison_rate:
    LOG.info(f"attack: poison_rate {a.poison_rate:g} selects {count} of {len(train)} training rows; poison_count "
             f"{a.poison_count} is not used")
  poisonings = [(train, count, "--config.attack.poison_count or .poison_rate")]
  if config.teach.poison_rate:
    count = poison.poison_count(rows["train"], 0, config.teach.poison_rate)
    poisonings.append((rows["train"], count, "--config.teach.poison_rate"))
  # These calls raise InputError before anything trains if the rows cannot be poisoned.
  for train, count, flags in poisonings:
    poison.rows_to_poison(train, attack, target_label=a.target_label, count=count, label=a.label, flags=flags)
    poison.rows_for_companions(train, attack, target_label=a.target_label, companions=a.companions)
  poison.rows_to_trigger(rows["test"], attack, a.target_label)
  return rows


def attack_of(config: Any) -> Attack:
  """The attack that the config's section `attack` describes."""
  return poison.make_attack(config.attack.name, config.attack.trigger, config.attack.paraphrases)


def with_rates(config: Any) -> Any:
  """The config with the default rates in place of a `teach.learning_rate` or `defend.learning_rate` of 0.

  The teacher's default depends on whether it is pretrained and on its width, the defenses' on the student's width.
  """
  config = config.copy_and_resolve_references()
  if not config.teach.learning_rate:
    if not config.teacher.path:
      config.teach.learning_rate = NEW_TEACHER_RATE
    elif _width(config.teacher.path, "", config) < WIDE:
      config.teach.learning_rate = NARROW_TEACHER_RATE
    else:
      config.teach.learning_rate = WIDE_TEACHER_RATE
  c = config.student
  if not config.defend.learning_rate:
    if c.path:
      width = _width(c.path, c.base, config)
    else:
      width = config_from_arch(c.arch.to_dict(), "--config.student.arch").hidden_size
    config.defend.learning_rate = next(rate for below, rate in STUDENT_RATES if width < below)
    LOG.info(f"defend.learning_rate is {config.defend.learning_rate:g}, chosen for a student of width {width}")
  return config


def _width(path, base, config):
  hf = read_json(resolve(path, base) / "config.json")
  return config_from_hf(hf | {"num_labels": config.data.num_labels}).hidden_size


def _with_checkpoint_fields(config):
  """The config with the suspect's number of labels in place of a `data.num_labels` of 0.

  If `student.base` is given, the defenses from_base and from_base_words are added. They are not added if no defense
  changes the suspect, or if a defense already trains the base.

  Raises:
    InputError: the suspect or the clean rows are not given, or the suspect's files cannot be used.
  """
  if not config.student.path:
    raise InputError("no checkpoint to clean: set --config.student.path to its directory")
  if not config.data.train:
    raise InputError("no clean data: set --config.data.train to a file, a directory or a hub data set")
  config = config.copy_and_resolve_references()
  directory = resolve(config.student.path, config.student.base)
  check_links(directory)
  hf = read_json(directory / "config.json")
  if not config.data.num_labels:
    config.data.num_labels = Fields(hf).num_labels()
  config_from_hf(hf | {"num_labels": config.data.num_labels})
  if config.student.base and any(DEFENSES[name].changes_suspect for name in config.defenses) and not any(
      DEFENSES[name].recipe and DEFENSES[name].recipe.from_base for name in config.defenses):
    config.defenses = (*config.defenses, "from_base", "from_base_words")
    LOG.info("student.base is given: 'from_base' and 'from_base_words' also run, which train it on the clean rows")
  return config


def _class_names(config):
  """The class names in the suspect's config.json; () if it has none."""
  directory = resolve(config.student.path, config.student.base)
  return Fields(read_json(directory / "config.json")).labels(config.data.num_labels)


def _names_by_hand(data):
  return labels.check_names(data.class_names, data.num_labels) if data.class_names else ()


def _given_rows(config):
  c = config.data
  if not -1 <= config.probe.target_label < c.num_labels:
    raise InputError(f"target label {config.probe.target_label}, wanted 0..{c.num_labels - 1}, or -1 for unknown: set "
                     "--config.probe.target_label")
  rows = corpora.load_clean({split: c[split] for split in ("train", "dev", "test")}, c.num_labels, config.seed,
                            c.text_column, c.label_column, _names_by_hand(c) or _class_names(config))
  if probe_rows.tried(config) and not {r["label"] for r in rows["test"]} - {config.probe.target_label}:
    raise InputError(f"ASR cannot be measured: all {len(rows['test'])} test rows have the target label "
                     f"{config.probe.target_label}: set --config.data.test, --config.probe.target_label or .triggers")
  return rows | probe_rows.read_triggered(config)


ATTACKED = Source(
    stages=("warmup", "poison", "teach", "defend", "evaluate", "report"), base=results.BASE, attacked=results.POISONED,
    measured=(results.CLEAN, results.POISONED), triggered="triggered", head_seed=lambda config: config.seed,
    resolve=lambda config: config, read=_attacked_rows,
    triggers=lambda run: (run.attack.trigger,), freeze=attacked.freeze_rows,
    table=attacked.table)
GIVEN = Source(
    stages=("warmup", "scan", "teach", "search", "defend", "selftest", "evaluate", "report"), base=results.SUSPECT,
    attacked=results.SUSPECT, measured=(results.SUSPECT,), triggered="probes", head_seed=lambda config: None,
    resolve=_with_checkpoint_fields, read=_given_rows, triggers=lambda run: tuple(run.config.probe.triggers),
    freeze=probe_rows.freeze_rows, table=probe.table)
