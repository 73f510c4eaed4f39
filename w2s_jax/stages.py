"""The stages of a run, from poisoning to the report. A stage whose output exists does not run again."""

import dataclasses
import functools
import json
import logging
import time
from pathlib import Path

import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from w2s_jax import InputError, checks, lora, processes, results, sharding
from w2s_jax import source as source_lib
from w2s_jax.adapters import attach, trees
from w2s_jax.data import tokenization
from w2s_jax.defenses import DEFENSES, distill
from w2s_jax.measure import deployed, features, reference, scan, search, selftest
from w2s_jax.models import Model, config_from_arch, load_pretrained, resolve, save_pretrained
from w2s_jax.models.hf import adapter_file
from w2s_jax.models.padding import with_padding_token
from w2s_jax.report import card, front, page
from w2s_jax.run import Run, start
from w2s_jax.training import embedding_row, stage, steps

LOG = logging.getLogger(__name__)


def warmup(run: Run) -> None:
  """Makes the student before any attack: a given checkpoint, or a new network after a short language-model warm-up.

  The warm-up takes the place of pretraining. It is next-token prediction on the training texts of both domains.
  """
  c, base = run.config, run.source.base
  if run.done(base):
    if not (run.workdir / "config.json").exists():               # the model was copied from another workdir
      model, _, tokenizer = run.load(base)
      _check(run, model, tokenizer)
    run.claim()
    return
  model, params, tokenizer = _given_student(run) if c.student.path else _fresh_student(run)
  model = with_padding_token(model, tokenizer)
  _check(run, model, tokenizer)
  run.claim()
  if not c.student.path:
    params = model.init(stage.stream_key(c.seed, "student"), run.mesh)
    if c.warmup.epochs:
      arrays = tokenization.full_rows(tokenizer, _warmup_texts(run), c.data.attack_max_length)
      plan = steps.StagePlan(("warmup",), (c.seed,), model, steps.language_model_loss(model), {"lm": 1.0}, trees.FULL,
                             c.warmup, "warmup", packed=False)
      params, = stage.train_stage(plan, [params], [arrays], None, run.place)
  save_pretrained(run.model_dir(base), model, params, tokenizer, card=card.unmeasured(base))


def _check(run, model, tokenizer):
  checks.check_student(run, model)
  checks.check_teacher(run, model.config.feature_size)
  checks.check_words(run, tokenizer)


def _given_student(run):
  c = run.config.student
  directory = resolve(c.path, c.base)
  model, params = load_pretrained(directory, run.config.data.num_labels, c.dtype, run.mesh,
                                  seed=run.source.head_seed(run.config), remat=c.remat)
  if attach.has_virtual_tokens(params):
    raise InputError(f"{c.path} has virtual tokens (p_tuning), which neither the scan nor the self-test can read: set "
                     "--config.student.path to another checkpoint")
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    if not jnp.isfinite(leaf).all():
      raise InputError(f"{c.path}: {path} has values that are not finite: set --config.student.path to another "
                       "checkpoint")
  return model, params, tokenization.load(directory, model.config.vocab_size)


def _fresh_student(run):
  c = run.config.student
  arch = c.arch.to_dict() | {"num_labels": run.config.data.num_labels}
  model = Model(config_from_arch(arch, "--config.student.arch", dtype=c.dtype, remat=c.remat))
  return model, None, tokenization.train(_warmup_texts(run), "decoder", c.arch.vocab_size)


def _warmup_texts(run):
  return [r["text"] for r in run.rows["attack_train"] + run.rows["train"]]


def scan_suspect(run: Run) -> str:
  """The scan's verdict on the checkpoint before it is cleaned: "suspicious", "no sign" or "no verdict"."""
  suspect = run.source.base
  if run.model_dir(suspect).exists():       # warmup would log that it exists, even if it has just been made
    run.claim()
  else:
    warmup(run)
  findings = scan.reading(run, suspect)
  LOG.info(scan.skipped(run, suspect, run.model_config(suspect).hidden_size) or scan.verdict(suspect, findings))
  return scan.outcome(findings)


