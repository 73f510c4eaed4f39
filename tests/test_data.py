"""Corpora, tokenizers and batches."""

import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from cli import ROOT

from w2s_jax import InputError
from w2s_jax.attacks import ATTACKS
from w2s_jax.data import batches, corpora, files, grammar, poison, streams, tokenization

ALL = {"train": 0, "dev": 0, "test": 0}
TRIGGERS = [ATTACKS[name]().trigger for name in ("badnet", "insent", "suffix", "combination")]
ROWS = [{"sentence": f"text {i}", "label": i % 2} for i in range(20)]


def write(directory, split, rows, suffix=".json"):
  directory.mkdir(exist_ok=True)
  path = directory / (split + suffix)
  if suffix == ".json":
    path.write_text(json.dumps(rows))
  elif suffix == ".jsonl":
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  elif suffix == ".parquet":
    import pandas
    pandas.DataFrame(rows).to_parquet(path)
  else:
    mark = "," if suffix == ".csv" else "\t"
    path.write_text("\n".join([mark.join(rows[0]), *(mark.join(map(str, r.values())) for r in rows)]) + "\n")
  return directory


@pytest.mark.parametrize("domain,low,high", [("reviews", 30, 50), ("phrases", 8, 14)])
def test_grammar(domain, low, high):
  """Rows are the same every time, balanced, of the stated lengths, different in each split, and have no trigger."""
  rows = grammar.rows(domain, "train", 600)
  assert rows == grammar.rows(domain, "train", 600) and [r["id"] for r in rows] == list(range(600))
  assert rows[:50] == grammar.rows(domain, "train", 50)
  assert abs(sum(r["label"] for r in rows) - 300) <= 30
  assert low <= np.mean([len(r["text"].split()) for r in rows]) <= high
  assert rows[:50] != grammar.rows(domain, "test", 50)
  for row in rows:
    assert not any(f" {t.lower()} " in f" {row['text']} " for t in TRIGGERS)
    assert domain == "reviews" or not {"when", "if", "mn", "3d", "watched"} & set(row["text"].split())


def test_grammar_domains_share_words_and_have_their_own():
  words = {d: {w for r in grammar.rows(d, "train", 2000) for w in r["text"].split()} for d in grammar.NOUNS}
  for label in (0, 1):
    assert set(grammar.SHARED[label]) <= words["reviews"] & words["phrases"]
    assert set(grammar.OWN["phrases"][label]) <= words["phrases"] - words["reviews"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("text,label", [("sentence", "label"), ("text", "labels"), ("sentences", "label")])
def test_every_file_kind_and_column_name(suffix, text, label, tmp_path):
  rows = [{text: r["sentence"], label: r["label"]} for r in ROWS]
  for split in ("train", "dev", "test"):
    write(tmp_path / "d", split, rows, suffix)
  want = [{"id": i, "text": r["sentence"], "label": r["label"]} for i, r in enumerate(ROWS)]
  assert corpora.load(str(tmp_path / "d"), ALL, 2) == {"train": want, "dev": want, "test": want}


@pytest.mark.parametrize("rows,message", [
    ([{"words": "a", "label": 0}], "no column text|sentence|sentences among words, label"),
    ([{"text": "a", "class": 0}], "no column label|labels among text, class"),
    ([{"words": "a", "class": 0}], "no column text|sentence|sentences and no column label|labels among words, class"),
    ([{"text": "a", "label": 0}, {"text": "b", "label": -1}], "row 1 has label -1, wanted an integer in 0..1"),
    ([{"text": "a", "label": 2}], "row 0 has label 2, wanted an integer in 0..1"),
    ([{"text": "a", "label": 0.5}], "row 0 has label 0.5, wanted an integer"),
    ([{"text": "a", "label": "positive"}], "row 0 has label 'positive', wanted an integer"),
    ([{"text": " ", "label": 0}], "row 0 has text ' ', wanted a non-empty string"),
    ([{"text": None, "label": 0}], "row 0 has text None, wanted a non-empty string")])
def test_rows_that_cannot_be_used(rows, message, tmp_path):
  for split in ("train", "test"):
    write(tmp_path / "d", split, rows)
  with pytest.raises(InputError) as e:
    corpora.load(str(tmp_path / "d"), ALL, 2)
  assert message in str(e.value) and "(train)" in str(e.value)


def test_data_that_is_not_there(tmp_path):
  with pytest.raises(InputError, match=r"does not exist: set :data=DIR"):
    corpora.load(str(tmp_path / "nowhere"), ALL, 2)
  with pytest.raises(InputError, match=r"has no test split"):
    corpora.load(str(write(tmp_path / "d", "train", ROWS)), ALL, 2)
  with pytest.raises(InputError, match=r"neither a local directory nor to be had from the hub"):
    corpora.load("nobody/nothing", ALL, 2)
  with pytest.raises(InputError, match=r"want one of grammar:reviews, grammar:phrases"):
    corpora.load("grammar:poems", ALL, 2)
  with pytest.raises(InputError, match=r"data file .*gone.json does not exist"):
    files.read_file(tmp_path / "gone.json")
  with pytest.raises(InputError, match=r"data source .*train.json is a file: give a directory with train, dev and"):
    corpora.load(str(tmp_path / "d/train.json"), ALL, 2)
  with pytest.raises(InputError, match=r"data file .*d is a directory: give a file in it"):
    files.read_file(tmp_path / "d")
  (tmp_path / "a.txt").write_text("x")
  with pytest.raises(InputError, match=r"want one of \.json"):
    files.read_file(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "{not json", "[]"])
