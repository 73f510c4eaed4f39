"""What stages and their checks decide, on answers written by hand."""

import types

import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict

from w2s_jax import InputError, checks, source, stages
from w2s_jax.tasks import CLASSIFICATION


def run_of(teacher, student, rows, **teach):
  """A run whose teacher classifies `teacher` of `rows` dev rows correctly, and whose attacked model `student`."""
  right = {"teacher": teacher, "suspect": student}
  return types.SimpleNamespace(
      config=ConfigDict({"teach": {"largest_gap": 0.1} | teach, "data": {"num_labels": 2}}), task=CLASSIFICATION,
      rows={"dev": [None] * rows},
      source=types.SimpleNamespace(attacked="suspect"), labels=lambda split: np.ones(rows, int),
      load=lambda name: (np.arange(rows) < right[name], None, None))


@pytest.fixture(autouse=True)
def answers(monkeypatch):
  monkeypatch.setattr(checks.deployed, "answers", lambda run, deployed, rows: deployed.model.astype(int))


def test_a_teacher_clearly_below_the_suspect_stops_the_run():
  with pytest.raises(InputError, match=r"teacher answers 100 of 200 dev rows rightly, .* 174\. .*teacher.path=DIR"):
    checks.refuse_weak_teacher(run_of(100, 174, 200))


@pytest.mark.parametrize("teacher,student,rows,largest_gap", [
    (160, 174, 200, 0.1),       # a little below
    (180, 140, 200, 0.1),       # above: the usual case offline
    (7, 9, 10, 0.1),            # ten rows do not tell
    (100, 174, 200, 1.0)])
def test_any_other_teacher_does_not_stop_the_run(teacher, student, rows, largest_gap):
  checks.refuse_weak_teacher(run_of(teacher, student, rows, largest_gap=largest_gap))


@pytest.mark.parametrize("config,given,rate", [
    (None, 0.0, 1e-3), (("bert", {"hidden_size": 384}), 0.0, 2e-4), (("bert", {"hidden_size": 768}), 0.0, 5e-5),
    (("distilbert", {"dim": 384}), 0.0, 2e-4), (("bert", {"hidden_size": 384}), 0.01, 0.01)])
def test_a_teachers_rate_goes_by_its_kind_and_width(config, given, rate, tmp_path):
  if config:
    transformers.AutoConfig.for_model(config[0], **config[1]).save_pretrained(tmp_path)
  teacher = ConfigDict({"teach": {"learning_rate": given}, "teacher": {"path": str(tmp_path) if config else ""},
                        "defend": {"learning_rate": 1.0}, "student": {}, "data": {"num_labels": 2}})
  assert source.with_rates(teacher).teach.learning_rate == rate and teacher.teach.learning_rate == given


@pytest.mark.parametrize("config,given,rate", [
    (("llama", {"hidden_size": 64, "num_attention_heads": 4}), 0.0, 2e-3), (("bert", {"hidden_size": 384}), 0.0, 1e-3),
    (("bert", {"hidden_size": 132}), 0.0, 1e-3), (("distilbert", {"dim": 768}), 0.0, 5e-4),
    (("bert", {"hidden_size": 516}), 0.0, 5e-4), (("gpt2", {"n_embd": 768}), 0.0, 5e-4),
    (("llama", {"hidden_size": 4096}), 0.0, 2e-4), (("llama", {"hidden_size": 4096}), 0.3, 0.3)])
def test_a_students_rate_goes_by_its_width(config, given, rate, tmp_path):
  hf = transformers.AutoConfig.for_model(config[0], **config[1])
  hf.save_pretrained(tmp_path)
  defend, data = {"learning_rate": given}, {"num_labels": 2}
  loaded = ConfigDict({"teach": {"learning_rate": 1.0}, "teacher": {"path": ""}, "defend": defend, "data": data,
                       "student": {"path": str(tmp_path), "base": ""}})
  assert source.with_rates(loaded).defend.learning_rate == rate and loaded.defend.learning_rate == given


@pytest.mark.parametrize("defenses,asked", [
    (("lora_ce", "prune", "ce_adv", "full_ft", "from_base", "from_base_words"), False), (("lora_ce", "w2s"), True),
    (("w2s_full",), True), (("w2s_words",), True)])
def test_only_a_defense_that_learns_from_the_teacher_asks_for_it(defenses, asked, monkeypatch):
  class Asked(Exception):
    pass
  def refuse(run):
    raise Asked
  monkeypatch.setattr(checks, "refuse_weak_teacher", refuse)
  monkeypatch.setattr(stages.distill, "cleaned", lambda defense, suspect, settings, runs: [None] * len(runs))
  monkeypatch.setattr(stages, "_save_defended", lambda run, name, *args: saved.append(name))
  saved = []
  run = types.SimpleNamespace(config=ConfigDict({"defenses": defenses, "defense": {}}), runs_of=lambda name: {name: 0},
                              done=lambda name: False, suspect=lambda defense: None)
  if asked:
    with pytest.raises(Asked):
      stages.defend(run)
  else:
    stages.defend(run)
  assert saved == ([] if asked else list(defenses))


@pytest.mark.parametrize("config,only,message", [
    ({"student": {}}, "scan", "this config has no stage 'scan': want --stage among warmup, poison, teach"),
    ({"probe": {"search": 0}}, "poison", "this config has no stage 'poison': want --stage among warmup, scan"),
    ({"probe": {"search": 0}}, "search", "set --config.probe.search to more than 0")])
def test_a_wrong_stage_is_refused_before_anything_is_read(config, only, message, tmp_path):
  """These configs lack every other field, so reading anything else would raise another error."""
  with pytest.raises(InputError, match=message):
    stages.run(ConfigDict(config), tmp_path, only)
