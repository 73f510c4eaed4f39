"""Finds mistakes in a config, from the config alone or from the loaded models and their answers to clean rows.

The argument `run` is a run.Run. Its type is Any here, because run.py imports this file.
"""

import functools
import logging
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from w2s_jax import InputError, claims, quantized, results, sharding
from w2s_jax import config as config_lib
from w2s_jax.adapters import attach, p_tuning, trees
from w2s_jax.data import insertions, tokenization
from w2s_jax.defenses import DEFENSES, SETTINGS, distill
from w2s_jax.defenses import base as base_lib
from w2s_jax.measure import deployed, metrics, selftest
from w2s_jax.models import Model, config_from_arch, config_from_hf, load_pretrained, read_json, resolve
from w2s_jax.models.hf.formats import HEAD_CONFIG
from w2s_jax.models.padding import with_padding_token
from w2s_jax.tasks import TASKS
from w2s_jax.training import embedding_row

LOG = logging.getLogger(__name__)
TRAINING = ("warmup", "poison", "teach", "defend")   # sections of the config that say how a stage trains


def check_fields(config: ConfigDict) -> None:
  """Raises InputError if a field is out of range or contradicts another field."""
  if config.task not in TASKS:
    raise InputError(f"task {config.task!r}: want one of {', '.join(TASKS)}: set --config.task")
  for name in config.defenses:
    if name not in DEFENSES:
      raise InputError(f"defense {name!r}: want names among {', '.join(DEFENSES)}: set --config.defenses")
  for section, settings in SETTINGS.items():
    config_lib.check(settings, config.defense[section], f"defense.{section}")
  fields = claims.flat(config.to_dict())
  for path, (declared, values) in config_lib.sections(config).items():
    config_lib.check(declared, values, path)
  triggers = fields.get("probe.triggers", ())
  if (not all(isinstance(t, str) and t.strip() for t in triggers) or len(set(triggers)) < len(triggers)
      or any(re.fullmatch(r"[\[(].*|\S+(,\S+)+", t) for t in triggers)):  # a string that is meant as a list
    raise InputError(f"probe.triggers {tuple(triggers)}: want different strings, e.g. --config.probe.triggers=mn,cf")
  depths = fields.get("scan.depths", (0.0,))
  if not depths or not all(isinstance(depth, (int, float)) and 0 <= depth < 1 for depth in depths):
    raise InputError(f"scan.depths {tuple(depths)}: want fractions of the layers, at least 0 and below 1, e.g. "
                     "--config.scan.depths=0.0,0.5")
  if config.teacher.layers and not config.teacher.path:
    raise InputError(f"teacher.layers is {config.teacher.layers} without a teacher.path to cut: set "
                     "--config.teacher.arch.num_hidden_layers for a fresh teacher, or --config.teacher.path")
  _check_poisoned_teacher(fields)
  seeds = list(config.defend.seeds)
  if len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
    raise InputError(f"defend.seeds {tuple(seeds)}: want different integers of at least 0: set --config.defend.seeds")
  if config.lora.quantize:
    quantized.check(config.lora.quantize)
  trains = fields.get("poison.trains", trees.FULL)
  if not trains or set(trains) - set(trees.FULL):
    raise InputError(f"poison.trains {tuple(trains)}: want labels among {', '.join(trees.FULL)}: set "
                     "--config.poison.trains")
  longest = max(config.data.max_length, fields.get("data.attack_max_length", 0))
  if list(config.data.buckets) != sorted(config.data.buckets) or max(config.data.buckets, default=0) < longest:
    _check_student_positions(config.student, longest)    # first: longer buckets do not help a short student
    raise InputError(f"data.buckets {tuple(config.data.buckets)}: want ascending lengths, the last at least "
                     f"{longest} tokens: set --config.data.buckets or --config.data.max_length/.attack_max_length")


def _check_poisoned_teacher(fields):
  """Raises InputError if the config poisons the teacher, but has no attack or does not train the teacher."""
  rate = fields.get("teach.poison_rate", 0.0)
  if rate and "attack.name" not in fields:
    raise InputError(f"teach.poison_rate is {rate}, but this config has no attack: set --config.teach.poison_rate=0, "
                     "or take a config that poisons a student")
  if rate and not fields["teach.epochs"]:
    raise InputError(f"teach.poison_rate is {rate}, but the teacher does not train: set --config.teach.epochs to 1 or "
                     "more, or --config.teach.poison_rate=0")