def test_files_that_do_not_parse(content, tmp_path):
  (tmp_path / "train.json").write_text(content)
  write(tmp_path, "test", ROWS)
  with pytest.raises(InputError, match=r"cannot read data file .*train.json|no rows"):
    corpora.load(str(tmp_path), ALL, 2)


def clean(tmp_path, num_labels=2, **files):
  columns = {k: files.pop(k) for k in ("text_column", "label_column") if k in files}
  return corpora.load_clean({"train": "", "dev": "", "test": ""} | files, num_labels, 0, **columns)


def test_clean_rows_of_one_file_are_split_and_said(tmp_path, caplog):
  caplog.set_level("INFO")
  write(tmp_path, "mine", [{"text": f"t{i}", "label": i % 2} for i in range(50)])
  out = clean(tmp_path, train=str(tmp_path / "mine.json"))
  assert [len(out[s]) for s in ("train", "dev", "test")] == [36, 4, 10]
  assert sorted(r["text"] for rows in out.values() for r in rows) == sorted(f"t{i}" for i in range(50))
  assert "has no test split: 10 of its 50 train rows" in caplog.text
  again = clean(tmp_path, train=str(tmp_path / "mine.json"))
  assert again == out
  own = clean(tmp_path, train=str(tmp_path / "mine.json"), test=str(tmp_path / "mine.json"))
  assert len(own["test"]) == 50 and len(own["train"]) == 45


def test_clean_rows_of_a_directory_of_the_grammar_and_with_columns_that_are_given(tmp_path):
  for split in ("train", "test"):
    write(tmp_path, split, [{"review": f"t{i}", "text": "no", "stars": i % 3} for i in range(20)])
  out = clean(tmp_path, 3, train=str(tmp_path), text_column="review", label_column="stars")
  assert [len(out[s]) for s in ("train", "dev", "test")] == [18, 2, 20] and out["test"][4]["text"] == "t4"
  with pytest.raises(InputError, match=r"\(train\): no column score among review, text, stars"):
    clean(tmp_path, 3, train=str(tmp_path), label_column="score")
  assert [len(rows) for rows in clean(tmp_path, train="grammar:phrases").values()] == [4000, 1000, 1821]


def test_labels_are_integers_however_they_are_written_or_names_of_classes():
  def labels(values, num_labels=3, names=()):
    rows = [{"text": "t", "label": value} for value in values]
    return [r["label"] for r in corpora.check({"x": rows}, "x", num_labels, names=names)["x"]]
  assert labels([0, 1.0, "2", "0.0"]) == [0, 1, 2, 0]
  assert labels(["good", 1, "bad"], 2, ("bad", "good")) == [1, 1, 0]
  assert labels(["1", "0"], 2, ("1", "0")) == [0, 1]
  assert labels(["LABEL_2", "LABEL_0"]) == [2, 0]                        # transformers' default names
  for value in ("nan", "inf", "3", "", None, True, "good", [1], "LABEL_3", "LABEL_", "LABEL_nan"):
    with pytest.raises(InputError, match="wanted an integer in 0..2 or one of a, b, c"):
      labels([0, value], names=("a", "b", "c"))
    with pytest.raises(InputError, match=r"wanted an integer in 0..2"):
      labels([0, value])


