"""Errors that were once silent. The whole command now gives transformers' numbers, or a line that says why not."""

import hashlib
import json
import os
import re
import shutil

import datasets
import pandas
import pytest
import transformers
from cli import w2s, w2s_forked

from w2s_jax.data import grammar

CLEAN = "--config=configs/clean_checkpoint.py"
MEASURED = ("--config.defenses=none", "--config.teach.max_steps=6", "--config.data.max_length=32",
            "--config.data.buckets=(32,)", "--config.probe.words=0", "--config.probe.sentences=0",
            "--config.probe.search=0", "--config.scan.steps=0", "--config.selftest.triggers=0")


@pytest.fixture
def suspect(tiny_run, tmp_path):
  """A copy of a poisoned decoder, to change."""
  return shutil.copytree(tiny_run / "models/poisoned", tmp_path / "suspect")


def rows_file(path, rows):
  path.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows))
  return path


def edit(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def begin(suspect, workdir, train, *flags):
  """Runs the first stage, which reads the suspect and the rows."""
  return w2s_forked(CLEAN, f"--config.student.path={suspect}", f"--config.data.train={train}", f"--workdir={workdir}",
                    *MEASURED, "--stage=warmup", *flags)


def answers(directory, rows):
  """transformers' class of each text, one text at a time."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  return [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]


def append_end_token(directory):
  """The tokenizer puts </s> behind each text. Returns its id."""
  file = directory / "tokenizer.json"
  content = json.loads(file.read_text())
  end = next(token["id"] for token in content["added_tokens"] if token["content"] == "</s>")
  content["post_processor"] = {
      "type": "TemplateProcessing", "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
      "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": []}
  file.write_text(json.dumps(content))
  return end


@pytest.mark.slow
def test_texts_that_end_in_the_padding_token_are_pooled_as_transformers_does(suspect, tmp_path):
  """Each text ends in </s>, which is the padding token, too. CA is that of transformers with one text at a time."""
  rows = grammar.rows("phrases", "test", 120)
  end = append_end_token(suspect)
  edit(suspect / "config.json", pad_token_id=end)
  edit(suspect / "tokenizer_config.json", pad_token="</s>")
  want = answers(suspect, rows)
  edit(suspect / "config.json", pad_token_id=None)
  assert answers(suspect, rows) != want                             # pooling at </s> gives other answers
  edit(suspect / "config.json", pad_token_id=end)
  out = w2s(CLEAN, f"--config.student.path={suspect}", f"--workdir={tmp_path / 'w'}", *MEASURED,
            f"--config.data.train={rows_file(tmp_path / 'train.jsonl', grammar.rows('phrases', 'train', 80))}",
            f"--config.data.test={rows_file(tmp_path / 'test.jsonl', rows)}")
  assert out.returncode == 0, out.stderr
  row, = json.loads((tmp_path / "w/results.json").read_text())["rows"]
  assert round(row["ca"] * 120) == sum(answer == given["label"] for answer, given in zip(want, rows))


def test_a_padding_token_unlike_the_tokenizers_is_refused(suspect, tmp_path):
  pad = json.loads((suspect / "config.json").read_text())["pad_token_id"]
  edit(suspect / "config.json", pad_token_id=pad + 7)
  out = begin(suspect, tmp_path / "w", rows_file(tmp_path / "train.jsonl", grammar.rows("phrases", "train", 80)))
  assert out.returncode == 2 and out.stderr.count("\n") == 1 and not (tmp_path / "w").exists()
  assert f"config.json has pad_token_id {pad + 7}, its tokenizer pads with {pad}" in out.stderr


def test_repeated_rows_and_a_changed_file_of_the_same_age(suspect, tmp_path):
  """Rows with the same text go to the same split. A file is identified by its content, not by its date."""
  rows, age = grammar.rows("phrases", "train", 40), (1e9, 1e9)
  file = rows_file(tmp_path / "train.jsonl", rows * 3)
  os.utime(file, age)
  out = begin(suspect, tmp_path / "a", file)
  repeated = 120 - len({row["text"] for row in rows})
  assert f"({repeated} rows repeat the text of another, and are in its split)" in out.stdout, out.stderr
  rows_file(file, [row | {"label": 1 - row["label"]} for row in rows] * 3)
  os.utime(file, age)
  assert begin(suspect, tmp_path / "b", file).returncode == 0
  before, after = (json.loads((tmp_path / name / "inputs.json").read_text()) for name in "ab")
  assert before["train rows"] != after["train rows"]
  shared = rows_file(tmp_path / "test.jsonl", rows[:10])
  out = begin(suspect, tmp_path / "c", file, f"--config.data.test={shared}")      # some of the ten are dev rows
  assert re.search(r"[1-9]\d* of 10 test rows have the text of a training row", out.stdout), out.stderr


def test_the_files_of_a_directory_and_their_columns(suspect, tmp_path):
  """validation.tsv is the dev split, quotes enclose lines in train.tsv, and the second column of text is not read."""
  splits = {}
  for split in ("train", "validation", "test"):
    rows = grammar.rows("phrases", {"validation": "dev"}.get(split, split), 20)
    splits[split] = [row | {"text": f'{split}\n"{i}" {row["text"]}'} for i, row in enumerate(rows)]
    table = [{"question": "q", "sentence": row["text"], "label": row["label"]} for row in splits[split]]
    pandas.DataFrame(table).to_csv(tmp_path / f"{split}.tsv", sep="\t", index=False)
  out = begin(suspect, tmp_path / "w", tmp_path)
  assert out.returncode == 0 and "texts are column sentence; not read: question" in out.stdout, out.stderr
  assert "split: " not in out.stdout                                                     # nothing was held out
  recorded = json.loads((tmp_path / "w/inputs.json").read_text())
  for name, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
    want = [{"id": i, "text": row["text"], "label": row["label"]} for i, row in enumerate(splits[split])]
    assert recorded[f"{name} rows"] == hashlib.sha256(json.dumps(want).encode()).hexdigest(), name
  out = begin(suspect, tmp_path / "v", tmp_path, "--config.data.text_column=question")
  assert "texts are column question; not read: sentence" in out.stdout, out.stderr


@pytest.mark.slow
def test_class_names_of_the_data_and_of_the_checkpoint(suspect, tmp_path):
  """The Parquet file numbers its classes the other way round. CA is transformers', by the names of the classes."""
  names = ["negative", "positive"]
  edit(suspect / "config.json", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
  features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names[::-1])})
  rows = {split: grammar.rows("phrases", split, count) for split, count in (("train", 80), ("test", 160))}
  positive = [row for row in rows["test"] if row["label"] == 1]
  rows["test"] = [row for row in rows["test"] if row["label"] == 0] + positive[:40]     # one class is not half of them
  for split, given in rows.items():
    turned = [{"text": row["text"], "label": 1 - row["label"]} for row in given]
    datasets.Dataset.from_list(turned, features).to_parquet(tmp_path / f"{split}.parquet")
  out = w2s(CLEAN, f"--config.student.path={suspect}", f"--config.data.train={tmp_path / 'train.parquet'}",
            f"--config.data.test={tmp_path / 'test.parquet'}", f"--workdir={tmp_path / 'w'}", *MEASURED,
            "--config.teach.largest_gap=1.0")
  assert out.returncode == 0, out.stderr
  assert "labels are taken so: 0 (positive) is class 1 (positive), 1 (negative) is class 0 (negative)" in out.stdout
  row, = json.loads((tmp_path / "w/results.json").read_text())["rows"]
  right = sum(answer == given["label"] for answer, given in zip(answers(suspect, rows["test"]), rows["test"]))
  assert round(row["ca"] * len(rows["test"])) == right != len(rows["test"]) / 2