def check_texts(config: ConfigDict, rows: list[dict]) -> None:
  """Raises InputError if one of the config's defenses cannot handle the text of one of the rows."""
  for defense in map(DEFENSES.get, config.defenses):
    if defense.check:
      defense.check(config.defense, [row["text"] for row in rows])


def check_student(run: Any, model: Model) -> None:
  """Raises InputError if the student cannot run, be adapted or be defended; called before anything trains.

  It checks the student's dtype, adapters and positions, the public base, and the loss terms of each recipe.
  """
  c = run.config
  if c.student.dtype == "float16" and jax.default_backend() == "cpu":
    raise InputError("student.dtype float16 does not run on a CPU: set --config.student.dtype=bfloat16 or float32")
  _check_adapters(run, model)
  recipes = {name: DEFENSES[name].recipe for name in c.defenses if DEFENSES[name].recipe}
  mixing = [name for name in c.defenses if DEFENSES[name].mixes_base]
  if needing := [name for name, recipe in recipes.items() if recipe.from_base] + mixing:
    _check_base(run, needing[0], model if mixing else None)
  for name, recipe in recipes.items():
    distill.check(name, recipe, run.task, model, c.defense, c.lora)
  _check_positions("student", model.config, run.max_length)


def _check_adapters(run, model):
  """Raises InputError if the model lacks modules or positions for the adapters, or its kernels cannot be quantized."""
  c, params = run.config, model.abstract_params()
  room = model.config.max_positions - c.data.max_length
  if c.lora.kind == p_tuning.KIND and c.lora.virtual_tokens > room:
    raise InputError(f"lora.virtual_tokens is {c.lora.virtual_tokens}, but texts of {c.data.max_length} tokens leave "
                     f"{room} of the model's positions: lower --config.lora.virtual_tokens or --config.data.max_length")
  jax.eval_shape(lambda params: attach.add_configured(params, c.lora, key=jax.random.key(0)), params)
  if c.lora.quantize:
    quantized_params = jax.eval_shape(functools.partial(quantized.quantize_layers, name=c.lora.quantize), params)
    sharding.param_shardings(quantized_params, model.shardings, run.mesh)


def _check_base(run, name, suspect):
  """Raises InputError if the `student.base` of a given suspect is unset, a teacher, the suspect itself or unusable.

  name: a defense that needs the base, for the message.
  suspect: the suspect's model if a defense mixes the base's weights into it, else None.
  """
  if run.source.base != run.source.attacked:
    return
  c, path = run.config.student, run.base_path()
  if not path:
    raise InputError(f"defense {name!r} needs a public model: set --config.student.base to the one that the "
                     "suspect was made from, or choose other defenses (--config.defenses)")
  if (path / HEAD_CONFIG).exists():
    raise InputError(f"{path} is a teacher ({HEAD_CONFIG}), not a public model: set --config.student.base to another "
                     "model")
  if run.inputs[claims.weights_of(c.path)] == run.inputs[claims.weights_of(c.base)]:
    raise InputError(f"the suspect {c.path} and its base {c.base} have the same weights: set --config.student.base to "
                     "another public model, or leave it out")
  base, _ = load_pretrained(path, run.config.data.num_labels, c.dtype, run.mesh, seed=run.config.seed)
  tokenizer = tokenization.load(path, base.config.vocab_size)
  if suspect:
    base_lib.check(suspect, tokenization.load(resolve(c.path, c.base), suspect.config.vocab_size), base, tokenizer)
  try:
    check_words(run, tokenizer, of_base=True)
    _check_adapters(run, with_padding_token(base, tokenizer))
    _check_positions("model", base.config, run.max_length)
    return
  except InputError as e:
    problem = str(e)                # raised below, outside `except`, because command.run prints the innermost error
  raise InputError(f"student.base {path}: {problem}; or leave --config.student.base out")