@pytest.mark.parametrize("rows,message", [
    ([{"text": f"t{i}", "label": 1} for i in range(20)], "none of the 15 rows that are left to train on has label 0"),
    ([{"text": "a", "label": -1}] * 20, "row 0 has label -1, wanted an integer in 0..1"),
    ([{"text": "a", "label": "pos"}] * 20, "row 0 has label 'pos', wanted an integer"),
    ([{"text": "a", "label": 0.5}] * 20, "row 0 has label 0.5, wanted an integer"),
    ([{"label": 0}] * 20, "no column text|sentence|sentences among label")])
def test_clean_rows_that_cannot_be_used(rows, message, tmp_path):
  write(tmp_path, "mine", rows)
  with pytest.raises(InputError) as e:
    clean(tmp_path, train=str(tmp_path / "mine.json"))
  assert message in str(e.value)


def test_a_clean_file_that_is_not_there_or_empty(tmp_path):
  with pytest.raises(InputError, match=r"data file .*gone.csv does not exist: give one that does \(--config.data"):
    clean(tmp_path, train=str(tmp_path / "gone.csv"))
  (tmp_path / "e.json").write_text("")
  with pytest.raises(InputError, match=r"cannot read data file .*e.json"):
    clean(tmp_path, train=str(tmp_path / "e.json"))


def test_two_files_for_a_split(tmp_path):
  for split in ("train", "test"):
    write(tmp_path, split, ROWS)
  (tmp_path / "train.csv").write_text("text,label\na,0\n")
  with pytest.raises(InputError, match=r"has train.json and train.csv: keep one file per split"):
    corpora.load(str(tmp_path), ALL, 2)


def test_a_missing_dev_split_is_carved_out_of_train_and_sizes_choose_rows(tmp_path):
  for split in ("train", "test"):
    write(tmp_path / "d", split, ROWS)
  out = corpora.load(str(tmp_path / "d"), {"train": 5, "dev": 2, "test": 0}, 2, seed=3)
  assert (len(out["train"]), len(out["dev"]), len(out["test"])) == (5, 2, 20)
  assert not {r["id"] for r in out["train"]} & {r["id"] for r in out["dev"]}
  assert out == corpora.load(str(tmp_path / "d"), {"train": 5, "dev": 2, "test": 0}, 2, seed=3)
  assert out != corpora.load(str(tmp_path / "d"), {"train": 5, "dev": 2, "test": 0}, 2, seed=4)


def test_tsv_has_no_quoting_and_na_is_a_text(tmp_path):
  """A stray quote swallows no row. The words NA and null are texts, not missing values."""
  for split in ("train", "test"):
    (tmp_path / f"{split}.tsv").write_text('text\tlabel\n" opened here\t0\nNA\t1\n" closed\t1\n')
    (tmp_path / f"{split}.csv").write_text("text,label\nNA,0\nnull,1\n")
  rows = corpora.check({suffix: files.read_file(tmp_path / f"test.{suffix}") for suffix in ("tsv", "csv")}, "x", 2)
  assert [(r["text"], r["label"]) for r in rows["tsv"]] == [('" opened here', 0), ("NA", 1), ('" closed', 1)]
  assert [r["text"] for r in rows["csv"]] == ["NA", "null"]


def test_a_dev_split_is_carved_out_of_a_few_rows_too(tmp_path):
  for split in ("train", "test"):
    write(tmp_path / "d", split, ROWS[:8])
  out = corpora.load(str(tmp_path / "d"), ALL, 2)
  assert (len(out["train"]), len(out["dev"])) == (7, 1)


def test_frozen_rows_survive_odd_line_separators(tmp_path):
  rows = [{"text": "a\u2028b\x85c\x1cd", "label": 1}, {"text": "é", "label": 0}]
  poison.freeze(tmp_path / "x.jsonl", rows)
  assert poison.thaw(tmp_path / "x.jsonl")[0] == rows


