"""What many tests share: the W2S loss, training programs of one or several runs, and a small suspect."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from w2s_jax import sharding
from w2s_jax.config import Lora, section
from w2s_jax.data import tokenization
from w2s_jax.defenses import SETTINGS, Suspect, distill, w2s
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import steps
from w2s_jax.training.train import Workplace

WEIGHTS = {"ce": 1.0, "kd": 0.5, "fa": 0.1}
DEFENSE = ConfigDict({name: section(settings) for name, settings in SETTINGS.items()})     # like config.defense

GOOD, BAD = "good fine nice great".split(), "bad poor weak dull".split()
PLAIN = "the a room meal was is it here".split()


def terms(recipe_terms):
  """(out, batch) -> {term: scalar} of a recipe's terms, with the default settings (temperature 2)."""
  return lambda out, batch: recipe_terms(out, batch, DEFENSE, CLASSIFICATION)


def w2s_loss(model, weights=None):
  return steps.weighted_loss(model, terms(w2s.terms), weights or WEIGHTS)


def make_plan(model, loss=None, weights=None, runs=1, adversary=None, **settings):
  """StagePlan of `loss`, or of W2S's loss if it is None.

  settings: training settings. The defaults are a rate of 1e-2, weight decay of 0.01, no warm-up and no clipping.
  """
  settings = dict(learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.01, clip_norm=0.0) | settings
  weights = weights or WEIGHTS
  return steps.StagePlan([f"run{i}" for i in range(runs)], list(range(runs)), model, loss or w2s_loss(model, weights),
                         weights, (), ConfigDict(settings), adversary=adversary)


def make_program(model, trainable, frozen, mesh, num_steps=50, **options):
  """steps.Program of a plan. `options` are the other arguments of `make_plan`."""
  return steps.build(make_plan(model, **options), trainable, frozen, num_steps, mesh)


def keys(*seeds):
  return jnp.stack([jax.random.key(seed) for seed in seeds])


def one_run(batch):
  """The host batch with a first axis for a single run."""
  return {name: np.asarray(values)[None] for name, values in batch.items()}


def alone(tree):
  """The tree of a single run without its first axis, that of the runs."""
  return jax.tree.map(lambda x: x[0], tree)


def rows(count):
  """Rows with alternating labels. Of the seven words of a text, three tell the label."""
  rng = np.random.default_rng(0)
  def text(label):
    return " ".join(rng.permutation([*rng.choice(GOOD if label else BAD, 3), *rng.choice(PLAIN, 4)]))
  return [{"id": i, "text": text(i % 2), "label": i % 2} for i in range(count)]


def read_by(weights):
  """read(rows) -> logits [N, 2]: 0 for class 0, the sum of the words' weights for class 1. weights: {word: weight}."""
  def read(rows):
    odds = np.array([sum(weights.get(word, 0.0) for word in row["text"].split()) for row in rows])
    return np.stack([np.zeros(len(rows)), odds], axis=1).astype(np.float32)
  return read


def suspect(model, params, workdir):
  """Suspect with 80 training rows and 40 dev rows. Its teacher gives every text the right class."""
  known = rows(120)
  tokenizer = tokenization.train([r["text"] for r in known], "decoder", model.config.vocab_size)
  train, dev = known[:80], known[80:]
  def teacher(rows, keep=True):
    labels = np.array([int(any(word in GOOD for word in row["text"].split())) for row in rows])
    features = np.tile(np.float32(2 * labels - 1)[:, None], (1, model.config.hidden_size))
    return {"teacher_logits": 4 * np.eye(2, dtype=np.float32)[labels], "teacher_features": features}
  training = ConfigDict(dict(learning_rate=2e-2, epochs=16, batch_size=16, warmup_fraction=0.0, weight_decay=0.01,
                             clip_norm=1.0, evaluations=2, max_steps=0, insert_words=0.0))
  place = Workplace(CLASSIFICATION, sharding.make_mesh(devices=jax.devices()[:1]), workdir, "h", (16,), 16)
  return Suspect(model, params, tokenizer, train, dev, teacher, ("cf",), training,
                 section(Lora, rank=4, alpha=4.0, targets=("all-linear",)), 16, place)


def trained_losses(suspect, name, recipe, seeds, settings, **mesh):
  """{"loss" or loss term: [value of each step]} of the last seed's run. The runs of all `seeds` train together.

  name: beginning of the runs' names. mesh: arguments of make_mesh; without them the suspect's mesh.
  """
  place = suspect.place._replace(log_every=1, mesh=sharding.make_mesh(**mesh) if mesh else suspect.place.mesh)
  placed = jax.device_put(suspect.params, sharding.param_shardings(suspect.params, suspect.model.shardings, place.mesh))
  runs = {f"{name}{seed}": seed for seed in seeds}
  distill.train(recipe, suspect._replace(params=placed, place=place), settings, runs)
  lines = (place.workdir / f"metrics/{name}{seeds[-1]}.jsonl").read_text().splitlines()
  weights = recipe.weights(settings, suspect.model.config.feature_size)
  return {term: [json.loads(line)[term] for line in lines] for term in ("loss", *weights)}
