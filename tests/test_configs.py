"""Every config, at every size it offers, fits its labels and sharding rules; nothing is allocated."""

import ast
import re
import runpy
from pathlib import Path

import jax
import pytest
from conftest import ELECTRA
from flax import traverse_util

from w2s_jax import InputError, sharding
from w2s_jax.adapters import trees
from w2s_jax.attacks import ATTACKS
from w2s_jax.defenses import DEFENSES, w2s
from w2s_jax.models import Model, config_from_hf
from w2s_jax.planning import abstract
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import stage

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(f.stem for f in (ROOT / "configs").glob("*_*.py")      # clean_checkpoint has no shape
               if f.stem != "clean_checkpoint" and not f.stem.startswith("grid_"))
SCALES = {"llama": ("1b", "8b", "70b"), "vicuna": ("7b", "8b", "13b"), "qwen": ("1b", "7b", "8b", "70b"), "minilm": (),
          "smollm": ()}


def config(name, arg=None):
  return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](arg)


def variants():
  for name in FILES:
    offline = [] if name.startswith(("minilm", "smollm")) else [None]
    data = ",data=D" if name == "llama_synattack" else ""
    scales = (f"scale={s}{data}" for s in SCALES[name.split("_")[0]])
    cpu = ["data=D,device=cpu"] if name.startswith("smollm") else []
    yield from ((name, arg) for arg in [*offline, "data=D", *cpu, *scales])


def unchanged(step, state, frozen, batch):
  """The metric names of an abstract step. Asserts that the step keeps every shape and dtype of its state."""
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  after, metrics = jax.eval_shape(step, state, frozen, batch, keys)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert all(value.shape == (1,) for value in metrics.values())
  return set(metrics)


@pytest.mark.parametrize("name,arg", list(variants()))
def test_abstract_evaluation(name, arg):
  """Labels and rules cover every leaf on 2 x 2 x 2 devices; every stage's step keeps every shape."""
  c = config(name, arg)
  model, mesh = abstract.student(c), sharding.make_mesh(2, 2, 2)
  assert c.attack.name in ATTACKS and set(c.defenses) <= set(DEFENSES)
  B, T = c.defend.batch_size, c.data.max_length
  plan, params = abstract.defense_plan("w2s", c, model)
  step, state, frozen = abstract.training_step(plan, params, mesh)
  assert set(jax.tree.leaves(trees.label_tree(state.params))) == {"adapter", "head"}
  assert not {"adapter", "head"} & set(jax.tree.leaves(trees.label_tree(frozen)))
  batch = abstract.training_batch(plan, CLASSIFICATION, B, T, True)
  assert unchanged(step, state, frozen, batch) == {"loss", "ce", "kd", "fa", "grad_norm"}

  teacher = Model(config_from_hf(c.teacher.arch.to_dict(), feature_width=model.config.feature_size))
  ids = jax.ShapeDtypeStruct((B, T), "int32")
  out = jax.eval_shape(teacher.apply, teacher.abstract_params(), ids, ids)
  assert out.features.shape == (B, model.config.feature_size) and out.logits.shape == (B, c.data.num_labels)
  assert set(c.poison.trains) <= set(trees.FULL) and "head" in c.poison.trains
  for network, settings, labels in ((teacher, c.teach, trees.FULL), (model, c.poison, tuple(c.poison.trains))):
    plan = stage.task_plan(CLASSIFICATION, "stage", 0, network, labels, settings)
    step, state, fixed = abstract.training_step(plan, network.abstract_params(), mesh)
    assert set(jax.tree.leaves(trees.label_tree(state.params))) == set(labels)
    batch = abstract.training_batch(plan, CLASSIFICATION, B, T, False)
    assert unchanged(step, state, fixed, batch) == {"loss", "ce", "grad_norm"}