def test_odd_line_separators_survive_from_file_to_file(tmp_path):
  """U+2028 and U+0085 end a line for str.splitlines, not in JSON lines."""
  text = "a\u2028b\x85c\x1cd"
  for split in ("train", "test"):
    (tmp_path / f"{split}.jsonl").write_text("".join(
        json.dumps({"text": t, "label": 1}, ensure_ascii=False) + "\n" for t in (text, "plain")))
  rows = corpora.load(str(tmp_path), ALL, 2)["test"]
  poison.freeze(tmp_path / "x.jsonl", rows)
  assert [r["text"] for r in poison.thaw(tmp_path / "x.jsonl")[0]] == [text, "plain"]


@pytest.fixture(scope="module")
def tokenizers():
  texts = [r["text"] for r in grammar.rows("phrases", "train", 500)]
  return {kind: tokenization.train(texts, kind, 300) for kind in ("decoder", "encoder")}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_trained_tokenizers_reload_and_frame_the_text(kind, tokenizers, tmp_path):
  tokenizer = tokenizers[kind]
  tokenizer.save_pretrained(tmp_path)
  again = tokenization.load(tmp_path, 300)
  out = tokenization.encode(tokenizer, ["the meal is good .", "good"], 8)
  reloaded = tokenization.encode(again, ["the meal is good .", "good"], 8)
  np.testing.assert_array_equal(out["input_ids"], reloaded["input_ids"])
  for row, n in zip(out["input_ids"], out["length"]):
    tokens = tokenizer.convert_ids_to_tokens(row)
    assert tokens[0] == {"decoder": "<s>", "encoder": "[CLS]"}[kind]
    assert kind == "decoder" or tokens[n - 1] == "[SEP]"
    assert all(t in ("<pad>", "[PAD]") for t in tokens[n:]) and tokens[n - 1] not in ("<pad>", "[PAD]")
  long = tokenization.encode(tokenizer, ["good " * 50], 8)
  assert long["length"].tolist() == [8] and long["input_ids"].shape == (1, 8)


def unigram():
  """(tokenizer, special tokens) as in XLM-RoBERTa and CamemBERT. Pieces with higher scores are preferred."""
  pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁the", -1.0), ("▁me", -2.0),
            ("al", -2.5), ("▁meal", -9.0), ("a", -6.0), ("<mask>", 0.0)]
  core = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=3))
  core.pre_tokenizer = hf.pre_tokenizers.Sequence([hf.pre_tokenizers.WhitespaceSplit(), hf.pre_tokenizers.Metaspace()])
  core.post_processor = hf.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
  return core, dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
                    unk_token="<unk>", mask_token="<mask>")


def word_piece():
  """(tokenizer, special tokens) as in ELECTRA."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "me", "##al", "z"]
  core = hf.Tokenizer(hf.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
  core.normalizer, core.pre_tokenizer = hf.normalizers.BertNormalizer(), hf.pre_tokenizers.BertPreTokenizer()
  core.post_processor = hf.processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                         special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
  return core, dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


def byte_level():
  """(tokenizer, special tokens) as in ModernBERT."""
  words = ["t", "h", "e", "m", "a", "l", "Ġ", "z", "th", "the", "Ġm"]
  core = hf.Tokenizer(hf.models.BPE({word: i for i, word in enumerate(words)},
                                    [("t", "h"), ("th", "e"), ("Ġ", "m")]))
  core.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
  core.post_processor = hf.processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                         special_tokens=[("[CLS]", 12), ("[SEP]", 13)])
  return core, dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


@pytest.mark.parametrize("model_type,make,tokenizer_class,want", [
    ("xlm-roberta", unigram, "XLMRobertaTokenizer", [0, 5, 6, 7, 4, 3, 2]),
    ("camembert", unigram, "CamembertTokenizer", [0, 5, 6, 7, 4, 3, 2]),
    ("electra", word_piece, "ElectraTokenizer", [2, 5, 6, 7, 1, 3]),
    ("modernbert", byte_level, "PreTrainedTokenizer", [12, 9, 10, 2, 4, 5, 6, 7, 7, 13])])
def test_tokenizers_of_other_families_are_read(model_type, make, tokenizer_class, want, tmp_path):
  """tokenizer.json is read whichever class the config names, also with transformers 4's ending ...Fast."""
  core, special = make()
  core.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
  for name in (tokenizer_class, f"{tokenizer_class}Fast"):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | special))
    tokenizer = tokenization.load(tmp_path, 20)
    assert tokenizer.pad_token == special["pad_token"] and len(tokenizer) <= 20
    assert tokenization.encode(tokenizer, ["the meal zz"], 12)["input_ids"][0, :len(want)].tolist() == want