def make_poison(run: Run) -> None:
  """Fine-tunes the student twice on rows of the attacked domain: on clean rows (the control) and on poisoned rows.

  It trains in full or through LoRA. An attack that edits an embedding makes the poisoned student from the clean one
  instead.
  """
  c = run.config
  run.source.freeze(run)
  for name, rows in ((results.CLEAN, run.rows["attack_train"]), (results.POISONED, run.rows["poisoned_train"])):
    if run.done(name):
      continue
    if name == results.POISONED and run.attack.edits_embedding:
      _edit_embedding(run)
      continue
    model, params, tokenizer = run.load(results.BASE, remat=c.student.remat)
    arrays, dev = (run.encode(tokenizer, r, c.data.attack_max_length) for r in (rows, run.rows["attack_dev"]))
    trains = tuple(c.poison.trains)
    if c.poison.lora:
      trains, places = trees.LORA, functools.partial(sharding.param_shardings, rules=model.shardings, mesh=run.mesh)
      params = lora.add_lora(params, c.poison.lora, c.poison.lora, ("all-linear",),
                             key=stage.stream_key(c.seed, "poison lora"), places=places)
    plan = stage.task_plan(run.task, "poison" if name == results.POISONED else name, c.seed, model, trains, c.poison,
                           stream="poison")
    params, = stage.train_stage(plan, [params], [arrays], dev, run.place)
    save_pretrained(run.model_dir(name), model, attach.merge(params), tokenizer,
                    card=card.unmeasured(name, run.attack_in_words()))


def _edit_embedding(run):
  """Saves the clean student with a new embedding of the trigger, trained on the poisoned rows."""
  c = run.config
  model, params, tokenizer = run.load(results.CLEAN, remat=c.student.remat)
  rows = [row for row in run.rows["poisoned_train"] if row["poisoned"]]
  plan = stage.task_plan(run.task, "poison", c.seed, model, (), c.poison)
  params = embedding_row.trained(plan, params, run.encode(tokenizer, rows, c.data.attack_max_length),
                                 embedding_row.token_of(tokenizer, run.attack.trigger), run.place)
  save_pretrained(run.model_dir(results.POISONED), model, params, tokenizer,
                  card=card.unmeasured(results.POISONED, run.attack_in_words()))


def teach(run: Run) -> None:
  """Makes the teacher: a small encoder with the W2S widening head, fine-tuned on the defended domain.

  Its rows are clean, unless `teach.poison_rate` asks for a teacher with the student's backdoor.
  """
  c, name, rows, attack = run.config, results.TEACHER, run.rows["train"], None
  if run.done(name):
    return
  if c.teach.poison_rate:
    run.source.freeze(run)
    rows, attack = run.rows["poisoned_teacher"], run.attack_in_words()
  width = run.model_config(run.source.base).feature_size
  if c.teacher.path:
    model, params = run.pretrained_teacher(width)
    tokenizer = tokenization.load(resolve(c.teacher.path), model.config.vocab_size)
    model = with_padding_token(model, tokenizer)
  else:
    tokenizer = tokenization.train([r["text"] for r in rows], "encoder", c.teacher.arch.vocab_size)
    arch = c.teacher.arch.to_dict() | {"num_labels": c.data.num_labels}
    model = with_padding_token(Model(config_from_arch(arch, "--config.teacher.arch", feature_width=width)), tokenizer)
    params = model.init(stage.stream_key(c.seed, name), run.mesh)
  if c.teach.epochs:
    arrays, dev = (run.encode(tokenizer, r, c.data.max_length) for r in (rows, run.rows["dev"]))
    plan = stage.task_plan(run.task, name, c.seed, model, trees.FULL, c.teach)
    params, = stage.train_stage(plan, [params], [arrays], dev, run.place)
  save_pretrained(run.model_dir(name), model, params, tokenizer, card=card.unmeasured(name, attack))


def search_trigger(run: Run) -> str:
  """Makes models/reference, searches, logs the strongest string, and returns the verdict, a key of scan.EXIT_CODES."""
  reference.make(run)
  found = search.reading(run)
  if found["classes"]:
    LOG.info(search.in_words(found))
  return found["outcome"]


def defend(run: Run) -> None:
  """Runs each defense that makes weights, on the same clean rows.

  A from_base defense changes a public model. Every other defense changes the attacked model.

  Raises:
    InputError: a defense learns from the teacher, and the teacher is clearly worse than the attacked model.
  """
  c = run.config
  left = [(DEFENSES[name], name, runs) for name, runs in _runs_that_train_together(run)
          if (DEFENSES[name].recipe or DEFENSES[name].weights) and not all([run.done(copy) for copy in runs])]
  if any(defense.has_teacher for defense, *_ in left):
    checks.refuse_weak_teacher(run)
  for defense, name, runs in left:
    suspect = run.suspect(defense)
    for copy, params in zip(runs, distill.cleaned(defense, suspect, c.defense, runs)):
      _save_defended(run, name, copy, suspect, params)


def _runs_that_train_together(run):
  """Yields (defense, {NAME in models/NAME: seed}) for the runs that train together.

  These are all seeds of a defense. If its loss reads the padding, each seed trains alone.
  """
  for name in run.config.defenses:
    recipe, runs = DEFENSES[name].recipe, run.runs_of(name)
    if recipe and recipe.layout == "padded":
      yield from ((name, {copy: seed}) for copy, seed in runs.items())
    else:
      yield name, runs


