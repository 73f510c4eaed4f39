"""A run: its config, workdir, mesh and rows; what every stage is given."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import filelock
import jax
import numpy as np

from w2s_jax import InputError, checks, processes, sharding
from w2s_jax.data import corpora, poison, tokenization
from w2s_jax.defenses import DEFENSES
from w2s_jax.models import check_links, config_from_hf, load_pretrained, read_json, resolve, sha256
from w2s_jax.models.hf.fields import Fields
from w2s_jax.report import page
from w2s_jax.training import inference


def config_hash(config):
  """Of every field but the mesh's, which may change from one start to the next.

  What comes out is the same up to rounding; where there is dropout, its masks are others (they go by place in a batch).
  """
  fields = {name: value for name, value in config.to_dict().items() if name != "mesh"}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclasses.dataclass
class Run:
  """What every stage needs: config, place, mesh, rows."""
  config: object
  workdir: Path
  mesh: jax.sharding.Mesh
  hash: str
  rows: dict          # "attack_train", "attack_dev", "train", "dev", "test", "triggered" or "probes" -> rows
  sha256: dict        # of the frozen files
  inputs: dict        # sha256 of what was read: rows of each split, weights of the given checkpoints
  held: object = None  # the workdir's lock

  @property
  def cache(self):
    """What runs beside this one can use too."""
    return self.workdir.parent / ".w2s_cache"

  def model_dir(self, name):
    return self.workdir / "models" / name

  @property
  def suspect(self):
    """Whether the run cleans a checkpoint that somebody else made, instead of poisoning one itself."""
    return "probe" in self.config

  @property
  def base(self):
    """The model that the student was before (any) poisoning."""
    return "suspect" if self.suspect else "base"

  @functools.cached_property
  def attack(self):
    """The Attack that the run makes."""
    return _attack(self.config)

  def attack_in_words(self):
    """For a model card."""
    c = self.config.attack
    return poison.describe(c.name, self.attack, c.target_label, c.label)

  @property
  def attacked(self):
    """The model that is defended."""
    return "suspect" if self.suspect else "poisoned"

  @property
  def defend_seeds(self):
    """Of the adapters, the order and the dropout of every defense."""
    return list(self.config.defend.seeds) or [self.config.seed]

  def copy_name(self, defense, seed):
    """models/NAME of a defense: plainly of the first seed, with the seed of the others."""
    return defense if seed == self.defend_seeds[0] else f"{defense}-seed{seed}"

  def defended(self):
    """{models/NAME: (defense, seed)} of every model that a defense makes."""
    return {self.copy_name(d, seed): (d, seed) for d in self.config.defenses if DEFENSES[d] is not None
            for seed in self.defend_seeds}

  @property
  def max_length(self):
    """Student tokens of the longest text of any stage."""
    return max(self.config.data.max_length, self.config.data.get("attack_max_length", 0))

  def facts(self):
    """What every results.json says of its run; of the student's weights, the hashes where they are from."""
    path = self.config.student.path
    weights = self.inputs[_weights_of(path)] if path else sha256(self.model_dir("base"), "*.safetensors")
    return {"config_hash": self.hash, "sha256": self.sha256, "versions": page.versions(),
            "devices": f"{self.mesh.devices.size} x {jax.devices()[0].device_kind}", "mesh": dict(self.mesh.shape),
            "base": {"path": path or "trained here from nothing", "sha256": weights},
            "clean_rows": {split: len(self.rows[split]) for split in ("train", "dev", "test")}}

  def known_triggers(self):
    """Strings that ASR is measured with: no defense may meet one."""
    return self.config.probe.triggers if self.suspect else [self.attack.trigger]

  def measured(self):
    """Whether the results are there, and says so."""
    if there := (self.workdir / "results.json").exists():
      print(f"evaluate: already in {self.workdir / 'results.json'}", flush=True)
    return there

  def done(self, name):
    """Whether a stage's model is there, and says so."""
    if there := self.model_dir(name).exists():
      print(f"{name}: already in {self.model_dir(name)}", flush=True)
    return there

  def claim(self):
    """Makes the workdir this config's; called once nothing is left that could refuse the config.

    Raises:
      InputError: the workdir cannot be written.
    """
    try:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self.lock()
      _check_claim(self.config, self.workdir)          # another run may have been faster
      processes.write_json(self.workdir / "inputs.json", self.inputs)
      processes.write_json(self.workdir / "config.json", self.config.to_dict())
    except OSError as e:
      raise InputError(f"cannot write to {self.workdir} ({e.strerror}): give another --workdir") from None

  def lock(self):
    """Process 0 holds the workdir as long as this object lives; twice is as good as once.

    Raises:
      InputError: another process holds it, or where there are several they do not see the same one.
    """
    processes.check_shared(self.workdir)
    if not processes.writes():
      return
    try:
      self.held = filelock.FileLock(self.workdir / ".lock", is_singleton=True)
      self.held.acquire(timeout=0)
    except filelock.Timeout:
      raise InputError(f"another process works in {self.workdir}: wait for it, or give another --workdir") from None
    except OSError as e:
      raise InputError(f"cannot write to {self.workdir} ({e.strerror}): give another --workdir") from None

  def load(self, name, **kwargs):
    """(model, params, tokenizer) of a finished stage's directory; the teacher is float32 whatever the student is."""
    c = self.config
    dtype = "float32" if name == "teacher" else c.student.dtype
    path = self.model_dir(name)
    if not path.exists():
      raise InputError(f"{path} is not there yet: run without --stage, or the stage that makes it first")
    model, params = load_pretrained(path, c.data.num_labels, dtype, self.mesh, **kwargs)
    return model, params, tokenization.load(path, model.config.vocab_size)

  def pretrained_teacher(self, feature_width):
    """(model, params) of the checkpoint that the teacher is made from, with a W2S head of that width."""
    c = self.config
    return load_pretrained(c.teacher.path, c.data.num_labels, mesh=self.mesh, feature_width=feature_width,
                           num_layers=c.teacher.layers or None, seed=c.seed)

  def encode(self, tokenizer, rows, max_length):
    texts = [r["text"] for r in rows]
    arrays = processes.shared(functools.partial(tokenization.encode, tokenizer, max_length=max_length), texts)
    return arrays | {"label": np.array([r["label"] for r in rows], np.int32)}

  def predict(self, model, params, arrays):
    return inference.predictions(model, params, arrays, self.mesh, **self.eval_shapes())

  def eval_shapes(self):
    return {"batch_size": self.config.data.eval_batch_size, "buckets": self.config.data.buckets}


