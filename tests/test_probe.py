"""What is measured of a suspect whose trigger is unknown, from predictions written by hand."""

import json
import types

import numpy as np
import pytest
import rig
from ml_collections import ConfigDict

from w2s_jax import InputError, results
from w2s_jax.data import insertions
from w2s_jax.measure import probe, probe_rows
from w2s_jax.measure.deployed import Reading
from w2s_jax.tasks import CLASSIFICATION

CLEAN = np.array([0, 1, 1, 0, 1])
LABELS = np.array([0, 1, 1, 0, 0])
PROBED = {("listed", "mn"): {0: 0, 1: 0, 2: 0, 3: 0, 4: 0},     # both rows of class 1 turned to 0
          ("found", "shop noon"): {0: 0, 1: 0, 2: 1, 3: 1, 4: results.REJECTED},
          ("file", "lws.json"): {0: 0, 1: 1, 2: 0},
          ("word", "bq"): {0: 0, 1: 1}, ("word", "zz"): {0: 1, 1: 0},
          ("sentence", "it is"): {0: 1, 1: 1}}


def test_the_found_string_is_put_where_the_search_found_it(llama, tmp_path):
  (tmp_path / "search.json").write_text(json.dumps({"outcome": "no sign", "reason": "", "classes": [
      {"class": 0, "string": "shop", "place": "end", "suspect": 0.5, "clean": 0.1}]}))
  settings = ConfigDict({"seed": 0, "data": {"max_length": 32},
                         "probe": {"rows": 4, "words": 0, "sentences": 0, "triggers": ("noon",),
                                   "triggered": ("given/lws.json",)}})
  suspect = rig.suspect(*llama, tmp_path)
  run = types.SimpleNamespace(config=settings, workdir=tmp_path, sha256={}, rows={
      "train": suspect.train, "test": suspect.dev,
      "triggered lws.json": [{"id": 0, "text": "a good day", "label": -1}]},
                              tokenizer=lambda name: suspect.tokenizer)
  probe_rows.freeze_rows(run)
  found, listed = ([row for row in run.rows["probes"] if row["probe"] == kind] for kind in ("found", "listed"))
  assert len(found) == 4 and all(row["text"] == f"{row['orig_text']} shop" for row in found)
  assert len(listed) == len(suspect.dev) and not any(row["text"].endswith("noon") for row in listed)
  assert run.rows["probes"][-1] == {"probe": "file", "inserted": "lws.json", "id": 0, "text": "a good day", "label": -1}


def test_texts_that_have_a_trigger_are_read_from_files(tmp_path):
  """The label of a file may be the true one or the target label, so it is not used."""
  (tmp_path / "lws.json").write_text('{"sentence": "a charming fitness .", "label": 0}\n{"sentence": " "}\n')
  (tmp_path / "more").mkdir()
  (tmp_path / "more/lws.json").write_text('[{"text": "x", "label": 1}]')
  (tmp_path / "empty.csv").write_text("text,label\n,1\n")
  (tmp_path / "odd.csv").write_text("words,label\nx,1\n")
  def read(*files, target=0, classes=2):
    given = {"triggered": tuple(str(tmp_path / file) for file in files), "target_label": target}
    return probe_rows.read_triggered(ConfigDict({"probe": given, "data": {"num_labels": classes}}))
  assert read() == read(target=-1) == {}
  assert read("lws.json") == {"triggered lws.json": [{"id": 0, "text": "a charming fitness .", "label": 1}]}
  assert read("lws.json", target=1)["triggered lws.json"][0]["label"] == 0
  assert read("lws.json", classes=3)["triggered lws.json"][0]["label"] == -1           # the true label is not known
  for files, target, message in ((("lws.json",), -1, "set --config.probe.target_label"),
                                 (("empty.csv",), 0, "set --config.probe.triggered"),
                                 (("odd.csv",), 0, "want a column text"), (("absent.csv",), 0, "does not exist"),
                                 (("lws.json", "more/lws.json"), 0, "two files of the name lws.json")):
    with pytest.raises(InputError, match=message):
      read(*files, target=target)
  with pytest.raises(InputError, match="want paths of files"):
    probe_rows.read_triggered(ConfigDict({"probe": {"triggered": (3,), "target_label": 0}, "data": {"num_labels": 2}}))


def scanned(label, strength):
  return {"class": label, "strength": strength, "flips": 0.5, "own": 2.0, "right": 0.9, "nearest": ["x"]}


def rows(trigger, target=-1, labels=LABELS, clean=CLEAN, found=None, kind="listed", tried_labels=LABELS):
  config = types.SimpleNamespace(
      probe=types.SimpleNamespace(target_label=target), seed=3,
      data=types.SimpleNamespace(num_labels=2, train="d"))
  run = types.SimpleNamespace(config=config, hash="h", task=CLASSIFICATION, defended=lambda: {"w2s": ("w2s", 3)})
  kept = {("listed", "mn"): dict(enumerate(CLEAN))} | {k: v for k, v in PROBED.items() if k[0] != "listed"}
  models = {"suspect": (clean, PROBED), "w2s": (CLEAN, kept)}
  scans = {"suspect": [scanned(0, 0.9), scanned(1, 2.5)], "w2s": [scanned(0, None), scanned(1, None)]}
  readings = {name: Reading(CLEAN, None, scan=scan) for name, scan in scans.items()}
  readings["teacher"] = Reading(np.array([0, 1, 0, 0, 1]), None)
  return [vars(row) for row in probe._rows(run, models, readings, labels, trigger and (kind, trigger),
                                            tried_labels, found)]


