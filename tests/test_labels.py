"""Which class a label means, which rows are read, and which are kept apart."""

import codecs
import os

import datasets
import pandas
import pytest
import tokenizers

from w2s_jax import InputError
from w2s_jax.data import corpora, files, labels, tokenization

STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")


@pytest.mark.parametrize("values,names,want", [
    ([1, 0, 0], ("1", "0"), [0, 1, 1]),                                    # a name wins over a number
    ([1.0, 0.0], ("1", "0"), [0, 1]),
    (["1", "0"], ("1", "0"), [0, 1]),
    ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
    ([0, 1], ("-1", "0", "1"), [1, 2]),
    ([5, 1, 3], STARS, [4, 0, 2]),
    ([4, 0, 3], STARS, [4, 0, 3]),                                         # 0 names no star, so all are numbers
    (["NEGATIVE", "positive"], ("negative", "positive"), [0, 1]),
    (["not_toxic", "Toxic"], ("toxic", "not toxic"), [1, 0]),
    (["a", "A"], ("A", "a"), [1, 0]),                                      # case tells them apart
    ([True, False], (), [1, 0]),
    ([True, False], ("spam", "ham"), [1, 0]),
    (["True", "false"], (), [1, 0]),
    ([labels.Named(0, "positive"), labels.Named(1, "negative")], ("negative", "positive"), [1, 0]),
    ([labels.Named(0, "pos"), labels.Named(1, "neg")], ("negative", "positive"), [0, 1]),
    ([labels.Named(1, "b")], (), [1]),
    ([labels.Named(0, "positive"), labels.Named(1, "negative"), 0], ("negative", "positive"), [1, 0, 1]),
    ([True, False], ("True", "False"), [0, 1]),                            # as the text True is
    (["True", "False"], ("True", "False"), [0, 1]),
    (["1.0", "0.0"], ("1", "0"), [0, 1]),
    (["LABEL_1", "LABEL_0"], ("1", "0"), [1, 0]),                          # transformers' own name of class 1
    ([None, "anger", "joy"], ("none", "anger", "joy"), [None, 1, 2]),
    (["topic 1", "topic 2"], ("version 2", "version 1"), [None, None])])
def test_names_come_before_numbers(values, names, want):
  assert labels.classes(values, len(names) or 2, names, "x") == want


def test_one_rule_holds_for_all_splits(tmp_path):
  """The train labels 0 to 4 can only be numbers, so the test labels 1 and 2 are numbers too, not stars."""
  pandas.DataFrame({"text": [f"t{i}" for i in range(50)], "label": [i % 5 for i in range(50)]}).to_csv(
      tmp_path / "train.csv")
  pandas.DataFrame({"text": ["a", "b"], "label": [1, 2]}).to_csv(tmp_path / "test.csv")
  out = corpora.load_clean({"train": str(tmp_path), "dev": "", "test": ""}, 5, 0, names=STARS)
  assert [row["label"] for row in out["test"]] == [1, 2]


def test_how_labels_were_taken_is_said(caplog):
  caplog.set_level("INFO")
  labels.classes([0, 1], 2, ("negative", "positive"), "x")
  assert not caplog.text
  labels.classes([labels.Named(0, "positive"), labels.Named(1, "negative")], 2, ("negative", "positive"), "mine")
  assert ("mine: labels are taken so: 0 (positive) is class 1 (positive), 1 (negative) is class 0 (negative)"
          in caplog.text)
  labels.classes([labels.Named(0, "pos"), labels.Named(1, "neg")], 2, ("negative", "positive"), "other")
  assert "other: its classes are called pos, neg, not negative, positive: labels are taken by number" in caplog.text
  assert "--config.data.class_names" in caplog.text


def test_names_that_are_partly_the_same_in_another_order_are_refused():
  with pytest.raises(InputError, match="called positive, neg, not negative, positive; only some .*class_names"):
    labels.classes([labels.Named(0, "positive"), labels.Named(1, "neg")], 2, ("negative", "positive"), "x")


@pytest.mark.parametrize("names", [("a",), ("a", "A"), ("a", "b", "c")])
def test_names_by_hand_that_cannot_be(names):
  with pytest.raises(InputError, match=r"want 2 different ones.*--config.data.class_names"):
    labels.check_names(names, 2)
  assert labels.check_names((1, 0), 2) == ("1", "0")


