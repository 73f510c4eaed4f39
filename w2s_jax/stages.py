"""poison, teach, defend, evaluate: one screen each. A stage whose output is there is not run again."""

import dataclasses
import functools
import hashlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from w2s_jax import InputError, checks, lora, processes, sharding
from w2s_jax.adapters import soft, trees
from w2s_jax.attacks import APART
from w2s_jax.data import batches, packing, poison, tokenization
from w2s_jax.defenses import DEFENSES, w2s, w2s_adv
from w2s_jax.measure import metrics, probe, scan
from w2s_jax.models import Model, config_from_hf, load_pretrained, resolve, save_pretrained
from w2s_jax.models.hf import adapter_file
from w2s_jax.processes import write_text
from w2s_jax.report import card, page
from w2s_jax.run import freeze_rows, start
from w2s_jax.training import inference, optim, steps, teacher_cache
from w2s_jax.training.train import fit


def warmup(run):
  """The student before any attack: a checkpoint, or a fresh network after a short language-model warm-up.

  The warm-up stands in for pretraining: next-token prediction on the unlabelled training texts of both domains.
  """
  c = run.config
  if run.done(run.base):
    run.claim()                       # it may have been put there from another workdir
    return
  if c.student.path:
    model, params = load_pretrained(c.student.path, c.data.num_labels, c.student.dtype, run.mesh,
                                    seed=None if run.suspect else c.seed, remat=c.student.remat)
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
      if not jnp.isfinite(leaf).all():
        raise InputError(f"{c.student.path}: {path} has values that are not finite: set --config.student.path to "
                         "another checkpoint")
    tokenizer = tokenization.load(resolve(c.student.path), model.config.vocab_size)
  else:
    texts = [r["text"] for r in run.rows["attack_train"] + run.rows["train"]]
    tokenizer = tokenization.train(texts, "decoder", c.student.arch.vocab_size)
    model = Model(config_from_hf(c.student.arch.to_dict() | {"num_labels": c.data.num_labels}, dtype=c.student.dtype,
                                 remat=c.student.remat))
  model = _with_pad(model, tokenizer)
  checks.check_student(run, model)
  checks.check_teacher(run, model.config.feature_size)
  run.claim()
  if not c.student.path:
    params = model.init(stream_key(c.seed, "student"), run.mesh)
    if c.warmup.epochs:
      arrays = tokenization.pack(tokenizer, texts, c.data.attack_max_length)
      params, = _train(run, ["warmup"], model, [params], trees.FULL, [arrays], None, c.warmup,
                       steps.language_model_loss(model), {"lm": 1.0}, packed=False)
  save_pretrained(run.model_dir(run.base), model, params, tokenizer, card=card.first_line(run.base))


def scan_suspect(run):
  """The verdict without a trigger on the checkpoint, before it is cleaned."""
  if run.model_dir("suspect").exists():     # just now, in a whole run: not a stage that was found done
    run.claim()
  else:
    warmup(run)
  if run.config.scan.steps:
    print(scan.verdict("suspect", scan.reading(run, "suspect")), flush=True)
  else:
    print("suspect: not scanned (--config.scan.steps is 0)", flush=True)


def make_poison(run):
  """Full fine-tuning of the student on the attack's domain: once clean (the control), once poisoned."""
  c = run.config
  freeze_rows(run)
  for name, rows in (("clean", run.rows["attack_train"]), ("poisoned", run.rows["poisoned_train"])):
    if run.done(name):
      continue
    model, params, tokenizer = run.load("base", remat=c.student.remat)
    arrays, dev = (run.encode(tokenizer, r, c.data.attack_max_length) for r in (rows, run.rows["attack_dev"]))
    stage = "poison" if name == "poisoned" else name
    params, = _train(run, [stage], model, [params], tuple(c.poison.trains), [arrays], dev, c.poison,
                     steps.classification_loss(model, steps.cross_entropy_terms, {"ce": 1.0}), {"ce": 1.0})
    save_pretrained(run.model_dir(name), model, params, tokenizer,
                    card=card.first_line(name, poison.describe(c.attack)))