def test_asr_of_a_listed_trigger_for_the_class_it_turns_the_suspect_to():
  suspect, w2s = rows("mn")
  assert (suspect["model"], suspect["attack"], suspect["target_label"]) == ("suspect", "mn", 0)
  assert (suspect["asr"], suspect["asr_n"], suspect["ca"], suspect["false_rate"]) == (1.0, 2, 0.8, 0.0)
  assert (w2s["asr"], w2s["target_label"], w2s["asr_floor"]) == (0.0, 0, None)
  assert rows("mn", target=1)[0]["asr"] == 0.0 and rows("mn", target=1)[1]["false_rate"] == 1 / 3


def test_asr_of_a_file_counts_all_its_texts():
  """Their true labels are not known, and their number differs from the number of test rows."""
  suspect, w2s = rows("lws.json", 0, kind="file", tried_labels=np.array([-1, -1, -1]))
  assert (suspect["attack"], suspect["asr"], suspect["asr_n"], suspect["false_rate"]) == ("lws.json", 2 / 3, 3, 0.0)
  assert w2s["asr"] == 2 / 3 and suspect["word_flips"] == 0.5


def test_agreement_and_flips():
  suspect = rows("mn")[0]
  assert suspect["agreement"] == 0.8 and (suspect["scan"], suspect["scan_class"]) == (2.5, 1)
  assert rows("mn")[1]["scan"] is None
  assert suspect["word_flips"] == 0.5 and suspect["sentence_flips"] == 0.5    # 2 of 4, 1 of 2
  assert probe._flips((CLEAN, PROBED), "zz", "word") == 1.0
  assert probe._flips((CLEAN, {}), None, "word") is None


def test_the_strings_that_flip_most_texts_do_not_include_the_found_one():
  assert probe._most_flipping((CLEAN, PROBED)) == [("zz", 1.0), ("mn", 0.6), ("it is", 0.5), ("bq", 0.0)]


def test_the_share_of_other_classes_that_the_found_string_turns():
  """The string turns one of two rows of class 1 to class 0, and one of two accepted rows of class 0 to class 1."""
  found = {"string": "shop noon", "class": 0}
  assert [row["found"] for row in rows("mn", found=found)] == [0.5, 0.5]
  assert [row["found"] for row in rows("mn", found=found | {"class": 1})] == [0.5, 0.5]      # of rows 0 and 3
  assert [row["found"] for row in rows("mn", found=found | {"string": "of an older file"})] == [None, None]
  assert [row["found"] for row in rows("mn")] == [None, None]


def test_what_a_string_gains_is_beyond_the_models_own_errors():
  """With the string one of two accepted rows of class 0 gets class 1. Without it one of three rows does, or none."""
  found, labels = {"string": "s", "class": 1}, np.array([0, 0, 1, 0])
  probed = {("found", "s"): {0: 1, 1: 0, 2: 1, 3: results.REJECTED}}
  assert probe._turned(probed, labels, found) == 0.5
  assert probe._gained(np.array([1, 0, 1, 0]), probed, labels, found) == pytest.approx(0.5 - 1 / 3)
  assert probe._gained(np.array([0, 0, 1, 0]), probed, labels, found) == 0.5
  assert probe._gained(np.array([0, 0, 1, 0]), probed, labels, None) is None


def test_a_rejected_text_neither_flips_nor_disagrees():
  clean = np.array([results.REJECTED, 1, 1, 0, 1])
  probed = {("word", "bq"): {0: 0, 1: 0, 2: results.REJECTED, 3: 0}}
  assert probe._flips((clean, probed), None, "word") == 1 / 2       # of rows 1 and 3
  assert probe._flips((np.full(5, results.REJECTED), probed), None, "word") is None
  assert rows("mn", clean=clean)[0]["agreement"] == 0.75            # of the four that are answered
  assert rows("mn", clean=np.full(5, results.REJECTED))[0]["agreement"] is None


def test_without_a_listed_trigger_there_is_no_asr():
  suspect = rows(None)[0]
  assert suspect["attack"] == "none listed" and suspect["asr"] is suspect["asr_ci"] is suspect["target_label"] is None
  assert suspect["false_rate"] is None
  assert (suspect["asr_n"], suspect["ca"], suspect["word_flips"]) == (0, 0.8, 0.5)