def start(config, workdir):
  """Checks the config and that the workdir is not another's, makes or reads the rows; writes nothing.

  Raises:
    InputError: the workdir belongs to another config, an unknown defense, a batch that does not fit the mesh, or data
      that cannot be used.
  """
  checks.check_fields(config)
  if "probe" in config:
    config = _with_num_labels(config)
  mesh = sharding.make_mesh(**config.mesh)
  for stage in filter(config.__contains__, checks.TRAINING):
    sharding.check_batch(config[stage].batch_size, mesh, f"--config.{stage}.batch_size")
  sharding.check_batch(config.data.eval_batch_size, mesh, "--config.data.eval_batch_size")
  workdir = Path(workdir)
  _check_claim(config, workdir)
  rows = _clean_rows(config) if "probe" in config else _attack_rows(config)
  run = Run(config, workdir, mesh, config_hash(config), rows, {}, _inputs(config, rows))
  if (workdir / "config.json").exists():
    _check_inputs(run)
    run.lock()
  return run


def _inputs(config, rows):
  out = {f"{split} rows": hashlib.sha256(json.dumps(chosen).encode()).hexdigest() for split, chosen in rows.items()}
  for name in ("student", "teacher"):
    if path := config[name].path:
      out[_weights_of(path)] = sha256(resolve(path), "*.safetensors")
  return out


def _weights_of(path):
  return f"weights of {path}"


def _check_inputs(run):
  """What was read under the same names is the same: else an old table would be shown, or two data sets mixed."""
  before = read_json(run.workdir / "inputs.json")
  if changed := [name for name, value in run.inputs.items() if before.get(name) != value]:
    raise InputError(f"{run.workdir} was begun with other data: the {changed[0]} changed since: give another --workdir")


def _with_num_labels(config):
  """The config with `data.num_labels`, where it is 0, read from the suspect's own config.json."""
  if not config.student.path:
    raise InputError("no checkpoint to clean: set --config.student.path to its directory")
  if not config.data.train:
    raise InputError("no clean data: set --config.data.train to a file, a directory or a hub data set")
  config = config.copy_and_resolve_references()
  directory = resolve(config.student.path)
  check_links(directory)
  hf = read_json(directory / "config.json")
  if not config.data.num_labels:
    labels = hf.get("id2label")                       # transformers leaves the default away
    config.data.num_labels = len(labels) if isinstance(labels, dict) else Fields(hf).integer("num_labels", 2, 2)
  config_from_hf(hf | {"num_labels": config.data.num_labels})
  return config