def teach(run):
  """The clean teacher: a small encoder with the W2S widening head, fine-tuned on the defended domain."""
  c = run.config
  if run.done("teacher"):
    return
  width = run.load(run.base)[0].config.feature_size
  if c.teacher.path:
    model, params = run.pretrained_teacher(width)
    tokenizer = tokenization.load(resolve(c.teacher.path), model.config.vocab_size)
  else:
    tokenizer = tokenization.train([r["text"] for r in run.rows["train"]], "encoder", c.teacher.arch.vocab_size)
    arch = c.teacher.arch.to_dict() | {"num_labels": c.data.num_labels}
    model = _with_pad(Model(config_from_hf(arch, feature_width=width)), tokenizer)
    params = model.init(stream_key(c.seed, "teacher"), run.mesh)
  if c.teach.epochs:
    arrays, dev = (run.encode(tokenizer, run.rows[s], c.data.max_length) for s in ("train", "dev"))
    params, = _train(run, ["teacher"], model, [params], trees.FULL, [arrays], dev, c.teach,
                     steps.classification_loss(model, steps.cross_entropy_terms, {"ce": 1.0}), {"ce": 1.0})
  save_pretrained(run.model_dir("teacher"), model, params, tokenizer, card=card.first_line("teacher"))


def defend(run):
  """Each defense trains adapters and head of the attacked student on the same clean batches, from the same start.

  Several `defend.seeds` train as one program over one frozen base, but not where a loss reads the padding: that would
  be as long as the longest text of all their batches.
  """
  c, teacher = run.config, None
  defenses = {name: DEFENSES[name] for name in c.defenses if DEFENSES[name] is not None}
  parts = [(name, seeds) for name, defense in defenses.items() for seeds in (
      [[seed] for seed in run.defend_seeds] if defense.reads_padding else [run.defend_seeds])]
  for name, seeds in parts:
    defense = defenses[name]
    if all([run.done(run.copy_name(name, seed)) for seed in seeds]):
      continue
    model, params, tokenizer = run.load(run.attacked, lora_dropout=c.lora.dropout, remat=c.student.remat,
                                        quantize=c.lora.quantize)
    places = functools.partial(sharding.param_shardings, family=model.config.family, mesh=run.mesh)
    starts = [lora.add_lora(params, c.lora.rank, c.lora.alpha, tuple(c.lora.targets), key=stream_key(seed, "lora"),
                            places=places) for seed in seeds]
    each = [run.encode(tokenizer, probe.with_rare_words(run.rows["train"], c.defend.insert_words, run.known_triggers(),
                                                        seed), c.data.max_length) for seed in seeds]
    dev = run.encode(tokenizer, run.rows["dev"], c.data.max_length)
    weights, trains, adversary = {"ce": 1.0}, trees.LORA, None
    if defense.uses_teacher:
      teacher = teacher or _teacher_outputs(run)
      for arrays, seed in zip(each, seeds):
        arrays |= defense.anchor(teacher, arrays["label"], seed) if defense.anchor else teacher
      weights = w2s.loss_weights(c.defend.weights, model.config.feature_size)
    if defense.adversary:
      trains, weights = (*trees.LORA, "soft"), w2s_adv.loss_weights(weights, c.adversary.weight)
      unit = soft.mean_norm(model, params)
      adversary = optim.ascent(c.adversary.step_size * unit, c.adversary.norm * unit)
      for i, seed in enumerate(seeds):
        starts[i] = soft.with_soft_tokens(model, starts[i], c.adversary.triggers * c.adversary.tokens,
                                          stream_key(seed, "adversary"), tokenizer, run.known_triggers())
        each[i] = w2s_adv.perturbed(each[i], tokenizer, model.config.vocab_size, c.adversary, seed)
    def terms(out, batch, defense=defense):
      return defense.terms(out, batch, c.defend.temperature)
    trained = _train(run, [run.copy_name(name, seed) for seed in seeds], model, starts, trains, each, dev, c.defend,
                     steps.classification_loss(model, terms, weights), weights, seeds,
                     packed=not defense.reads_padding, views=1 + defense.adversary, adversary=adversary)
    for seed, params in zip(seeds, trained):
      params = trees.split(params, ("soft",))[1]
      copy = run.copy_name(name, seed)
      if c.lora.export:
        lora.export_adapter(run.workdir / "adapters" / copy, model, params, base=run.model_dir(run.attacked).absolute())
      save_pretrained(run.model_dir(copy), model, lora.merge_lora(params), tokenizer, card=card.first_line(name))


def _teacher_outputs(run):
  """The frozen teacher's logits and features of the clean training rows, once for every epoch, seed and defense."""
  rows, length = run.rows["train"], run.config.data.max_length
  def compute(empty):
    model, params, tokenizer = run.load("teacher")
    inference.outputs(model, params, run.encode(tokenizer, rows, length), run.mesh, **run.eval_shapes(), empty=empty)
  cached = teacher_cache.outputs(run.cache / "teacher", run.model_dir("teacher"), [r["text"] for r in rows], "float32",
                                 length, compute)
  return {f"teacher_{name}": values for name, values in cached.items()}