def test_names_of_a_parquet_file(tmp_path):
  features = datasets.Features({"text": datasets.Value("string"),
                                "label": datasets.ClassLabel(names=["positive", "negative"])})
  rows = {"text": ["good", "bad", "unknown"], "label": [0, 1, -1]}
  datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
  read = files.read_file(tmp_path / "train.parquet")
  assert [row["label"] for row in read] == [labels.Named(0, "positive"), labels.Named(1, "negative"), -1]
  assert corpora.class_names(read, 2) == ("positive", "negative") and corpora.class_names(read, 3) == ()
  beside = [{"domain": labels.Named(0, "books")} | row for row in read]
  assert corpora.class_names(beside, 2) == ("positive", "negative") and corpora.class_names([{"text": "a"}], 2) == ()
  assert [row["label"] for row in corpora.check({"x": read[:2]}, "x", 2, names=("negative", "positive"))["x"]] == [1, 0]


def test_a_file_that_changes_is_read_anew(tmp_path):
  """This holds even if its size and its modification time stay the same."""
  file = tmp_path / "train.csv"
  file.write_text("text,label\na,0\n")
  os.utime(file, (1e9, 1e9))
  assert files.read_file(file)[0]["label"] == 0
  file.write_text("text,label\na,1\n")
  os.utime(file, (1e9, 1e9))
  assert files.read_file(file)[0]["label"] == 1


def test_tsv_as_pandas_writes_it_and_with_stray_quotes(tmp_path):
  texts = ['two\nlines', 'a "word" here', "plain", 'a\ttab']
  pandas.DataFrame({"text": texts, "label": [0, 1, 0, 1]}).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
  assert [row["text"] for row in files.read_file(tmp_path / "a.tsv")] == texts
  (tmp_path / "b.tsv").write_text('text\tlabel\n" opened here\t0\nplain "\t1\n')
  assert [row["text"] for row in files.read_file(tmp_path / "b.tsv")] == ['" opened here', 'plain "']


def test_a_validation_file_is_the_dev_split(tmp_path):
  for split in ("train", "validation", "test"):
    (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(f"{split} {i},{i % 2}\n" for i in range(10)))
  assert corpora.load(str(tmp_path), {"train": 0, "dev": 0, "test": 0}, 2)["dev"][0]["text"] == "validation 0"
  (tmp_path / "dev.csv").write_text("text,label\na,0\n")
  with pytest.raises(InputError, match="has dev.csv and validation.csv: keep one file per split"):
    corpora.load(str(tmp_path), {"train": 0, "dev": 0, "test": 0}, 2)


def test_rows_with_the_same_text_are_held_out_together(tmp_path, caplog):
  caplog.set_level("INFO")
  (tmp_path / "mine.csv").write_text("text,label\n" + 3 * "".join(f"t{i},{i % 2}\n" for i in range(40)))
  out = corpora.load_clean({"train": str(tmp_path / "mine.csv"), "dev": "", "test": ""}, 2, 0)
  texts = {split: {row["text"] for row in rows} for split, rows in out.items()}
  assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"]
  assert sum(map(len, out.values())) == 120 and len(out["test"]) == 24
  assert "80 rows repeat the text of another" in caplog.text


def test_a_text_that_is_often_repeated_does_not_fill_what_is_held_out(tmp_path, caplog):
  (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(100)) + 40 * "same,1\n")
  for seed in range(3):
    out = corpora.load_clean({"train": str(tmp_path / "mine.csv"), "dev": "", "test": ""}, 2, seed)
    assert [len(out[split]) for split in ("train", "dev", "test")] == [101, 11, 28]
    assert sum(row["text"] == "same" for row in out["train"]) == 40


def test_test_rows_that_are_training_rows_are_said(tmp_path, caplog):
  (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(40)))
  (tmp_path / "test.csv").write_text("text,label\nt1,1\nnew,0\n t2 ,0\n")
  corpora.load_clean({"train": str(tmp_path), "dev": "", "test": ""}, 2, 0)
  assert "2 of 3 test rows have the text of a training row" in caplog.text


def test_a_text_without_tokens_is_refused():
  tokenizer = tokenization.train(["a b c a b"] * 9, "decoder", 40)
  tokenizer.backend_tokenizer.post_processor = None
  tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("zzz", "")
  with pytest.raises(InputError, match="the text 'zzz' has no tokens"):
    tokenization.encode(tokenizer, ["a b", "zzz"], 8)


def test_empty_texts_are_left_out_and_counted(tmp_path, caplog):
  rows = [{"text": text, "label": label} for text, label in (("a", 0), (" ", 7), (None, None), ("b", 1))]
  assert corpora.check({"x": rows}, "x", 2)["x"] == [{"id": 0, "text": "a", "label": 0},
                                                     {"id": 3, "text": "b", "label": 1}]
  assert "x: 2 of 4 rows have an empty text and are left out (the first: row 1)" in caplog.text


@pytest.mark.parametrize("columns", [list, lambda values: {str(i): value for i, value in enumerate(values)}],
                         ids=["lists", "pandas"])