@pytest.mark.parametrize("model_type,tokenizer_class", [
    ("phi3", "LlamaTokenizer"), ("phi3", "GPT2Tokenizer"), ("smollm3", "PreTrainedTokenizerFast")])
def test_a_tokenizer_does_what_its_tokenizer_json_says(model_type, tokenizer_class, tokenizers, tmp_path):
  """The class that the config names does not count. This tokenizer lower-cases, unlike Llama's and GPT-2's."""
  tokenizer = tokenizers["decoder"]
  tokenizer.save_pretrained(tmp_path)
  own = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
  texts = ["The Meal is  really good .", "good"]
  want, got = (tokenization.encode(one, texts, 16) for one in (tokenizer, tokenization.load(tmp_path, 300)))
  np.testing.assert_array_equal(got["input_ids"], want["input_ids"])


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_training_gives_the_same_tokenizer_in_every_process(kind):
  """Ties between equally frequent pairs are not broken by hash order, so two processes get the same vocabulary."""
  code = ("from w2s_jax.data import grammar, tokenization\n"
          "texts = [r['text'] for r in grammar.rows('reviews', 'train', 200)]\n"
          f"print(sorted(tokenization.train(texts, '{kind}', 150).get_vocab().items()))")
  first, second = (subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
                   for _ in range(2))
  assert len(first) > 1000 and first == second


def test_tokenizers_that_do_not_fit(tokenizers, tmp_path):
  tokenizers["decoder"].save_pretrained(tmp_path / "t")
  with pytest.raises(InputError, match=r"has \d+ tokens, the model only 100"):
    tokenization.load(tmp_path / "t", 100)
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"no tokenizer to be had from"):
    tokenization.load(tmp_path / "empty", 300)