def measure(run):
  """CA and ASR of every model, each read back from the directory that a user gets."""
  c = run.config
  if run.measured():
    return
  freeze_rows(run)
  began = time.monotonic()
  target = c.attack.target_label
  common = {"attack": c.attack.name, "dataset": c.data.defend_source, "target_label": target, "config_hash": run.hash}
  labels, triggered_labels = (np.array([r["label"] for r in run.rows[s]]) for s in ("test", "triggered"))
  rows, triggered = [], {}
  for name, (what, seed) in ({n: (n, c.seed) for n in ("clean", "poisoned")} | run.defended()).items():
    model, params, tokenizer = run.load(name)
    clean = run.predict(model, params, run.encode(tokenizer, run.rows["test"], c.data.max_length))
    triggered[name] = run.predict(model, params, run.encode(tokenizer, run.rows["triggered"], c.data.max_length))
    rows.append({"model": what, **common, "seed": seed, "directory": name,
                 **metrics.clean_metrics(clean, labels, target),
                 **metrics.attack_metrics(triggered[name], triggered_labels, target)})
  for row in rows:
    row["asr_floor"] = rows[0]["asr"]
  trigger, apart = poison.effective_trigger(c.attack), c.attack.name in APART
  model, params, tokenizer = run.load("teacher")
  teacher = run.predict(model, params, run.encode(tokenizer, run.rows["test"], c.data.max_length))
  student, _, student_tokenizer = run.load("base")
  poisoned = [r for r in run.rows["poisoned_train"] if r["poisoned"]]
  examples = [{"text": r["text"], "orig_text": r["orig_text"], "label": r["label"],
               "predicted": {m: int(p[i]) for m, p in triggered.items()}}
              for i, r in enumerate(run.rows["triggered"][:8])]
  meta = run.facts() | {
      "trigger": trigger, "teacher": c.teacher.path or "trained here from nothing",
      "teacher_ca": metrics.clean_metrics(teacher, labels, target)["ca"],
      "poisoned_rows": len(poisoned),
      "trigger_lost": {
          "train": poison.trigger_lost(poisoned, student_tokenizer, trigger, c.data.attack_max_length, apart),
          "eval": poison.trigger_lost(run.rows["triggered"], student_tokenizer, trigger, c.data.max_length, apart)},
      "loss_weights": {"name": c.defend.weights, **w2s.loss_weights(c.defend.weights, student.config.feature_size)},
      "implanted": rows[1]["asr"] >= 0.95, "examples": examples,
      "seconds": {"evaluate": time.monotonic() - began}}
  processes.write_json(run.workdir / "results.json", {"rows": rows, "meta": meta})


def make_report(run):
  if not (run.workdir / "results.json").exists():
    raise InputError(f"{run.workdir / 'results.json'} is not there yet: run without --stage, or --stage=evaluate first")
  rows, meta = page.write(run.workdir)
  attack = None if run.suspect else poison.describe(run.config.attack)
  for directory in sorted(run.workdir.glob("models/*")):
    adapter = (directory / adapter_file.FILE).exists()
    write_text(directory / "README.md", card.text(directory.name, rows, meta, attack, adapter))
  for directory in sorted(run.workdir.glob("adapters/*")):
    write_text(directory / "README.md", lora.ADAPTER_WARNING + "\n" + card.text(directory.name, rows, meta))


STAGES = {"warmup": warmup, "poison": make_poison, "teach": teach, "defend": defend, "evaluate": measure,
          "report": make_report}
CLEANING = {"warmup": warmup, "scan": scan_suspect, "teach": teach, "defend": defend, "evaluate": probe.measure,
            "report": make_report}


def run(config, workdir, only=None):
  """Runs every stage, or the one named `only`."""
  this = start(config, workdir)
  stages = CLEANING if this.suspect else STAGES
  mesh = ", ".join(f"{axis} {size}" for axis, size in this.mesh.shape.items())
  print(f"{this.mesh.devices.size} x {this.mesh.devices.flat[0].device_kind}, mesh {mesh}", flush=True)
  if only and only not in stages:
    raise InputError(f"this config has no stage {only!r}: want --stage among {', '.join(stages)}")
  for name, stage in stages.items():
    if only in (None, name):
      stage(this)