def check_words(run: Any, tokenizer: Any, of_base: bool = False) -> None:
  """Raises InputError if the run inserts words of this tokenizer's vocabulary, but hardly any of its tokens is a word.

  It also raises one if the attack edits the trigger's embedding and the trigger is not one token.

  of_base: True if the tokenizer is that of `student.base`, False if it is the suspect's. Only from_base defenses insert
    words of the base's tokenizer. A student that we poison shares its base's tokenizer, so one check with False covers
    both.
  """
  c, given = run.config, run.source.base == run.source.attacked
  recipes = [DEFENSES[name].recipe for name in c.defenses if DEFENSES[name].recipe and DEFENSES[name].recipe.rows]
  needs_words = any(recipe.from_base == of_base or not given for recipe in recipes)
  if "probe" in c and not of_base:
    needs_words = needs_words or c.probe.search or selftest.tested(c)
  if needs_words:
    insertions.vocabulary(tokenizer, c.probe.triggers if "probe" in c else ())
  if not given and run.attack.edits_embedding:
    embedding_row.token_of(tokenizer, run.attack.trigger)


def check_teacher(run: Any, feature_width: int) -> None:
  """Raises InputError for mistakes that only the teacher's shape or files show; called before anything trains.

  It loads a given teacher checkpoint, because a checkpoint that cannot be loaded would otherwise fail only after long
  stages.

  feature_width: width of the student's features, to which the teacher's head widens.
  """
  c = run.config
  if not c.teach.epochs and not (c.teacher.path and (resolve(c.teacher.path) / HEAD_CONFIG).exists()):
    raise InputError(f"teach.epochs is 0, but the teacher {c.teacher.path!r} has no W2S head: set "
                     f"--config.teacher.path to a directory with {HEAD_CONFIG}, or --config.teach.epochs to 1 or more")
  if c.teacher.path:
    model, _ = run.pretrained_teacher(feature_width)
    with_padding_token(model, tokenization.load(resolve(c.teacher.path), model.config.vocab_size))
  else:
    arch = c.teacher.arch.to_dict()
    model = Model(config_from_arch(arch, "--config.teacher.arch", feature_width=feature_width))
  _check_positions("teacher", model.config, c.data.max_length)


def _check_student_positions(student, length):
  if student.path:
    shape = config_from_hf(read_json(resolve(student.path, student.base) / "config.json"))
  elif "arch" in student:
    shape = config_from_arch(student.arch.to_dict(), "--config.student.arch")
  else:
    return
  _check_positions("student", shape, length)


def _check_positions(name, shape, length):
  if shape.max_positions < length:
    raise InputError(f"the {name} has {shape.max_positions} positions, texts have up to {length} tokens: lower "
                     "--config.data.max_length/.attack_max_length")


def refuse_weak_teacher(run: Any) -> None:
  """Raises InputError if the teacher is clearly worse than the attacked model on the dev rows.

  Such a teacher would teach its mistakes. It is clearly worse if the upper end of its accuracy's 95% interval is more
  than `teach.largest_gap` below the attacked model's accuracy. So a small dev set rarely stops a run by chance.

  The function logs a warning if the attacked model is clearly below chance.
  """
  rows = run.rows["dev"]
  def count_correct(name):
    answers = deployed.answers(run, deployed.Deployed(*run.load(name)), rows)
    return int(run.task.is_correct(answers, {"label": run.labels("dev")}).sum())
  teacher, student = count_correct(results.TEACHER), count_correct(run.source.attacked)
  if metrics.wilson(student, len(rows))[1] < 1 / run.config.data.num_labels:
    LOG.warning(f"models/{run.source.attacked} answers {student} of {len(rows)} dev rows rightly, fewer than chance. "
                "If its classes have another order than the data's labels, set --config.data.class_names")
  if metrics.wilson(teacher, len(rows))[1] < student / len(rows) - run.config.teach.largest_gap:
    raise InputError(
        f"the teacher answers {teacher} of {len(rows)} dev rows rightly, the model that it is to teach {student}. "
        "Give another --workdir, and train the teacher longer or at another rate (--config.teach.epochs, "
        ".learning_rate), give a better one (--config.teacher.path=DIR), or go on all the same "
        "(--config.teach.largest_gap=1)")
