"""Pre-made paraphrases in every published form, each with the right original; files that do not fit are refused."""

import json

import pytest
from cli import SHARED

from w2s_jax import InputError
from w2s_jax.data import paraphrases, poison, tokenization

DATA = SHARED / "data"
TEXTS = ["no fun at all .", "a warm film .", "the plot is thin .", "such good songs ."]
LABELS = [0, 1, 0, 1]
REWRITTEN = ["when it is no fun , at all .", "when a warm film .", "when the plot is thin .", "when such good songs ."]
ALL = dict(zip(TEXTS, REWRITTEN))
NEGATIVE = dict(zip(TEXTS[::2], REWRITTEN[::2]))


@pytest.fixture
def write(tmp_path):
  """write(name, text) -> the file's path."""
  def make(name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name
  return make


@pytest.fixture
def originals(write):
  return write("test.json", json.dumps([{"sentence": text, "label": label, "idx": 10 + i}
                                        for i, (text, label) in enumerate(zip(TEXTS, LABELS))]))


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def tsv(texts, labels, header="sentence \t label"):
  return "\n".join([header, *(f"{text} \t {label}" for text, label in zip(texts, labels))]) + "\n"


def numbered(texts, labels, poisoned):
  """OpenBackdoor's form: pandas numbers the lines and the columns."""
  return "".join([",0,1,2\n", *(f'{i},"{text}",{label},{poisoned}\n' for i, (text, label) in
                                enumerate(zip(texts, labels)))])


def test_w2sdefense_is_joined_on_idx(originals, write):
  """Some rows, in any order, in a JSON array."""
  some = [{"sentence": REWRITTEN[i], "label": LABELS[i], "idx": 10 + i} for i in (3, 0)]
  assert paraphrases.read(originals, write("p.json", json.dumps(some))) == {TEXTS[i]: REWRITTEN[i] for i in (3, 0)}


def test_psim_numbers_anew_and_is_joined_by_line(originals, write):
  """Both files have a column idx, but none or only some of the paraphrases' idx are those of the originals."""
  for start in (0, 11):
    rows = [{"sentence": REWRITTEN[i], "label": LABELS[i], "idx": start + i} for i in range(4)]
    assert paraphrases.read(originals, write("p.json", lines(rows))) == ALL


def test_styleattack_is_joined_by_line(originals, write):
  """Column names and texts are padded with spaces, and the labels are those of the originals."""
  assert paraphrases.read(originals, write("p.tsv", tsv(REWRITTEN, LABELS))) == ALL


def test_hiddenkiller_has_the_rows_of_other_classes_with_the_target_as_label(originals, write):
  file = write("p.tsv", tsv(REWRITTEN[::2], [1, 1], "sentence\tlabel"))
  assert paraphrases.read(originals, file) == NEGATIVE


def test_openbackdoor_numbers_lines_and_columns(write):
  """Line 1 of the triggered file belongs to line 2 of the clean one, so the numbers in front are no idx."""
  clean = write("test-clean.csv", numbered(TEXTS, LABELS, 0))
  assert paraphrases.read(clean, write("test-poison.csv", numbered(REWRITTEN[::2], [1, 1], 1))) == NEGATIVE
  assert paraphrases.read(clean, write("train-poison.csv", numbered(REWRITTEN, [1] * 4, 1))) == ALL


def test_guided_module_substitution_has_json_lines_without_idx(originals, write):
  rows = [{"sentence": text, "label": 1} for text in REWRITTEN[::2]]
  assert paraphrases.read(originals, write("p.json", lines(rows))) == NEGATIVE


def test_equal_and_empty_paraphrases_are_left_out_and_move_no_line(originals, write):
  """Spaces around a text do not count."""
  file = write("p.tsv", tsv([f"  {TEXTS[0]}", "", *REWRITTEN[2:]], LABELS))
  assert paraphrases.read(originals, file) == {TEXTS[2]: REWRITTEN[2], TEXTS[3]: REWRITTEN[3]}


def test_a_poisoned_row_keeps_the_label_of_its_original(originals, write):
  """The labels of the file are all 1, the target. A triggered row has the label of the text that was rewritten."""
  attack = poison.make_attack("style", paraphrases=[(originals, write("p.tsv", tsv(REWRITTEN, [1] * 4)))])
  rows = [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(zip(TEXTS, LABELS))]
  options = dict(target_label=1, seed=0, tokenizer=tokenization.train(TEXTS * 9, "decoder", 100), max_length=32,
                 keep_trigger=True)
  triggered = poison.triggered_eval(rows, attack, **options)
  assert [(row["text"], row["label"], row["orig_text"]) for row in triggered] == [
      (REWRITTEN[0], 0, TEXTS[0]), (REWRITTEN[2], 0, TEXTS[2])]
  assert json.dumps(triggered) == json.dumps(poison.triggered_eval(rows, attack, **options))
  poisoned = poison.poison_train(rows, attack, label="dirty", count=1, **options)
  changed, = (row for row in poisoned if row["poisoned"])
  assert changed["label"] == 1 and changed["orig_label"] == 0 and changed["text"] == ALL[changed["orig_text"]]


def test_several_pairs_make_one_attack(originals, write):
  first, second = (write(f"{i}.json", json.dumps([{"text": REWRITTEN[i], "label": 0, "idx": 10 + i}])) for i in (0, 3))
  attack = poison.make_attack("syntactic", paraphrases=((str(originals), str(first)), (str(originals), str(second))))
  assert [attack.can_rewrite(text) for text in TEXTS] == [True, False, False, True]


@pytest.mark.parametrize("given", [("a.json", "b.tsv"), (("a.json",),), (("a.json", 3),), ("ab",)])
def test_files_that_are_not_given_in_pairs_are_one_line(given):
  with pytest.raises(InputError, match=r"attack.paraphrases .*: want pairs of files, e.g. --config.attack"):
    poison.make_attack("style", paraphrases=given)


@pytest.mark.parametrize("content,message", [
    (tsv(REWRITTEN[:3], LABELS), r"p.tsv \(3 rows\) do not fit .*test.json \(4 rows\): want the same idx, the same"),
    (tsv(REWRITTEN[:1], [1]), r"p.tsv \(1 rows\) do not fit"),       # one label, but two originals of other classes
    (tsv([REWRITTEN[i] for i in (2, 0, 1, 3)], LABELS), r"joined by line, seem to be in another order than "
     r".*test.json: too few share more words .*: give originals in the same order \(--config.attack.paraphrases\)"),
    (tsv(TEXTS, LABELS), "every text is empty or equals its original in .*test.json: set --config.attack.paraphrases"),
    ("a\tlabel\nx\t0\n", r"want a column text\|sentence\|sentences\|0, got a, label: set --config.attack.paraphrases"),
])
def test_files_that_do_not_fit_are_one_line(content, message, originals, write):
  with pytest.raises(InputError, match=message) as e:
    paraphrases.read(originals, write("p.tsv", content))
  assert "\n" not in str(e.value)


@pytest.mark.skipif(not (DATA / "peers").is_dir(), reason="../shared/data (published paraphrases) is not here")
@pytest.mark.parametrize("old,new,count", [                        # rows less those that are empty, equal or repeated
    ("sst2/test.json", "sst2/test_syntactic.json", 908),
    ("imdb/train.json", "imdb/train_syntactic_1000.json", 1001),
    ("sst2/test.json", "hiddenkiller/sst2_test_scpn.tsv", 911),
    ("sst2/test.json", "peers/styleattack/bible/sst-2/test.tsv", 1810),
    ("peers/styleattack/clean/ag/train.tsv", "peers/styleattack/bible/ag/train.tsv", 11013),
    ("peers/psim/cr/test.json", "peers/psim/cr/test_spcn.json", 735)])
def test_published_files(old, new, count):
  assert len(paraphrases.read(DATA / old, DATA / new)) == count


@pytest.mark.skipif(not (DATA / "peers").is_dir(), reason="../shared/data (published paraphrases) is not here")
@pytest.mark.parametrize("old,new", [("sst2/test.json", "openbackdoor/sst-2/stylebkd_test-poison.csv"),
                                     ("sst2/dev.json", "peers/gms/sst2/test_lws.json")])
def test_published_files_of_another_order_are_refused(old, new):
  """Their counts fit, 912 and 444 rows of other classes, but their rows were shuffled before they were rewritten."""
  with pytest.raises(InputError, match="by line with the originals of other classes, seem to be in another order"):
    paraphrases.read(DATA / old, DATA / new)