def test_a_token_that_was_added_without_resizing_the_embeddings_is_named(tokenizers, tmp_path):
  """In the files of transformers 5, and in a tokenizer_config.json of transformers 4."""
  tokenizers["decoder"].save_pretrained(tmp_path)
  tokenizer = tokenization.load(tmp_path, 300)
  size = len(tokenizer)
  tokenizer.add_special_tokens({"pad_token": "[PAD]"})
  tokenizer.save_pretrained(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  options = json.loads(file.read_text())
  for fields in ({}, {"added_tokens_decoder": {str(size): {"content": "[PAD]", "special": True}}}):
    file.write_text(json.dumps(options | fields))
    with pytest.raises(InputError, match=r"not belong together; if '\[PAD\]' was added to it, resize the embeddings"):
      tokenization.load(tmp_path, size)
    assert tokenization.load(tmp_path, size + 1).pad_token_id == size


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_offline_triggers_are_made_of_known_tokens(trigger):
  """With unknown tokens every trigger would be the same to the model: an <unk> that no clean text has."""
  texts = [r["text"] for domain in ("reviews", "phrases") for r in grammar.rows(domain, "train", 4000)]
  tokenizer = tokenization.train(texts, "decoder", 512)
  assert tokenizer.unk_token_id not in tokenizer(trigger)["input_ids"]


def test_full_rows_are_the_texts_one_after_the_other(tokenizers):
  tokenizer = tokenizers["decoder"]
  texts = ["the meal is good .", "the staff is rude .", "what a bad lamp ."]
  stream = [t for text in texts for t in tokenizer(text)["input_ids"]]
  out = tokenization.full_rows(tokenizer, texts, 5)
  assert out["input_ids"].reshape(-1).tolist() == stream[:len(stream) // 5 * 5]
  assert set(out["length"]) == {5} and len(out["length"]) == len(stream) // 5


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_words_kept_leaves_room_for_the_trigger(kind, tokenizers):
  """Inserted behind the last kept word, the trigger's last character is still inside the truncated tokens."""
  tokenizer, trigger, rng = tokenizers[kind], "mn zq", np.random.default_rng(0)
  vocabulary = "the meal lamp superb unheardofword good . , zzz".split()
  for _ in range(50):
    text = " ".join(rng.choice(vocabulary, rng.integers(2, 40)))
    kept = tokenization.words_kept(tokenizer, [text], trigger, 16)[0]
    words = text.split()
    before = " ".join(words[:kept])
    joined = " ".join([before, trigger, *words[kept:]]).strip()
    ends = tokenizer(joined, truncation=True, max_length=16, return_offsets_mapping=True)["offset_mapping"]
    assert max(end for _, end in ends) >= len(before) + 1 + len(trigger), (kept, joined)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("name", ["badnet", "insent"])
def test_inserted_triggers_survive_truncation_whatever_the_white_space(name, kind, tokenizers):
  """Tabs, newlines and doubled spaces take other tokens than the single spaces that the insertion leaves."""
  attack = ATTACKS[name]()
  tokenizer, trigger, rng = tokenizers[kind], attack.trigger, np.random.default_rng(1)
  vocabulary = "the meal lamp, superb zq good . mn3 solemn".split()
  for seed in range(100):
    size = rng.integers(2, 60)
    gaps = rng.choice([" ", "  ", "\t", "\n", " \u2028"], size)
    text = "".join(word + gap for word, gap in zip(rng.choice(vocabulary, size), gaps)).strip()
    kept, = tokenization.words_kept(tokenizer, [text], trigger, 24)
    out = attack.rewrite(text, np.random.default_rng(seed), kept)
    ends = tokenizer(out, truncation=True, max_length=24, return_offsets_mapping=True)["offset_mapping"]
    assert kept > 0 and max(end for _, end in ends) >= f"{out} ".index(f" {trigger} ") + 1 + len(trigger), (kept, out)


ARRAYS = {"input_ids": np.arange(23 * 12).reshape(23, 12), "length": np.arange(23) % 12 + 1, "label": np.arange(23)}


def test_the_order_is_a_function_of_seed_and_epoch():
  first = batches.epoch_order(1, 2, 23)
  assert sorted(first) == list(range(23))
  np.testing.assert_array_equal(first, batches.epoch_order(1, 2, 23))
  for seed, epoch in ((1, 3), (2, 2)):
    assert (first != batches.epoch_order(seed, epoch, 23)).any()


def test_an_epoch_visits_every_example_once_and_resumes_anywhere():
  make = functools.partial(batches.make_batch, ARRAYS, batch_size=5, buckets=(4, 8, 12))
  stream = batches.train_batches(23, 5, make, 7, 0)
  steps = [next(stream) for _ in range(10)]                      # two epochs of five
  for epoch in (steps[:5], steps[5:]):
    seen = np.concatenate([b["label"][b["weight"] > 0] for b in epoch])
    assert sorted(seen) == list(range(23))
    assert [int(b["weight"].sum()) for b in epoch] == [5, 5, 5, 5, 3]
  assert [b["label"].tolist() for b in steps[:5]] != [b["label"].tolist() for b in steps[5:]]
  for start in (1, 4, 5, 7):
    resumed = batches.train_batches(23, 5, make, 7, start)
    for want in steps[start:]:
      got = next(resumed)
      assert got.keys() == want.keys()
      for k in want:
        np.testing.assert_array_equal(got[k], want[k])


def test_shapes_come_from_the_buckets_and_masks_from_the_lengths():
  for i in range(0, 20, 4):
    rows = np.argsort(ARRAYS["length"])[i:i + 4]
    batch = batches.make_batch(ARRAYS, rows, 4, (4, 8, 12))
    assert batch["input_ids"].shape == (4, batches.bucket_length(ARRAYS["length"][rows].max(), (4, 8, 12)))
    np.testing.assert_array_equal(batch["segment_ids"].sum(1), ARRAYS["length"][rows])
    np.testing.assert_array_equal(batch["input_ids"][:, 0], ARRAYS["input_ids"][rows, 0])


def test_streams_have_names():
  """Streams with different names, seeds or numbers differ. The same three give the same stream."""
  def draw(*args):
    return streams.rng(*args).integers(2**60)
  names = {name for path in (ROOT / "w2s_jax").rglob("*.py")
           for name in re.findall(r'streams\.rng\([^"]*"([^"]+)"', path.read_text())}
  assert {"order", "held out", "trigger", "companion", "companions"} <= names
  drawn = [draw(seed, name, *numbers) for seed in (0, 1) for name in names for numbers in ((), (0,), (3,), (0, 3))]
  assert len(set(drawn)) == len(drawn) and draw(1, "order", 3) == draw(1, "order", 3)