def test_soft_tokens_are_planned_as_wide_as_the_vocabulary():
  """ELECTRA's embeddings are narrower than its layers."""
  c = config("llama_badnet")
  c.lora.targets = ("all-linear",)
  _, params = abstract.defense_plan("w2s_adv", c, Model(ELECTRA))
  words = params["embeddings"]["word_embeddings"]
  assert words["soft"].shape == (DEFENSES["w2s_adv"].recipe.soft_tokens(c.defense), 16)
  assert words["embedding"].shape == (64, 16) and params["embeddings_project"]["kernel"].shape == (16, 32)


def parameters(model):
  return sum(x.size for x in jax.tree.leaves(model.abstract_params()))


def test_sizes_are_the_published_ones():
  """A classifier has no output layer, so Llama-3-8B has 8.03e9 - 0.525e9, Vicuna-7B 6.74e9 - 0.131e9, and so on."""
  def size(name, arg):
    return parameters(abstract.student(config(name, arg)))
  assert abs(size("llama_badnet", "scale=8b") - 7.505e9) < 1e7
  assert abs(size("llama_badnet", "scale=70b") - 69.5e9) < 1e8
  assert abs(size("vicuna_badnet", "scale=8b") - 6.607e9) < 1e7
  assert abs(size("qwen_badnet", "scale=8b") - 7.07e9) < 1e7
  assert 2.5e6 < size("llama_badnet", "data=D") < 4e6
  assert abs(size("minilm_badnet", "data=D") - 22.7e6) < 1e5
  assert abs(size("smollm_badnet", "data=D") - 134.5e6) < 1e5


@pytest.mark.parametrize("name,attack,weights", [
    ("llama_badnet", "badnet", (5.0, 0.001, 0.001)), ("llama_insent", "insent", (3.0, 0.01, 0.001)),
    ("llama_synattack", "syntactic", (1.0, 0.035, 0.002)), ("vicuna_badnet", "badnet", (5.0, 0.001, 0.001))])
def test_the_released_recipe(name, attack, weights):
  c = config(name, "scale=8b,data=D")
  assert c.attack.name == attack and c.attack.target_label == 0 and c.attack.poison_count == 1000
  assert (c.lora.rank, c.lora.alpha, c.lora.dropout, tuple(c.lora.targets)) == (512, 512, 0.1, ("q_proj", "v_proj"))
  assert (c.defend.learning_rate, c.defend.batch_size, c.defend.epochs, c.defend.weight_decay) == (2e-4, 32, 5, 0.01)
  assert (c.poison.learning_rate, c.poison.batch_size, c.poison.epochs, c.poison.clip_norm) == (2e-5, 64, 5, 1.0)
  assert (c.teach.learning_rate, c.teach.batch_size, c.teach.epochs, c.teach.warmup_fraction) == (2e-5, 32, 5, 0.06)
  assert c.data.max_length == c.data.attack_max_length == 128 and c.defense.w2s.temperature == 2.0
  assert w2s.loss_weights(c.defense.w2s.weights, 4096) == dict(zip(("ce", "kd", "fa"), weights))
  adapters, _ = trees.split(abstract.adapted(c, abstract.student(c).abstract_params()), ("adapter",))
  if name.startswith("llama"):
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 218_103_808      # the released run's ~218M


def test_real_data_paths_and_paraphrases():
  c = config("llama_synattack", "data=/d")
  assert (c.data.attack_source, c.data.defend_source) == ("/d/imdb", "/d/sst2")
  assert c.attack.paraphrases[1] == ("/d/sst2/test.json", "/d/sst2/test_syntactic.json")
  assert config("llama_synattack").attack.name == "syn_template"


def test_one_offline_setting_for_every_attack():
  """The three offline configs differ in the attack's name alone."""
  flat = [traverse_util.flatten_dict(config(f"llama_{a}").to_dict(), sep=".")
          for a in ("badnet", "insent", "synattack")]
  for other in flat[1:]:
    assert {k for k in flat[0] if flat[0][k] != other[k]} == {"attack.name"}


