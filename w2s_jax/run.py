"""`Run`, the record that every stage gets, and `start`, which makes it after the first checks."""

import dataclasses
import functools
import importlib.metadata
import logging
import platform
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from ml_collections import ConfigDict

from w2s_jax import InputError, checks, claims, processes, results, sharding
from w2s_jax import source as source_lib
from w2s_jax.attacks import Attack
from w2s_jax.data import poison, tokenization
from w2s_jax.defenses import DEFENSES, Defense, Ranking, Suspect
from w2s_jax.measure import search
from w2s_jax.models import Model, base_of, config_from_hf, load_pretrained, read_json, sha256
from w2s_jax.models.family import SharedConfig
from w2s_jax.models.padding import with_padding_token
from w2s_jax.source import Source
from w2s_jax.tasks import TASKS, Task
from w2s_jax.training import inference, teacher_cache
from w2s_jax.training.train import Workplace

LOG = logging.getLogger(__name__)

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
  return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


@dataclasses.dataclass
class Run:
  """The argument of every stage."""
  config: ConfigDict
  workdir: Path
  mesh: jax.sharding.Mesh
  hash: str           # claims.config_hash of the config
  source: Source
  rows: dict          # split -> rows; Source.freeze adds "poisoned_train", "triggered", "poisoned_teacher", or "probes"
  sha256: dict        # name of a file that Source.freeze wrote -> its sha256
  inputs: dict        # the result of claims.inputs
  held: filelock.BaseFileLock | None = None      # the lock on the workdir

  @property
  def cache(self) -> Path:
    """The cache directory, which runs in sibling workdirs share."""
    return self.workdir.parent / ".w2s_cache"

  def model_dir(self, name: str) -> Path:
    return self.workdir / "models" / name

  @functools.cached_property
  def attack(self) -> Attack:
    """The attack of the config."""
    return source_lib.attack_of(self.config)

  def attack_in_words(self) -> str:
    """A description of the attack for a model card."""
    c = self.config.attack
    return poison.describe(c.name, self.attack, c.target_label, c.label)

  @property
  def defend_seeds(self) -> list[int]:
    """Seeds of adapters, data order and dropout of every defense."""
    return list(self.config.defend.seeds) or [self.config.seed]

  def copy_name(self, defense: str, seed: int) -> str:
    """NAME in models/NAME of a defense with a seed: DEFENSE for the first seed, DEFENSE-seedSEED for the others."""
    return defense if seed == self.defend_seeds[0] else f"{defense}-seed{seed}"

  def runs_of(self, defense: str) -> dict[str, int]:
    """{NAME in models/NAME: seed} of a defense."""
    return {self.copy_name(defense, seed): seed for seed in self.defend_seeds}

  def defended(self) -> dict[str, tuple[str, int]]:
    """{NAME in models/NAME: (defense, seed)} of every defense except `none`."""
    # The first four attributes of a Defense are what it does. `none` has none of them.
    return {name: (defense, seed) for defense in self.config.defenses if any(DEFENSES[defense][:4])
            for name, seed in self.runs_of(defense).items()}

  @property
  def max_length(self) -> int:
    """Largest length to which a stage truncates texts, in student tokens."""
    return max(self.config.data.max_length, self.config.data.get("attack_max_length", 0))

  def facts(self) -> dict:
    """The facts of a run in results.json: versions, devices, mesh, base, row counts, hashes of config, files, weights.

    The weights are those of `base`, the student before any attack or defense.
    """
    path, base = self.config.student.path, self.config.student.base
    weights = self.inputs[claims.weights_of(path)] if path else sha256(self.model_dir(results.BASE), "*.safetensors")
    return {"config_hash": self.hash, "sha256": self.sha256, "versions": versions(),
            "devices": f"{self.mesh.devices.size} x {jax.devices()[0].device_kind}", "mesh": dict(self.mesh.shape),
            "base": {"path": f"{path} (public model: {base})" if base else path or "trained here from nothing",
                     "sha256": weights, "public": base},
            "clean_rows": {split: len(self.rows[split]) for split in ("train", "dev", "test")}}

  def measured(self) -> bool:
    """Whether results.json exists. If it does, the log says so."""
    if exists := (self.workdir / "results.json").exists():
      LOG.info(f"evaluate: already in {self.workdir / 'results.json'}")
    return exists

  def done(self, name: str) -> bool:
    """Whether models/NAME exists. If it does, the log says so."""
    if exists := self.model_dir(name).exists():
      LOG.info(f"{name}: already in {self.model_dir(name)}")
    return exists

  def claim(self) -> None:
    """Claims the workdir for this config. It is called after the checks that need no training.

    Raises:
      InputError: the workdir cannot be written, or belongs to another config; see also `lock`.
    """
    try:
      self.workdir.mkdir(parents=True, exist_ok=True)
      self.lock()
      claims.check_config(self.config, self.workdir)          # another run may have claimed it meanwhile
      processes.write_json(self.workdir / "inputs.json", self.inputs)
      processes.write_json(self.workdir / "config.json", self.config.to_dict())
    except OSError as e:
      raise InputError(f"cannot write to {self.workdir} ({e.strerror}): give another --workdir") from None

  def lock(self) -> None:
    """Locks the workdir for the lifetime of this object, in process 0. A second call changes nothing.

    Raises:
      InputError: another program holds the lock, the workdir cannot be written, or this program's processes do not
        see the same workdir.
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

  def finished(self, name: str) -> Path:
    """The path of models/NAME, which an earlier stage has made.

    Raises:
      InputError: the directory does not exist.
    """
    path = self.model_dir(name)
    if not path.exists():
      raise InputError(f"{path} is not there yet: run without --stage, or the stage that makes it first")
    return path

  def load(self, name: str, **kwargs: Any) -> tuple[Model, dict, Any]:
    """(model, params, tokenizer) of models/NAME, in `student.dtype`; the teacher is always float32.

    kwargs: options of load_pretrained.
    """
    c = self.config
    dtype = "float32" if name == results.TEACHER else c.student.dtype
    path = self.finished(name)
    model, params = load_pretrained(path, c.data.num_labels, dtype, self.mesh, **kwargs)
    return model, params, tokenization.load(path, model.config.vocab_size)

  def pretrained_teacher(self, feature_width: int) -> tuple[Model, dict]:
    """(model, params) of the checkpoint that the teacher starts from, with a W2S head of width `feature_width`."""
    c = self.config
    return load_pretrained(c.teacher.path, c.data.num_labels, mesh=self.mesh, feature_width=feature_width,
                           num_layers=c.teacher.layers or None, seed=c.seed)

  def tokenizer(self, name: str) -> Any:
    """The tokenizer of models/NAME. No weights are read."""
    return tokenization.load(self.model_dir(name), self.model_config(name).vocab_size)

  def model_config(self, name: str) -> SharedConfig:
    """The config of models/NAME."""
    return config_from_hf(read_json(self.finished(name) / "config.json"))

  @property
  def task(self) -> Task:
    return TASKS[self.config.task]

  def encode(self, tokenizer: Any, rows: list[dict], max_length: int) -> dict[str, np.ndarray]:
    return self.task.encode(tokenizer, rows, max_length)

  def labels(self, split: str) -> np.ndarray:
    """Labels of the split's rows, [N] int."""
    return np.array([r["label"] for r in self.rows[split]], int)

  @property
  def place(self) -> Workplace:
    c = self.config
    return Workplace(self.task, self.mesh, self.workdir, self.hash, c.data.buckets, c.data.eval_batch_size, c.data.pack,
                     c.log_every, c.checkpoint_every, c.term_norms_every, c.steps_per_dispatch)

  def suspect(self, defense: Defense) -> Suspect:
    """The record that a defense gets: the attacked model, or the public base if its recipe has `from_base`."""
    c, recipe = self.config, defense.recipe
    runtime = {"lora_dropout": c.lora.dropout, "remat": c.student.remat}
    options = runtime | {"quantize": c.lora.quantize if recipe and "adapter" in recipe.trains else ""}
    if recipe and recipe.from_base:
      return self.suspect_of(self.load_base(**options))
    file = search.ranking_file(self)
    ranking = Ranking.from_json(file.read_text()) if file.exists() else None
    base = functools.partial(self.load_base, **runtime) if c.student.base or defense.mixes_base else None
    made = self.model_dir(results.REFERENCE).exists()
    return self.suspect_of(self.load(self.source.attacked, **options))._replace(
        ranking=ranking, teacher_model=lambda: self.load(results.TEACHER), base=base,
        reference=functools.partial(self.load, results.REFERENCE) if made else None)

  def suspect_of(self, loaded: tuple[Model, dict, Any]) -> Suspect:
    """The record that a defense gets, for a loaded model (model, params, tokenizer)."""
    c = self.config
    return Suspect(*loaded, self.rows["train"], self.rows["dev"], self.teacher_outputs, self.source.triggers(self),
                   c.defend, c.lora, c.data.max_length, self.place)

  def base_path(self) -> Path | None:
    """The directory of the public base, which defenses train or mix in; None if the user did not name one.

    For a student that this run poisons it is models/base. The base that an adapter names does not count, because
    whoever made the suspect could name any model.
    """
    c = self.config.student
    if self.source.base != self.source.attacked:
      return self.model_dir(self.source.base)
    return base_of(c.path, c.base) if c.base else None

  def load_base(self, **options: Any) -> tuple[Model, dict, Any]:
    """(model, params, tokenizer) of the model at `base_path`, with the suspect's class names.

    If that model has no classification head, a new one is initialised from the config's seed.

    Raises:
      InputError: the user did not name a base, or it cannot be loaded.
    """
    c, path = self.config, self.base_path()
    if self.source.base != self.source.attacked:
      return self.load(self.source.base, **options)
    if not path:
      raise InputError("this run needs a public model: set --config.student.base to the one that the suspect was made "
                       "from")
    model, params = load_pretrained(path, c.data.num_labels, c.student.dtype, self.mesh, seed=c.seed, **options)
    tokenizer = tokenization.load(path, model.config.vocab_size)
    labels = self.model_config(self.source.attacked).labels
    model = Model(dataclasses.replace(model.config, labels=labels))
    return with_padding_token(model, tokenizer), params, tokenizer

  def teacher_outputs(self, rows: list[dict], keep: bool = True) -> dict[str, np.ndarray]:
    """The frozen teacher's outputs on the rows: {"teacher_logits": [N, C], "teacher_features": [N, D]}.

    keep: whether to cache them in files, for every epoch, seed, defense and run that reads the same texts.
    """
    length = self.config.data.max_length
    def compute(**options):
      model, params, tokenizer = self.load(results.TEACHER)
      return inference.outputs(model, params, self.encode(tokenizer, rows, length), self.mesh,
                               **self.place.eval_shapes(), **options)
    if keep:
      outputs = teacher_cache.outputs(self.cache / "teacher", self.model_dir(results.TEACHER),
                                      [r["text"] for r in rows], "float32", length,
                                      lambda empty: compute(empty=empty))
    else:
      outputs = dict(zip(teacher_cache.NAMES, compute()))
    return {f"teacher_{name}": values for name, values in outputs.items()}


def start(config: ConfigDict, workdir: str | Path) -> Run:
  """Checks the config and the workdir, and makes or reads the rows. It locks a claimed workdir, but writes no results.

  Raises:
    InputError: a field has a wrong value, the workdir belongs to another config or other data or is locked, a batch
      does not fit the mesh, the data cannot be used, or a defense cannot handle a test text.
  """
  checks.check_fields(config)
  source = source_lib.of(config)
  config = source_lib.with_rates(source.resolve(config))
  mesh = sharding.make_mesh(**config.mesh)
  for stage in filter(config.__contains__, checks.TRAINING):
    sharding.check_batch(config[stage].batch_size, mesh, f"--config.{stage}.batch_size")
  sharding.check_batch(config.data.eval_batch_size, mesh, "--config.data.eval_batch_size")
  workdir = Path(workdir)
  claims.check_config(config, workdir)
  rows = source.read(config)
  checks.check_texts(config, rows["test"])
  run = Run(config, workdir, mesh, claims.config_hash(config), source, rows, {}, claims.inputs(config, rows))
  if (workdir / "config.json").exists():
    claims.check_inputs(run.workdir, run.inputs)
    run.lock()
  return run
