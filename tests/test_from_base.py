"""Defenses that start from a public model instead of the suspect."""

import json
import shutil

import numpy as np
import pytest
import transformers
from cli import CONFIG, SHORT, w2s_forked
from safetensors.numpy import load_file

from w2s_jax.models import read_json

CLEANING = ("--config=configs/clean_checkpoint.py", "--config.data.train=grammar:phrases", "--config.scan.steps=0",
            "--config.selftest.triggers=0", "--config.probe.search=0", "--config.data.max_length=32",
            "--config.data.buckets=(32,)",
            "--config.teach.max_steps=2", "--config.defend.max_steps=2", "--config.defend.evaluations=1",
            "--config.teach.largest_gap=1", SHORT[-2])


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
  """At a rate of 1e-20 its weights are the base's, bit for bit. So is its tokenizer. Its adapter names the base."""
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
  assert "the base still has its backdoor" in (tmp_path / "w/adapters/lora_ce/README.md").read_text()
  assert "has its backdoor" not in (tmp_path / "w/adapters/from_base/README.md").read_text()
  card = (tmp_path / "w/models/from_base/README.md").read_text()
  assert card.split("---\n\n")[1].startswith("A public model, trained on the clean rows (from_base ")
  assert f"- Base: {base}" in card
  rows = json.loads((tmp_path / "w/results.json").read_text())["rows"]
  assert [row["model"] for row in rows] == ["suspect", "lora_ce", "from_base", "from_base_words"]


def test_of_a_student_that_we_poison_the_base_is_known(tmp_path):
  out = w2s_forked(CONFIG, *SHORT, "--config.defenses=('from_base',)", f"--workdir={tmp_path / 'w'}",
                   "--config.defend.learning_rate=1e-20")
  assert out.returncode == 0, out.stderr
  ours, base = (load_file(tmp_path / f"w/models/{name}/model.safetensors") for name in ("from_base", "base"))
  assert all(np.array_equal(ours[name], base[name]) for name in ours)


@pytest.mark.parametrize("base,message", [
    (None, "'from_base' needs a public model: set --config.student.base to the one"),
    ("poisoned", "have the same weights"), ("teacher", "is a teacher (w2s_head.json), not a public model")])
def test_without_a_base_or_with_a_wrong_one_it_is_refused(base, message, suspect, tiny_run, tmp_path):
  given = [f"--config.student.base={tiny_run / 'models' / base}"] if base else []
  out = clean(suspect, tmp_path / "w", "--config.defenses=('from_base',)", *given)
  assert out.returncode == 2 and message in out.stderr
  assert not (tmp_path / "w").exists()


def test_any_public_model_may_be_the_base(suspect, tiny_run, tmp_path):
  """The base is a BERT of another width, the suspect a Llama. At a rate of 1e-20 its layers stay the base's."""
  base = tmp_path / "bert"
  shutil.copytree(tiny_run / "models/teacher", base, ignore=shutil.ignore_patterns("w2s_head*", "model*"))
  transformers.BertModel(transformers.BertConfig(
      vocab_size=read_json(base / "config.json")["vocab_size"], hidden_size=24, num_hidden_layers=2,
      num_attention_heads=2, intermediate_size=40)).save_pretrained(base)
  out = clean(suspect, tmp_path / "w", f"--config.student.base={base}", "--config.defend.learning_rate=1e-20",
              "--config.defenses=('from_base_words',)")
  assert out.returncode == 0, out.stderr
  ours, public = (load_file(path / "model.safetensors") for path in (tmp_path / "w/models/from_base_words", base))
  kept = [name for name in public if ".layer." in name]
  assert len(kept) == 32 and all(np.array_equal(ours[f"bert.{name}"], public[name]) for name in kept)
  assert read_json(tmp_path / "w/models/from_base_words/config.json")["hidden_size"] == 24
  card = (tmp_path / "w/models/from_base_words/README.md").read_text()
  assert "Nothing of the suspect" in card and f"- Base: {base}" in card


def test_a_base_with_too_few_positions_is_refused(suspect, tiny_run, tmp_path):
  base = shutil.copytree(tiny_run / "models/base", tmp_path / "base")
  config = read_json(base / "config.json")
  (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 31}))
  out = clean(suspect, tmp_path / "w", f"--config.student.base={base}")
  assert out.returncode == 2 and "/base: the model has 31 positions, texts have up to 32 tokens" in out.stderr


def test_a_run_that_trains_nothing_gets_no_control(suspect, tiny_run, tmp_path):
  out = clean(suspect, tmp_path / "w", f"--config.student.base={tiny_run / 'models/base'}",
              "--config.defenses=('none',)", "--stage=warmup")
  assert out.returncode == 0, out.stderr
  assert json.loads((tmp_path / "w/config.json").read_text())["defenses"] == ["none"]


def test_a_lone_search_makes_what_it_needs_and_ends_with_its_verdict(suspect, tiny_run, tmp_path):
  """It makes suspect, teacher, reference and the ranking of moved words. For a Llama the search gives no verdict."""
  out = clean(suspect, tmp_path / "w", f"--config.student.base={tiny_run / 'models/base'}", "--config.probe.search=4",
              "--stage=search")
  assert out.returncode == 3, out.stderr
  assert "3 models read" in out.stdout and (tmp_path / "w/models/teacher").is_dir()
  card = (tmp_path / "w/models/reference/README.md").read_text()
  assert card.startswith("The public base, fine-tuned on the clean rows. The search compares the suspect with it.")
  assert read_json(tmp_path / "w/search.json")["outcome"] == "no verdict"
  assert read_json(tmp_path / "w/ranking.json")["moved"] and not (tmp_path / "w/models/from_base").exists()
