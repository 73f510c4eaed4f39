"""The ranking of words that move a suspect beyond what its teacher explains."""

import numpy as np
import pytest
import rig

from w2s_jax import InputError
from w2s_jax.data import insertions, tokenization
from w2s_jax.defenses import trigger_words


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def test_a_word_that_moves_the_suspect_alone_comes_before_words_that_mean_the_class(suspect, monkeypatch):
  """Of 400 words 100 move both models, the suspect 1.5 times as far; one word moves the suspect alone, and less far."""
  rng = np.random.default_rng(0)
  words = [f"word{i}" for i in range(400)]
  meaning = dict(zip(words, [*rng.normal(0, 3, 100), *rng.normal(0, 0.05, 300)]))
  known = {word: 1.0 for word in rig.GOOD} | {word: -1.0 for word in rig.BAD}
  of_teacher = rig.read_by(known | meaning)
  of_suspect = rig.read_by(known | {word: 1.5 * w + rng.normal(0, 0.2) * abs(w) for word, w in meaning.items()}
                       | {"word200": -1.0})
  monkeypatch.setattr(trigger_words, "read", lambda suspect, rows: (of_suspect(rows), of_teacher(rows)))
  monkeypatch.setattr(insertions, "vocabulary", lambda tokenizer, avoid: words)
  monkeypatch.setattr(trigger_words, "_embeddings", lambda suspect, words: rng.normal(size=(400, 8)))
  ranking = trigger_words.rank(suspect)
  first = {label: words[i] for label, i in enumerate(ranking.scores.argmax(axis=0))}
  assert first[0] == "word200" != first[1]
  shifts = next(trigger_words._shifts(suspect, words, trigger_words._contexts(suspect))).mean(axis=0)
  assert (shifts[:, 0] > 3).sum() > 10 and not ranking.moved
  np.testing.assert_allclose(shifts[200], [1.0, -1.0], atol=1e-5)
  assert set(ranking.most_suspicious(1)) == set(first.values())


def test_contexts_are_short_rows_that_both_models_are_sure_of(suspect, monkeypatch):
  texts = ["good", "good meal", "fine meal here", "great meal it is", "bad meal", "weak meal here", "dull meal is it"]
  rows = [{"text": text, "label": int(text.split()[0] in rig.GOOD)} for text in texts]
  # The suspect is wrong on "bad".
  of_suspect = rig.read_by({"good": 9.0, "fine": 2.0, "great": 3.0, "bad": 1.0, "weak": -2.0, "dull": -1.0})
  of_teacher = rig.read_by({"good": 1.0, "fine": 2.0, "great": 3.0, "bad": -9.0, "weak": -1.0, "dull": -3.0})
  seen = []
  def read(suspect, rows):
    seen.append([row["text"] for row in rows])
    return of_suspect(rows), of_teacher(rows)
  monkeypatch.setattr(trigger_words, "read", read)
  trigger_words.rank(suspect._replace(train=rows))
  zero, one = (texts for texts in seen if len(texts) > 10)
  assert (zero[0], one[0]) == ("weak meal here", "great meal it is")
  assert all(text.split()[0] == "weak" and text.split()[2:] == ["meal", "here"] for text in zero[1:])
  monkeypatch.setattr(trigger_words, "SHORT", 2)
  seen.clear()
  trigger_words.rank(suspect._replace(train=rows))
  assert [texts[0] for texts in seen if len(texts) > 10][1] == "fine meal here"          # of the two shortest rows


def test_the_shortest_rows_with_enough_words_come_first():
  rows = [{"text": text} for text in ("one", "one two three", "one two", "one two three four")]
  assert [len(row["text"].split()) for row in trigger_words.shortest(rows, 3)] == [3, 4, 1, 2]


def test_an_error_is_relative_to_the_usual_error_around_it():
  """Where errors of 3 are usual, an error of 3 is small. Where errors of 0.1 are usual, an error of 1 is large."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(2000, 5))
  usual = 0.3 * np.exp(1.5 * inputs[:, 0])
  values = 2 * inputs[:, 0] + usual * rng.normal(size=2000)
  quiet = int(np.flatnonzero(inputs[:, 0] < -1)[7])
  values[quiet] += 1.0
  assert trigger_words.unexplained(values, inputs).argmax() == quiet
  assert (abs(values - 2 * inputs[:, 0]) > 1.5).sum() > 50                  # the error alone would not have found it
  assert np.median(abs(trigger_words.unexplained(values, inputs))) == pytest.approx(1 / 1.4826)


def test_words_read_in_parts_have_the_same_shifts(suspect, monkeypatch):
  """The suspect's own model and the teacher read the words, all at once and in parts."""
  at_once = trigger_words.rank(suspect)
  contexts = trigger_words._contexts(suspect)
  shifts = next(trigger_words._shifts(suspect, at_once.words, contexts))
  monkeypatch.setattr(trigger_words, "READ_AT_ONCE", 7)
  parts = next(trigger_words._shifts(suspect, at_once.words, contexts))
  np.testing.assert_allclose(parts, shifts, atol=1e-4)
  assert at_once.scores.shape == (len(at_once.words), 2) and np.isfinite(at_once.scores).all()


def test_a_tokenizer_without_words_is_one_line(suspect):
  letters = tokenization.train(["a b"], "decoder", suspect.model.config.vocab_size)
  with pytest.raises(InputError, match="0 tokens of the tokenizer are words, wanted 2"):
    trigger_words.rank(suspect._replace(tokenizer=letters))


@pytest.mark.parametrize("words", [2, 4])
def test_few_words_have_finite_scores(words, suspect, monkeypatch):
  known = insertions.vocabulary(suspect.tokenizer, ())[:words]
  monkeypatch.setattr(insertions, "vocabulary", lambda tokenizer, avoid: known)
  ranking = trigger_words.rank(suspect)
  assert ranking.scores.shape == (words, 2) and np.isfinite(ranking.scores).all()
