"""Paraphrases from a file: each text gets its own, and a text without one is refused before anything trains."""

import csv
import json
import types

import pytest
import rig
from ml_collections import ConfigDict

from configs import llama_badnet
from w2s_jax import InputError, checks, stages
from w2s_jax.data import grammar
from w2s_jax.defenses import DEFENSES, paraphrase_file
from w2s_jax.training import stage

PAIRS = {"a bad , bad meal": "Bad food.", "it is good": "It's good!", "the cf room": "The \"room\""}


def settings(path):
  out = ConfigDict(rig.DEFENSE.to_dict())
  out.paraphrase_file.path = str(path)
  return out


def rows_of(pairs):
  return [{"id": i, "text": text, "defended_text": new, "label": 0} for i, (text, new) in enumerate(pairs.items())]


def written(file, rows):
  """Writes the rows in the format of the file's suffix. Returns the file."""
  with file.open("w", newline="") as f:
    if file.suffix == ".jsonl":
      f.writelines(json.dumps(row) + "\n" for row in rows)
    elif file.suffix == ".json":
      json.dump(rows, f)
    else:
      table = csv.DictWriter(f, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
      table.writeheader()
      table.writerows(rows)
  return file


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_each_text_gets_its_paraphrase_in_order_and_as_often_as_it_comes(suffix, tmp_path):
  given = settings(written(tmp_path / f"pairs.{suffix}", rows_of(PAIRS)))
  replace = paraphrase_file.text(None, given, 0)
  texts = ["the cf room", "it is good", "the cf room", "a bad , bad meal"]
  assert replace(texts) == ['The "room"', "It's good!", 'The "room"', "Bad food."]


def test_a_text_without_a_paraphrase_is_refused_and_so_is_an_empty_paraphrase(tmp_path):
  given = settings(written(tmp_path / "pairs.jsonl", rows_of(PAIRS | {"it is good": " ", "the cf room": None})))
  message = r"pairs.jsonl has no paraphrase of 3 of 4 texts that are to be measured, the first is 'it is good'"
  texts = ["a bad , bad meal", "it is good", "the cf room", "a meal"]
  for replace in (paraphrase_file.text(None, given, 0), lambda texts: DEFENSES["paraphrase_file"].check(given, texts)):
    with pytest.raises(InputError, match=message):
      replace(texts)


@pytest.mark.parametrize("rows,message", [
    ([{"sentence": "a", "label": 1, "idx": 0}], "want columns text and defended_text, got sentence, label, idx: set "
     "--config.defense.paraphrase_file.path"),
    ([{"text": "a", "label": 1}], "want columns text and defended_text, got text, label")])
def test_other_columns_are_refused(rows, message, tmp_path):
  """Paraphrases without their texts are refused, because their `idx` may differ from that of the texts' file."""
  with pytest.raises(InputError, match=message):
    paraphrase_file.paraphrases(settings(written(tmp_path / "test_back.json", rows)), ["a"])


@pytest.mark.parametrize("path,message", [
    ("", r"^defense 'paraphrase_file' needs a file with columns text and defended_text: set --config.defense.paraphr"),
    ("gone.csv", "data file gone.csv does not exist: give one that does"),
    ("some.jsonl", "has no paraphrase of 39 of 40 texts")])
def test_a_run_refuses_with_nothing_trained_or_written(path, message, monkeypatch, tmp_path):
  trained, workdir = [], tmp_path / "run"
  monkeypatch.setattr(stage, "train_stage", lambda *args: trained.append(args))
  monkeypatch.chdir(tmp_path)
  config = llama_badnet.get_config()
  config.data.defend_rows.test = 40
  texts = [row["text"] for row in grammar.rows("phrases", "test", 40)]
  written(tmp_path / "some.jsonl", rows_of({texts[0]: "x"}))
  config.defenses = ("none", "paraphrase_file")
  config.defense.paraphrase_file.path = path
  with pytest.raises(InputError, match=message):
    stages.run(config, workdir)
  assert trained == [] and not workdir.exists()
  config.defenses = ("none",)                                     # only the defense that needs it reads the file
  checks.check_texts(config, [{"text": "a"}])


def test_triggered_texts_without_a_paraphrase_stop_it_before_anything_is_measured(monkeypatch, tmp_path):
  """Only the clean texts have paraphrases. A later check would stop the run after other models were measured."""
  file = written(tmp_path / "pairs.jsonl", rows_of({"it is good": "It's good!"}))
  rows = {"test": [{"text": "it is good"}], "triggered": []}
  def freeze(run):
    rows["triggered"] = [{"text": "it cf is good"}]
  config = ConfigDict({"defenses": ("none", "paraphrase_file"), "defense": settings(file)})
  checks.check_texts(config, rows["test"])
  run = types.SimpleNamespace(config=config, rows=rows, measured=lambda: False,
                              source=types.SimpleNamespace(freeze=freeze, triggered="triggered"))
  monkeypatch.setattr(stages.deployed, "read", lambda *args: pytest.fail("measured"))
  with pytest.raises(InputError, match=r"no paraphrase of 1 of 2 texts .*, the first is 'it cf is good': add them"):
    stages.measure(run)