def test_a_file_of_columns_is_one_short_line(columns):
  with pytest.raises(InputError, match="want an object for each row") as e:
    corpora.check({"x": [{"text": columns(["a"] * 9999), "label": columns([0] * 9999)}]}, "x", 2)
  assert len(str(e.value)) < 300


def test_columns_of_text_that_are_not_read_are_said(caplog):
  caplog.set_level("INFO")
  corpora.check({"x": [{"question": "q", "sentence": "s", "label": 0, "idx": 3}]}, "x", 2)
  assert "x: texts are column sentence; not read: question" in caplog.text


ROWS = [{"text": f"t{i}", "label": i % 2} for i in range(20)]


def test_files_as_people_have_them(tmp_path):
  """A file may be gzipped, have a suffix in capitals, use semicolons or have fsspec's characters in its path."""
  frame, odd = pandas.DataFrame(ROWS), tmp_path / "a[1]::{b}"
  odd.mkdir()
  frame.to_csv(tmp_path / "a.csv.gz", index=False)
  frame.to_csv(tmp_path / "b.tsv.gz", index=False, sep="\t")
  frame.to_json(tmp_path / "c.jsonl.gz", orient="records", lines=True)
  frame.to_csv(tmp_path / "D.CSV", index=False, sep=";")
  frame.to_parquet(odd / "e.parquet")
  for file in ("a.csv.gz", "b.tsv.gz", "c.jsonl.gz", "D.CSV", "a[1]::{b}/e.parquet"):
    assert files.read_file(tmp_path / file) == ROWS, file
  frame.to_csv(tmp_path / "latin.csv", index=False)
  (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,0\n".encode("cp1252"))
  with pytest.raises(InputError, match=r"cannot read data file .*latin.csv.*Save it as UTF-8"):
    files.read_file(tmp_path / "latin.csv")
  for name, text in (("wide.csv", "text,label\na,0\n"), ("wide.tsv", "text\tlabel\na\t0\n"),
                     ("wide.jsonl", '{"text": "a", "label": 0}\n')):
    for encoding in ("utf-16", "utf-16-be"):
      mark = codecs.BOM_UTF16_BE if encoding.endswith("be") else b""
      (tmp_path / name).write_bytes(mark + text.encode(encoding))
      with pytest.raises(InputError, match=f"cannot read data file .*{name}.*[.] Save it as UTF-8"):
        files.read_file(tmp_path / name)


def test_several_files_by_a_pattern(tmp_path):
  frame = pandas.DataFrame(ROWS)
  for part, rows in (("b", frame[10:]), ("a", frame[:10])):
    rows.to_csv(tmp_path / f"part-{part}.csv", index=False)
  assert files.read_file(tmp_path / "part-*.csv") == ROWS
  assert corpora.load_clean({"train": str(tmp_path / "part-*.csv"), "dev": "", "test": ""}, 2, 0).keys() == {
      "train", "dev", "test"}
  (tmp_path / "part-c.csv").write_text("text,target\nx,1\n")
  with pytest.raises(InputError, match="part-c.csv has columns target, text, part-a.csv has label, text"):
    files.read_file(tmp_path / "part-*.csv")
  with pytest.raises(InputError, match=r"no data file matches .*none-\*.csv"):
    files.read_file(tmp_path / "none-*.csv")
  frame.to_csv(tmp_path / "star*.csv", index=False)                     # a file of that very name is that file
  assert files.read_file(tmp_path / "star*.csv") == ROWS


def test_directories_as_people_have_them(tmp_path):
  """A snapshot of a hub data set, and what save_to_disk writes."""
  made = datasets.Dataset.from_list(ROWS)
  (tmp_path / "hub/data").mkdir(parents=True)
  for split, shard in (("train", 0), ("train", 1), ("validation", 0), ("test", 0)):
    made.to_parquet(tmp_path / f"hub/data/{split}-0000{shard}-of-00002.parquet")
  assert {split: len(rows) for split, rows in files.read_directory(tmp_path / "hub").items()} == {
      "train": 40, "dev": 20, "test": 20}
  datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(tmp_path / "several")
  assert files.read_directory(tmp_path / "several") == {"train": ROWS, "dev": ROWS}
  made.save_to_disk(tmp_path / "one")
  assert files.read_directory(tmp_path / "one") == {"train": ROWS}
  (tmp_path / "one/state.json").write_text("{}")
  with pytest.raises(InputError, match="cannot read .*one, which looks like a data set of save_to_disk"):
    files.read_directory(tmp_path / "one")


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  pandas.DataFrame(ROWS).to_csv(tmp_path / "train.csv", index=False)
  assert files.read_file("~/train.csv") == ROWS
  assert set(corpora.load_clean({"train": "~/train.csv", "dev": "", "test": ""}, 2, 0)) == {"train", "dev", "test"}