def difference(one, other):
  flat = [traverse_util.flatten_dict(config(*x).to_dict(), sep=".") for x in (one, other)]
  return {k for k in flat[0].keys() | flat[1].keys() if flat[0].get(k) != flat[1].get(k)}


def test_experiments_of_a_kind_differ_in_what_they_are_named_for():
  """Each file spells out its values, so the same values are in several files."""
  minilm = ("minilm_badnet", "data=D")
  assert difference(minilm, ("minilm_insent", "data=D")) == {"attack.name"}
  assert difference(minilm, ("minilm_synattack", "data=D")) == {"attack.name", "attack.paraphrases"}
  smollm = ("smollm_badnet", "data=D")
  assert difference(smollm, ("smollm_insent", "data=D")) == {"attack.name"}
  assert difference(smollm, ("smollm_synattack", "data=D")) == {"attack.name", "attack.paraphrases"}
  assert difference(("llama_badnet", None), ("qwen_badnet", None)) == {"student.arch.model_type"}
  assert difference(("llama_badnet", None), ("vicuna_badnet", None)) == {"student.arch.num_key_value_heads"}


@pytest.mark.parametrize("name", [*FILES, "clean_checkpoint"])
def test_a_docstring_has_the_command_and_numbers_that_are_in_the_results(name):
  doc = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
  commands = re.findall(r"^ +python -m w2s_jax.main --config=configs/(\w+)\.py(?::(\S+))?", doc, re.M)
  assert commands and {file for file, _ in commands} == {name}
  for _, arg in commands:
    config(name, arg or None)
  pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
  results = "".join(page.read_text() for page in pages)
  rows = re.findall(r"^  (\w+) +(0\.\d+ ± 0\.\d+) +([01]\.\d+ ± 0\.\d+)", doc, re.M)
  assert len(rows) >= 4 or "Expected: not known" in doc
  for model, ca, asr in rows:
    assert f"| {model} | {ca} | {asr} |" in results.replace("**", ""), model
  for number in re.findall(r"\d\.\d{3}|\d+ minutes|\w+ to \w+ minutes", doc):
    assert number in results, number


def test_two_directories_of_ones_own():
  c = config("llama_badnet", "data=/d,attack=ag,defend=emotion,labels=4")
  assert (c.data.attack_source, c.data.defend_source, c.data.num_labels) == ("/d/ag", "/d/emotion", 4)
  assert difference(("llama_badnet", "data=/d"), ("llama_badnet", "data=/d,attack=imdb,defend=sst2,labels=2")) == set()
  c = config("minilm_synattack", "data=/d,attack=a")
  assert c.attack.paraphrases[0] == ("/d/a/train.json", "/d/a/train_syntactic_1000.json")


@pytest.mark.parametrize("name,arg,message", [
    ("llama_badnet", "size=8b", "want NAME=VALUE with NAME among data, scale"),
    ("llama_badnet", "scale", "config argument 'scale'"),
    ("llama_badnet", "scale=9b", "want one of 1b, 8b, 70b"),
    ("llama_synattack", "scale=8b", "give scale=...,data=DIR"),
    ("clean_checkpoint", "scale=8b", "this config takes no argument"),
    ("llama_badnet", "attack=ag", r"attack=...: it needs data=DIR"),
    ("llama_badnet", "data=D,labels=many", "'many' is not int"),
    ("minilm_badnet", None, "needs real data"),
    ("smollm_insent", "data=D,device=tpu", "'tpu': want one of accelerator, cpu"),
    ("minilm_badnet", "scale=8b", "NAME among data")])
def test_arguments_that_are_refused(name, arg, message):
  with pytest.raises(InputError, match=message):
    config(name, arg)


def test_arguments_are_typed():
  parse = runpy.run_path(str(ROOT / "configs/common.py"))["parse_arg"]
  assert parse("a=3,b=x,c=0.5", a=int, b=str, c=float) == {"a": 3, "b": "x", "c": 0.5} and parse(None, a=int) == {}
  with pytest.raises(InputError, match="'x' is not int"):
    parse("a=x", a=int)