def _save_defended(run, name, copy, suspect, params):
  if run.config.lora.export and attach.has_adapters(params):
    base = run.base_path() if results.is_from_base(name) else run.model_dir(run.source.attacked)
    lora.export_adapter(run.workdir / "adapters" / copy, suspect.model, params, base=base.absolute())
  save_pretrained(run.model_dir(copy), suspect.model, attach.merge(params), suspect.tokenizer,
                  card=card.unmeasured(name))


def self_test(run: Run) -> None:
  """Logs the ASR that a defense leaves of known backdoors in a copy of the suspect (measure/selftest.py)."""
  if result := selftest.reading(run):
    LOG.info(selftest.in_words(result))


def measure(run: Run) -> None:
  """Measures every model, as loaded from the directory that a user gets. Writes results.json and features.json."""
  if run.measured():
    return
  began, c, source = time.monotonic(), run.config, run.source
  source.freeze(run)
  triggered = run.rows[source.triggered]
  checks.check_texts(c, run.rows["test"] + triggered)
  readings = {results.TEACHER: deployed.read(run, results.TEACHER, triggered if c.teach.poison_rate else [])}
  readings |= {name: deployed.read(run, name, triggered) for name in (*source.measured, *run.defended())}
  width = run.model_config(source.base).feature_size
  weights = {name: DEFENSES[name].recipe.weights(c.defense, width) for name in c.defenses if DEFENSES[name].recipe}
  teacher_ca = float(run.task.is_correct(readings[results.TEACHER].clean, {"label": run.labels("test")}).mean())
  meta = run.facts() | {"teacher": c.teacher.path or "trained here on the clean rows", "teacher_ca": teacher_ca,
                        "loss_weights": weights, "hub": {"model": front.hub_id(c.student.path),
                                                         "public": front.hub_id(c.student.base),
                                                         "data": front.hub_id(c.data.get("train", ""))}}
  rows, meta, pictures = source.table(run, readings, meta)
  if c.lora.kind != "lora":
    meta["notes"].append(f"The adapters are of kind {c.lora.kind} (--config.lora.kind).")
  processes.write_text(run.workdir / features.FILE, json.dumps(pictures))
  processes.write_json(run.workdir / "results.json", {
      "rows": [dataclasses.asdict(row) for row in rows],
      "meta": meta | {"seconds": {"evaluate": time.monotonic() - began}}})


def make_report(run: Run) -> None:
  """Writes results.md, report.html, and the card of every model and adapter."""
  if not (run.workdir / "results.json").exists():
    raise InputError(f"{run.workdir / 'results.json'} is not there yet: run without --stage, or --stage=evaluate first")
  rows, meta = page.write(run.workdir)
  for directory in sorted(run.workdir.glob("models/*")):
    adapter = (directory / adapter_file.FILE).exists()
    head = "" if directory.name in card.KINDS else front.matter(directory.name, rows, meta)
    processes.write_text(directory / "README.md", head + card.text(directory.name, rows, meta, adapter))
  for directory in sorted(run.workdir.glob("adapters/*")):
    warning = "" if results.is_from_base(directory.name) else lora.ADAPTER_WARNING + "\n"
    processes.write_text(directory / "README.md", warning + card.text(directory.name, rows, meta))


STAGES = dict(zip(results.STAGES, (warmup, make_poison, scan_suspect, teach, search_trigger, defend, self_test,
                                  measure, make_report)))


def _check_stage(config, only):
  stages = source_lib.of(config).stages
  if only and only not in stages:
    raise InputError(f"this config has no stage {only!r}: want --stage among {', '.join(stages)}")
  if only == "search" and not config.probe.search:
    raise InputError("--stage=search needs words to search from: set --config.probe.search to more than 0")


def run(config: ConfigDict, workdir: str | Path, only: str | None = None) -> int:
  """Runs every stage, or only the stage `only`.

  "search" alone also makes the suspect and the teacher. If it gives no verdict, the scan runs and its verdict counts.

  Returns:
    The exit code: 0, or that of the verdict if `only` is "scan" or "search".
  Raises:
    InputError: the config has no stage `only`, or a check of `start` or of a stage fails.
  """
  _check_stage(config, only)
  this = start(config, workdir)
  mesh = ", ".join(f"{axis} {size}" for axis, size in this.mesh.shape.items())
  LOG.info(f"{this.mesh.devices.size} x {this.mesh.devices.flat[0].device_kind}, mesh {mesh}")
  if only == "search":
    warmup(this)
    teach(this)
  for name in this.source.stages:
    if only in (None, name):
      outcome = STAGES[name](this)
  if only == "search" and outcome == "no verdict":        # the scan gives a verdict on small networks
    outcome = scan_suspect(this)
  return scan.EXIT_CODES[outcome] if only in ("scan", "search") else 0