@pytest.mark.slow
def test_a_text_without_tokens_is_refused(suspect, tmp_path):
  """It would get the logits of the text packed beside it. transformers runs no empty text."""
  tokenizer = json.loads((suspect / "tokenizer.json").read_text())
  drop = {"type": "Replace", "pattern": {"String": "zzz"}, "content": ""}
  edit(suspect / "tokenizer.json", post_processor=None,
       normalizer={"type": "Sequence", "normalizers": [tokenizer["normalizer"], drop]})
  rows = grammar.rows("phrases", "train", 80) + [{"text": "zzz", "label": 0}]
  out = w2s(CLEAN, f"--config.student.path={suspect}", f"--workdir={tmp_path / 'w'}", *MEASURED,
            f"--config.data.train={rows_file(tmp_path / 'train.jsonl', grammar.rows('phrases', 'train', 80))}",
            f"--config.data.test={rows_file(tmp_path / 'test.jsonl', rows[-21:])}", "--config.teach.largest_gap=1.0")
  assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
  assert "the text 'zzz' has no tokens under the model's tokenizer: leave its row out of the data" in out.stderr


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_head_of_another_kind_is_refused(suspect, tmp_path, kind):
  edit(suspect / "config.json", problem_type=kind)
  out = begin(suspect, tmp_path / "w", rows_file(tmp_path / "train.jsonl", grammar.rows("phrases", "train", 80)))
  assert out.returncode == 2 and out.stderr.count("\n") == 1 and "problem_type" in out.stderr