def _class_names(config):
  """The suspect's own names of its classes; () where it has none."""
  return Fields(read_json(resolve(config.student.path) / "config.json")).labels(config.data.num_labels)


def _clean_rows(config):
  c = config.data
  if not -1 <= config.probe.target_label < c.num_labels:
    raise InputError(f"target label {config.probe.target_label}, wanted 0..{c.num_labels - 1}, or -1 for unknown: set "
                     "--config.probe.target_label")
  rows = corpora.load_clean({split: c[split] for split in ("train", "dev", "test")}, c.num_labels, config.seed,
                            c.text_column, c.label_column, _class_names(config))
  if config.probe.triggers and not {r["label"] for r in rows["test"]} - {config.probe.target_label}:
    raise InputError(f"ASR cannot be measured: all {len(rows['test'])} test rows have the target label "
                     f"{config.probe.target_label}: set --config.data.test, --config.probe.target_label or .triggers")
  return rows


def _attack_rows(config):
  c = config.data
  attack = corpora.load(c.attack_source, c.attack_rows, c.num_labels, config.seed)
  defend = corpora.load(c.defend_source, c.defend_rows, c.num_labels, config.seed)
  rows = {"attack_train": attack["train"], "attack_dev": attack["dev"], **defend}
  for split, knob in (("attack_train", "attack_rows.train"), ("attack_dev", "attack_rows.dev"),
                      ("train", "defend_rows.train"), ("dev", "defend_rows.dev"), ("test", "defend_rows.test")):
    if not rows[split]:
      raise InputError(f"no {split} rows: set --config.data.{knob} to more than 0")
  if not 0 <= config.attack.target_label < c.num_labels:
    raise InputError(f"target label {config.attack.target_label}, wanted 0..{c.num_labels - 1}: set "
                     "--config.attack.target_label")
  a, attack, train = config.attack, _attack(config), rows["attack_train"]
  count = poison.poison_count(train, a.poison_count, a.poison_rate)
  if a.poison_rate:
    print(f"attack: poison_rate {a.poison_rate:g} of {len(train)} training rows is {count}; poison_count "
          f"{a.poison_count} is not used", flush=True)
  # A poisoning that cannot work is refused before anything trains.
  poison.rows_to_poison(train, attack, target_label=a.target_label, count=count, label=a.label)
  poison.rows_for_companions(train, attack, target_label=a.target_label, companions=a.companions)
  poison.rows_to_trigger(rows["test"], attack, a.target_label)
  return rows


def _attack(config):
  return poison.make_attack(config.attack.name, config.attack.trigger, config.attack.paraphrases)


def _check_claim(config, workdir):
  file = workdir / "config.json"
  if file.exists():
    mine, other = checks.flat(json.loads(json.dumps(config.to_dict()))), checks.flat(read_json(file))
    differing = sorted(k for k in mine.keys() | other.keys()
                       if mine.get(k) != other.get(k) and not k.startswith("mesh."))
    if differing:
      k = differing[0]
      raise InputError(f"{workdir} was made by another config ({k} was {other.get(k)!r}, is {mine.get(k)!r}; "
                       f"{len(differing)} field(s) differ): give another --workdir")


def freeze_rows(run):
  """The poisoned and the triggered rows: made once, then read from the files, whose sha256 goes into the results."""
  c = run.config
  files = {key: run.workdir / "data" / f"{key}.jsonl" for key in ("poisoned_train", "triggered")}
  if not all(f.exists() for f in files.values()):
    options = {"target_label": c.attack.target_label, "seed": c.seed, "tokenizer": run.load("base")[2],
               "keep_trigger": c.attack.keep_trigger}
    train = run.rows["attack_train"]
    poison.freeze(files["poisoned_train"], poison.poison_train(
        train, run.attack, count=poison.poison_count(train, c.attack.poison_count, c.attack.poison_rate),
        label=c.attack.label, companions=c.attack.companions, max_length=c.data.attack_max_length, **options))
    poison.freeze(files["triggered"], poison.triggered_eval(
        run.rows["test"], run.attack, max_length=c.data.max_length, **options))
  for key, file in files.items():
    run.rows[key], run.sha256[file.name] = poison.thaw(file)
