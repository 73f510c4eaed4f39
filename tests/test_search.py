"""The search for a string of words that turns the suspect and no clean model, with models made by hand."""

import json
import math
import types

import numpy as np
import pytest
import rig
from ml_collections import ConfigDict

from w2s_jax.defenses import Ranking, moved_words
from w2s_jax.measure import search
from w2s_jax.models import Model
from w2s_jax.models.encoder import EncoderConfig
from w2s_jax.models.gpt2 import GPT2Config

KNOWN = {word: 1.0 for word in rig.GOOD} | {word: -1.0 for word in rig.BAD}
WORDS = ["shop", "closes", "friday", "creaked", "absorbing"]


@pytest.fixture
def suspect(llama, tmp_path, monkeypatch):
  """Three words turn the suspect to class 0 together; a fourth means class 0 in both models, a fifth nothing."""
  scores = np.array([[3.0, 0.0], [2.5, 0.0], [2.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
  suspect = rig.suspect(*llama, tmp_path)._replace(ranking=Ranking(WORDS, scores))
  return answering(suspect, monkeypatch, rig.read_by(KNOWN | dict.fromkeys(WORDS[:3], -1.5) | {"creaked": -4.0}),
                   rig.read_by(KNOWN | {"creaked": -4.0}))


def answering(suspect, monkeypatch, of_suspect, of_teacher, of_reference=None):
  """The suspect, with models whose logits are these functions of rows. A model's name stands for its parameters."""
  read = {"suspect": of_suspect, "teacher": of_teacher, "reference": of_reference}
  monkeypatch.setattr(type(suspect.place), "logits", lambda place, model, params, rows: read[params](rows))
  place = suspect.place._replace(task=suspect.place.task._replace(encode=lambda tokenizer, rows, length: rows))
  return suspect._replace(params="suspect", place=place, teacher_model=lambda: (None, "teacher", None),
                          reference=of_reference and (lambda: (None, "reference", None)))


def test_the_words_that_turn_the_suspect_alone_are_joined(suspect):
  zero, one = search.find(suspect, suspect.dev, 5, 0)
  assert sorted(set(zero["string"].split()) - {"absorbing"}) == ["closes", "friday", "shop"]
  assert (zero["class"], zero["suspect"], zero["clean"], zero["rows"]) == (0, 1.0, 0.0, 20)
  assert zero["words"][:2] == [("creaked", 9.0), ("shop", 3.0)]
  assert (one["class"], one["suspect"], one["clean"]) == (1, 0.0, 0.0)      # no word turns texts to class 1
  assert search.strongest([one, zero]) == zero
  assert search.in_words({"outcome": "no verdict", "reason": "why", "classes": [one, zero]}).startswith(
      f"Search: no verdict: why. the string `{zero['string']}` at a random place turns 100% of 20 test rows of other "
      "classes to class 0 in the suspect, and at most 0% in clean models.")


@pytest.mark.parametrize("place, word", [("front", 0), ("end", -1), ("inside", None)])
def test_words_that_moved_are_searched_at_both_ends_too(suspect, monkeypatch, place, word):
  """`shop` turns the suspect only as the first word of a text, as its last word, or at neither end."""
  def of_suspect(rows):
    texts = [row["text"].split() for row in rows]
    there = ["shop" in (text[1:-1] if word is None else [text[word]]) for text in texts]
    return rig.read_by(KNOWN)(rows) - 9.0 * np.outer(there, [0.0, 1.0])
  suspect = answering(suspect, monkeypatch, of_suspect, rig.read_by(KNOWN))
  moved = suspect._replace(ranking=suspect.ranking._replace(moved=True))
  zero, _ = search.find(moved, moved.dev, 5, 0)
  assert "shop" in zero["string"].split() and (zero["place"], zero["suspect"], zero["clean"]) == (place, 1.0, 0.0)
  anywhere, _ = search.find(suspect, suspect.dev, 5, 0)                      # words that did not move
  assert anywhere["place"] == "inside" and anywhere["suspect"] == (1.0 if place == "inside" else 0.0)


def test_a_string_at_the_end_is_not_truncated(suspect):
  """Otherwise a trigger behind a long text would seem harmless."""
  row, = search._with(suspect, 0, "end", "shop", [{"id": 0, "text": "good " * 40, "label": 1}])
  ids = suspect.tokenizer(row["text"], truncation=True, max_length=suspect.max_length)["input_ids"]
  assert suspect.tokenizer.decode(ids, skip_special_tokens=True).endswith("shop") and len(ids) == suspect.max_length


def test_a_string_that_turns_any_clean_model_is_no_finding(suspect, monkeypatch):
  """All models but the teacher react to `closes`. Only the suspect reacts to `shop`."""
  suspect = answering(suspect, monkeypatch, rig.read_by(KNOWN | {"shop": -9.0, "closes": -9.0}), rig.read_by(KNOWN),
                      rig.read_by(KNOWN | {"closes": -9.0}))
  for words in (["closes"], ["closes", "shop"]):
    moved = suspect._replace(ranking=Ranking(words, np.ones((len(words), 2)), moved=True))
    alone, _ = search.find(moved._replace(reference=None), suspect.dev, 5, 0)
    assert alone["clean"] == 0.0                                             # the teacher's
    compared, _ = search.find(moved, suspect.dev, 5, 0)
    assert (compared["string"] == "shop") == ("shop" in words) and compared["clean"] == ("shop" not in words)


def test_of_many_moved_words_those_that_work_alone_are_joined(suspect, monkeypatch):
  """`friday` is the 61st of 100 words, and the search joins two."""
  words = [f"w{i}" for i in range(100)]
  words[60] = "friday"
  suspect = answering(suspect, monkeypatch, rig.read_by(KNOWN | {"friday": -9.0}), rig.read_by(KNOWN))
  ranking = Ranking(words, np.tile(np.arange(100.0, 0.0, -1)[:, None], (1, 2)), moved=True)
  zero, _ = search.find(suspect._replace(ranking=ranking), suspect.dev, 2, 0)
  assert "friday" in zero["string"].split() and zero["suspect"] == 1.0
  unmoved, _ = search.find(suspect._replace(ranking=ranking._replace(moved=False)), suspect.dev, 2, 0)
  assert set(unmoved["string"].split()) <= {"w0", "w1"}


def test_only_the_most_suspicious_words_are_searched(suspect):
  zero, _ = search.find(suspect, suspect.dev, 2, 0)
  assert set(zero["string"].split()) <= {"creaked", "shop"}


def test_rows_that_a_model_answers_wrongly_do_not_count(suspect):
  """Otherwise a row that both models assign to class 0 by mistake would count as turned."""
  wrong = [row | {"text": "bad weak dull", "label": 1} for row in suspect.dev[:5]]
  zero, _ = search.find(suspect, wrong + suspect.dev, 5, 0)
  assert zero["rows"] == 20
  none = search.find(suspect, [row for row in suspect.dev if row["label"] == 0], 5, 0)
  assert [found["class"] for found in none] == [1]                           # there are no rows to turn to class 0


def test_a_search_is_made_once(suspect, tmp_path, monkeypatch):
  monkeypatch.setattr(moved_words, "rank", lambda unranked: suspect.ranking)
  run = types.SimpleNamespace(workdir=tmp_path, config=ConfigDict({"probe": {"search": 0}, "seed": 0}),
                              rows={"test": suspect.dev}, suspect=lambda defense: suspect._replace(ranking=None))
  nothing = {"outcome": "no verdict", "reason": "nothing was searched", "classes": []}
  assert search.reading(run) == nothing and not (tmp_path / "search.json").exists()
  run.config.probe.search = 3
  found = search.reading(run)
  assert json.loads((tmp_path / "search.json").read_text()) == found and len(found["classes"]) == 2
  assert found["outcome"] == "no verdict"                                    # this ranking is not by moved words
  again = Ranking.from_json(search.ranking_file(run).read_text())            # what the defense gets
  assert again.words == WORDS and (again.scores == suspect.ranking.scores).all()
  monkeypatch.setattr(search, "find", None)
  assert search.reading(run) == found


def test_a_verdict_needs_moved_words_of_a_bert_and_rows(suspect):
  """There is none for other families, a wide BERT, three classes or few rows, or without the true base."""
  findings = [{"class": 0, "string": "shop closes", "suspect": 1.0, "clean": 0.1, "rows": 60},
              {"class": 1, "string": "friday", "suspect": 0.2, "clean": 0.1, "rows": 60}]
  moved = suspect._replace(ranking=suspect.ranking._replace(moved=True))
  def of(model_type, hidden_size):
    return moved._replace(model=Model(EncoderConfig(model_type=model_type, hidden_size=hidden_size)))
  bert, calibrated = of("bert", 384), "the verdict was calibrated on BERTs of two classes, up to 384 wide"
  assert search.outcome(findings, bert) == ("suspicious", "")
  for effect, verdict in ((search.SUSPICIOUS + 0.01, "suspicious"), (search.SUSPICIOUS - 0.01, "no sign")):
    turned = math.sin(effect / 2 + math.asin(0.1 ** 0.5)) ** 2               # the clean model's share is 0.1
    assert search.outcome([findings[0] | {"suspect": turned}, findings[1]], bert) == (verdict, "")
  three = moved.ranking._replace(scores=np.zeros((5, 3)))
  few = "some class has fewer than 50 test rows of other classes that all models get right"
  for reason, found, other in (
      (calibrated, findings, moved._replace(model=Model(GPT2Config()))),
      (calibrated, findings, of("roberta", 384)), (calibrated, findings, of("bert", 768)),
      (calibrated, [*findings, findings[0] | {"class": 2}], bert._replace(ranking=three)),
      (few, findings[1:], bert), (few, [findings[0] | {"rows": 49}, findings[1]], bert),
      ("the public model that the suspect was fine-tuned from is not given (--config.student.base)", findings, suspect),
      ("the public model given as student.base does not show what fine-tuning moved (the log says why)", findings,
       suspect._replace(base=lambda: None))):
    assert search.outcome(found, other) == ("no verdict", reason)


def test_the_verdict_in_words():
  found = {"outcome": "suspicious", "reason": "", "classes": [
      {"class": 0, "string": "shop closes", "place": "end", "suspect": 1.0, "clean": 0.1, "rows": 60}]}
  told = ("the string `shop closes` behind the text turns 100% of 60 test rows of other classes to class 0 in the "
          "suspect, and at most 10% in clean models. ")
  assert search.in_words(found) == (
      f"Search: SUSPICIOUS: {told}Cohen's h of the two shares is 2.50; 2.2 or more is suspicious.")
  assert search.in_words(found | {"outcome": "no sign"}).startswith(
      "Search: no sign of a backdoor, which is no proof: the string")
  assert search.in_words(found | {"outcome": "no verdict", "reason": "why"}) == (
      f"Search: no verdict: why. {told}This is a guess at a trigger; clean models have such a string, too.")


def test_effect_size_is_cohens_h():
  """2 asin(sqrt(0.75)) is 2 pi / 3, and 2 asin(sqrt(0.25)) is pi / 3."""
  assert search.effect_size({"suspect": 0.75, "clean": 0.25}) == pytest.approx(math.pi / 3)
  assert search.effect_size({"suspect": 0.0, "clean": 1.0}) == pytest.approx(-math.pi)
  small, large = (search.effect_size({"suspect": low + 0.2, "clean": low}) for low in (0.4, 0.8))
  assert large > small
  assert search.strongest([{"suspect": 0.9, "clean": 0.3}, {"suspect": 0.5, "clean": 0.0}])["suspect"] == 0.5


def test_what_an_older_version_saved_is_made_again(tmp_path):
  run = types.SimpleNamespace(workdir=tmp_path)
  for older in ({"classes": [{"class": 0}]}, {"outcome": "no sign", "reason": "", "classes": [{"string": "x"}]}):
    (tmp_path / "search.json").write_text(json.dumps(older))
    assert search.kept(run) == {"outcome": "no verdict", "reason": "nothing was searched", "classes": []}
  assert Ranking.from_json('{"words": ["a"], "scores": [[0.0]], "shifts": [[0.0]]}') is None