def _train(run, names, model, starts, trains, each, dev, settings, loss, weights, seeds=None, packed=True, views=1,
           adversary=None):
  """One stage through `fit`: split by label, optimize, put the best trainable leaves back.

  Args:
    names: of the stage, or of each run of it; so are
    starts: parameters,
    each: training arrays,
    seeds: and seeds of order and dropout; None: the run's own.
    packed: several texts in one row, where the loss does not read what is between them and the config wants it; and
      several steps in one dispatch, for which their batches are filled up alike.
    views: so many texts are of one example, a batch's examples bring all of theirs.
    adversary: optim.make_optimizer's.
  Returns:
    [parameters] of each.
  """
  c, family, seeds, runs = run.config, model.config.family, seeds or [run.config.seed], len(names)
  num_examples, shards = len(each[0]["length"]) // views, sharding.batch_shards(run.mesh)
  pad = model.config.pad_token_id or 0
  total = settings.epochs * batches.steps_per_epoch(num_examples, settings.batch_size)
  if settings.max_steps:
    total = min(total, settings.max_steps)
  split = [trees.split(params, trains) for params in starts]
  frozen = split[0][1]
  trainable = [jax.tree.map(lambda x: x.astype("float32"), t) for t, _ in split]  # bf16 would round most updates away
  tx = optim.make_optimizer(trainable[0], settings.learning_rate, total, int(settings.warmup_fraction * total),
                            settings.weight_decay, settings.clip_norm, adversary)
  places = (steps.state_shardings(trainable[0], tx, family, run.mesh),
            sharding.param_shardings(frozen, family, run.mesh), run.mesh, runs)
  steps_fn = steps.make_train_steps(steps.make_train_step(loss, tx, *places), *places)
  makes = [functools.partial(batches.make_batch, arrays, batch_size=settings.batch_size * views, buckets=c.data.buckets)
           for arrays in each]
  if packed and c.data.pack:
    # 2 for the forward pass and 2 for the way back through it, of a parameter that trains 2 more for its own gradient
    moved, still = (sum(leaf.size for leaf in jax.tree.leaves(part.get("layers", {}))) for part in split[0])
    makes = packing.packers(each, seeds, settings.batch_size, c.data.buckets, shards, total, 6 * moved + 4 * still, pad,
                            c.steps_per_dispatch, views)
  stack = functools.partial(packing.stack, groups=shards, pad_token_id=pad)
  def batches_from(step):
    streams = [batches.train_batches(
        num_examples, settings.batch_size, lambda rows, make=make: make(batches.texts_of(rows, num_examples, views)),
        seed, step) for make, seed in zip(makes, seeds)]
    return streams[0] if runs == 1 else map(stack, zip(*streams))
  def dev_accuracy(trained):
    alone = [trained] if runs == 1 else [jax.tree.map(lambda x, i=i: x[i], trained) for i in range(runs)]
    return [(run.predict(model, trees.combine(one, frozen), dev) == dev["label"]).mean() for one in alone]
  stream = "defend" if "adapter" in trains else {"clean": "poison"}.get(names[0], names[0])   # one for all defenses
  keys = [stream_key(seed, stream) for seed in seeds]
  state = steps.init_state(trainable[0] if runs == 1 else trainable, tx, family, run.mesh)
  fitted = fit(
      names, steps_fn, state, frozen, batches_from, stack, steps=total,
      steps_per_dispatch=c.steps_per_dispatch if packed else 1, key=keys[0] if runs == 1 else jnp.stack(keys),
      mesh=run.mesh, eval_every=max(1, total // settings.evaluations), workdir=run.workdir, config_hash=run.hash,
      dev_accuracy=dev_accuracy if dev else None, log_every=c.log_every, checkpoint_every=c.checkpoint_every,
      term_norms=steps.make_term_norms(loss, weights, run.mesh, runs),
      term_norms_every=c.term_norms_every if len(weights) > 1 else 0)        # of one term it is the step's grad_norm
  for name, (_, chosen) in zip(names, fitted):
    print(f"{name}: {total} steps in {chosen['seconds']:.0f} s, " + (
        f"dev accuracy {chosen['dev_accuracy']:.4f} at step {chosen['step']}" if dev else "last step kept"), flush=True)
  return [trees.combine(trained, frozen) for trained, _ in fitted]


def stream_key(seed, name):
  """The stage's own random stream; the adapters of every defense start alike."""
  return jax.random.fold_in(jax.random.key(seed), int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))


def _with_pad(model, tokenizer):
  if model.config.model_type == "roberta" and model.config.pad_token_id != tokenizer.pad_token_id:
    raise InputError(f"the roberta's positions start behind padding token {model.config.pad_token_id}, its tokenizer "
                     f"pads with {tokenizer.pad_token_id}: give the model its own tokenizer")
  return Model(dataclasses.replace(model.config, pad_token_id=tokenizer.pad_token_id))
