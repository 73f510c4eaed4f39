"""Defenses that start at the public model that the suspect was made from."""

import json

import numpy as np
from cli import SHORT, w2s_forked
from safetensors.numpy import load_file

CLEANING = ("--config=configs/clean_checkpoint.py", "--config.data.train=grammar:phrases", "--config.scan.steps=0",
            "--config.selftest.triggers=0",
            "--config.data.max_length=32", "--config.data.buckets=(32,)", "--config.teach.max_steps=2",
            "--config.defend.max_steps=2", "--config.defend.evaluations=1", "--config.teach.most_below=1", SHORT[-2])


def clean(tiny_run, workdir, *args):
  return w2s_forked(*CLEANING, f"--config.student.path={tiny_run / 'models/poisoned'}", f"--workdir={workdir}", *args)


def test_a_base_adds_the_control_that_starts_there(tiny_run, tmp_path):
  """At next to no rate its kernels and its head are the base's, to the bit; its adapter goes onto the base."""
  base = tiny_run / "models/base"
  out = clean(tiny_run, tmp_path / "w", f"--config.student.base={base}", "--config.defenses=('none',)",
              "--config.defend.learning_rate=1e-20", "--config.lora.export=True")
  assert out.returncode == 0, out.stderr
  assert "the suspect's base is known: defenses also has 'from_base'" in out.stdout + out.stderr
  ours, public, suspect = (load_file(path / "model.safetensors") for path in (
      tmp_path / "w/models/from_base", base, tmp_path / "w/models/suspect"))
  assert ours.keys() == public.keys()
  assert all(np.array_equal(ours[name], public[name]) for name in ours)
  assert any(not np.array_equal(suspect[name], public[name]) for name in ours)
  adapter = json.loads((tmp_path / "w/adapters/from_base/adapter_config.json").read_text())
  assert adapter["base_model_name_or_path"] == str(base)
  rows = json.loads((tmp_path / "w/results.json").read_text())["rows"]
  assert [row["model"] for row in rows] == ["suspect", "from_base"]


def test_without_a_base_or_with_another_network_it_is_refused(tiny_run, tmp_path):
  asked = "--config.defenses=('from_base',)"
  out = clean(tiny_run, tmp_path / "w", asked)
  assert out.returncode == 2 and "'from_base' starts at the public model" in out.stdout + out.stderr
  assert "set --config.student.base" in out.stdout + out.stderr
  out = clean(tiny_run, tmp_path / "w", asked, f"--config.student.base={tiny_run / 'models/teacher'}")
  assert out.returncode == 2 and "is not what the suspect was made from" in out.stdout + out.stderr
  assert not (tmp_path / "w").exists()