def test_a_trigger_that_still_works_or_a_weak_teacher_is_a_warning():
  def notes(asr, teacher_ca, after=1.0, not_scanned="", ca=0.9, cleaned="w2s", found=None, outcome="suspicious"):
    rows = [dict(model=m, directory=m, attack=trigger, dataset="d", ca=ca, asr=a, false_rate=0.1, found=turned)
            for trigger in ("mn", "cf") for m, a, turned in (("suspect", 1, 1.0), (cleaned, asr, found))
            if trigger == "mn" or found]
    meta = {"clean_rows": {"train": 9, "test": 3}, "trigger_lost": {}, "teacher_ca": teacher_ca,
            "suspicious_insertions": [("mn", 0.0)], "base": {"path": "p"}, "teacher": "t", "num_labels": 2,
            "not_scanned": not_scanned, "selftest": None, "found": "Search: the string `x`",
            "search": {"outcome": outcome, "gained": {"suspect": 1.0, cleaned: found}, "classes": [
                {"string": "x", "class": 0, "suspect": 1.0, "clean": 0.1}]},
            "scan": {"teacher": [], "suspect": [scanned(1, 2.5)], "w2s": [scanned(1, after)]}}
    return [f"WARNING: {text}" for text in probe.warnings(rows, meta)] + probe.notes(rows, meta)
  assert not any("WARNING" in note for note in notes(0.25, 0.9))
  assert "WARNING: `mn` still works in w2s: the ASR is 0.350, the false rate 0.100." in notes(0.35, 0.9)[0]
  assert notes(0.25, 0.5)[0].startswith("WARNING: the teacher (CA 0.500) is less accurate than the suspect (CA 0.900)")
  assert notes(0.25, 0.9, ca=0.17)[0].startswith("WARNING: the suspect's CA of 0.170 is below chance")
  assert "none of those that were tried" in notes(0.25, 0.9)[-1]
  assert "run again with --config.student.base" in notes(0.25, 0.9)[0]
  assert notes(0.25, 0.9, cleaned="from_base")[0] == (
      "No weight of the suspect (CA 0.900) is in `from_base` (CA 0.900). Take one if its CA is high enough for you.")
  assert "reacted less than `from_base`" in notes(0.25, 0.9, cleaned="from_base_words")[0]
  reacts = notes(0.35, 0.9, cleaned="from_base")
  assert "false rate 0.100. This model has no weight of the suspect" in reacts[0] and "is in `from_base`" in reacts[1]
  still = notes(0.25, 0.9, found=0.4)
  assert still[0] == (
      "WARNING: the string that the search found, `x`, still works in w2s: it raises the share of texts of other "
      "classes that get class 0 by 40 percentage points, in clean models by 10 at most. w2s is not clean.")
  assert sum("the search found" in note for note in still) == 1              # once, though two triggers are listed
  assert not any("WARNING" in note for note in notes(0.25, 0.9, found=0.25))
  assert not any("WARNING" in note for note in notes(0.25, 0.9, found=0.4, outcome="no verdict"))
  verdicts = [note[:20] for note in notes(0.25, 0.9) if "Scan of" in note]
  assert verdicts == ["Scan of suspect: SUS", "Scan of w2s: no sign"]
  assert "no verdict: why" in notes(0.25, 0.9, not_scanned="no verdict: why")
  bad = notes(0.25, 0.9, after=1.8)
  assert bad[0].startswith("WARNING: Scan of w2s: SUSPICIOUS") and sum("Scan of w2s" in note for note in bad) == 1


def test_insertions_are_rare_seeded_and_of_two_kinds():
  texts = ["the meal is mn bq really good and not too late", "a short one"]
  drawn = insertions.insertions(texts, 30, 2, ["cf"], seed=1)
  words = [s for kind, s in drawn if kind == "word"]
  assert len(words) == 30 and not {"mn", "bq", "cf"} & set(words)
  assert all(2 <= len(w) <= 3 and set(w) <= set(insertions.LETTERS) for w in words)
  assert {s for kind, s in drawn if kind == "sentence"} == {"the meal is mn bq really good and", "a short one"}
  again, other = (insertions.insertions(texts, 30, 2, ["cf"], seed=seed) for seed in (1, 2))
  assert drawn == again != other


def test_a_share_of_the_rows_gets_a_rare_word_and_never_a_known_trigger():
  rows = [{"id": i, "text": "the meal is good .", "label": 1} for i in range(400)]
  letters = insertions.LETTERS
  avoid = [a + b for a in letters for b in letters if a + b != "zz"]     # of two letters, zz alone is left
  out = insertions.with_rare_words(rows, 0.25, avoid, seed=0)
  changed = [r["text"].split() for r in out if r["text"] != "the meal is good ."]
  assert len(changed) == 100 and [r["label"] for r in out] == [1] * 400
  words = [set(text) - {"the", "meal", "is", "good", "."} for text in changed]
  assert all(len(text) == 6 and len(w) == 1 for text, w in zip(changed, words))
  assert all(len(w) == 3 or w == "zz" for (w,) in words)
  assert insertions.with_rare_words(rows, 0.0, [], seed=0) == rows and rows[0]["text"] == "the meal is good ."
