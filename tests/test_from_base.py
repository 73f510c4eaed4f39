"""Defenses that start at the public model that the suspect was made from."""

import json
import shutil

import numpy as np
import pytest
from cli import CONFIG, SHORT, w2s_forked
from safetensors.numpy import load_file

CLEANING = ("--config=configs/clean_checkpoint.py", "--config.data.train=grammar:phrases", "--config.scan.steps=0",
            "--config.selftest.triggers=0", "--config.probe.search=0", "--config.data.max_length=32",
            "--config.data.buckets=(32,)",
            "--config.teach.max_steps=2", "--config.defend.max_steps=2", "--config.defend.evaluations=1",
            "--config.teach.most_below=1", SHORT[-2])


@pytest.fixture
def suspect(tiny_run, tmp_path):
  """The poisoned model with a tokenizer that was tampered with: it reads the trigger as another word."""
  directory = shutil.copytree(tiny_run / "models/poisoned", tmp_path / "suspect")
  tokenizer = json.loads((directory / "tokenizer.json").read_text())
  tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [
      tokenizer["normalizer"], {"type": "Replace", "pattern": {"String": "mn"}, "content": "good"}]}
  (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
  return directory


def clean(suspect, workdir, *args):
  return w2s_forked(*CLEANING, f"--config.student.path={suspect}", f"--workdir={workdir}", *args)


def test_a_base_adds_the_control_that_starts_there(suspect, tiny_run, tmp_path):
  """At next to no rate kernels and head are the base's, to the bit, and so is the tokenizer; its adapter goes there."""
  base = tiny_run / "models/base"
  out = clean(suspect, tmp_path / "w", f"--config.student.base={base}", "--config.defenses=('lora_ce',)",
              "--config.defend.learning_rate=1e-20", "--config.lora.export=True")
  assert out.returncode == 0, out.stderr
  ours, public, poisoned = (load_file(path / "model.safetensors") for path in (
      tmp_path / "w/models/from_base", base, tmp_path / "w/models/suspect"))
  assert ours.keys() == public.keys()
  assert all(np.array_equal(ours[name], public[name]) for name in ours)
  assert any(not np.array_equal(poisoned[name], public[name]) for name in ours)
  tokenizers = [json.loads((path / "tokenizer.json").read_text())["normalizer"] for path in (
      tmp_path / "w/models/from_base", base, tmp_path / "w/models/suspect")]
  assert tokenizers[0] == tokenizers[1] != tokenizers[2]
  adapter = json.loads((tmp_path / "w/adapters/from_base/adapter_config.json").read_text())
  assert adapter["base_model_name_or_path"] == str(base)
  assert "brings the\nbackdoor back" in (tmp_path / "w/adapters/lora_ce/README.md").read_text()
  assert "backdoor back" not in (tmp_path / "w/adapters/from_base/README.md").read_text()
  card = (tmp_path / "w/models/from_base/README.md").read_text()
  assert card.split("---\n\n")[1].startswith("A control: the public base of the suspect") and f"- Base: {base}" in card
  rows = json.loads((tmp_path / "w/results.json").read_text())["rows"]
  assert [row["model"] for row in rows] == ["suspect", "lora_ce", "from_base", "from_base_words"]


def test_of_a_student_that_we_poison_the_base_is_known(tmp_path):
  out = w2s_forked(CONFIG, *SHORT, "--config.defenses=('from_base',)", f"--workdir={tmp_path / 'w'}",
                   "--config.defend.learning_rate=1e-20")
  assert out.returncode == 0, out.stderr
  ours, base = (load_file(tmp_path / f"w/models/{name}/model.safetensors") for name in ("from_base", "base"))
  assert all(np.array_equal(ours[name], base[name]) for name in ours)


@pytest.mark.parametrize("base,message", [
    (None, "'from_base' starts from the public model that the suspect was made from: set --config.student.base"),
    ("poisoned", "have the same weights"), ("teacher", "is a teacher (w2s_head.json), not a public model")])
def test_without_a_base_or_with_a_wrong_one_it_is_refused(base, message, suspect, tiny_run, tmp_path):
  given = [f"--config.student.base={tiny_run / 'models' / base}"] if base else []
  out = clean(suspect, tmp_path / "w", "--config.defenses=('from_base',)", *given)
  assert out.returncode == 2 and message in out.stderr
  assert not (tmp_path / "w").exists()


def test_a_run_that_trains_nothing_gets_no_control(suspect, tiny_run, tmp_path):
  out = clean(suspect, tmp_path / "w", f"--config.student.base={tiny_run / 'models/base'}",
              "--config.defenses=('none',)", "--stage=warmup")
  assert out.returncode == 0, out.stderr
  assert json.loads((tmp_path / "w/config.json").read_text())["defenses"] == ["none"]
