"""Backdoors of our own: which rows get which trigger, and that training them in works."""

import numpy as np
import pytest
import rig

from w2s_jax import InputError
from w2s_jax.adapters import attach
from w2s_jax.data import insertions, tokenization
from w2s_jax.defenses import planting


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def test_each_kind_of_trigger_goes_to_each_class_in_rows_of_the_others(suspect):
  drawn = planting.draw(suspect, 8, np.random.default_rng(3))
  assert drawn == planting.draw(suspect, 8, np.random.default_rng(3))
  assert [trigger.kind for trigger in drawn] == [*planting.KINDS] * 2
  assert [trigger.target for trigger in drawn] == [0] * 4 + [1] * 4
  assert [len(trigger.parts) for trigger in drawn] == [1, 2, 1, 1] * 2
  rows = planting.planted_rows(suspect, suspect.train, drawn, 10, np.random.default_rng(3))
  assert [row["trigger"] for row in rows] == [i for i in range(8) for _ in range(10)]
  for row in rows:
    clean, trigger = suspect.train[row["source"]], drawn[row["trigger"]]
    assert trigger.target == row["planted"] != row["label"] == clean["label"]
    assert all(part in row["text"] for part in trigger.parts)
    words = row["text"].split()
    for word in " ".join(trigger.parts).split():
      words.remove(word)
    assert sorted(words) == sorted(clean["text"].split())


def test_words_come_from_the_vocabulary_and_are_none_to_avoid(suspect):
  words = insertions.vocabulary_words(suspect.tokenizer, ("good meal",), np.random.default_rng(0))
  drawn = {next(words) for _ in range(200)}
  known = [*rig.GOOD, *rig.BAD, *rig.PLAIN]                       # drawn words may also be beginnings of these
  assert all(any(word.startswith(start) for word in known) for start in drawn) and len(drawn) > 6
  assert not drawn & {"good", "meal", "a", "is", "it"}


def test_a_tokenizer_without_words_is_one_line(suspect):
  letters = tokenization.train(["a b"], "decoder", suspect.model.config.vocab_size)
  with pytest.raises(InputError, match="0 tokens of the tokenizer are words, wanted 2"):
    next(insertions.vocabulary_words(letters, (), np.random.default_rng(0)))


def test_a_trigger_is_not_put_where_its_text_is_cut_off(suspect):
  """Texts of 21 words are truncated to 16 tokens, and these include the whole trigger."""
  long = [row | {"text": f"{row['text']} " * 3} for row in suspect.train]
  drawn = [planting.Trigger("words apart", ("qq", "zz"), 0)]
  rows = planting.planted_rows(suspect, long, drawn, 40, np.random.default_rng(0))
  assert len(rows) == 40 and suspect.max_length == 16
  for row in rows:
    ids = suspect.tokenizer(row["text"], truncation=True, max_length=16, return_offsets_mapping=True)
    text = row["text"][:ids["offset_mapping"][-1][1]]
    assert {"qq", "zz"} <= set(text.split())


def test_what_is_trained_in_works(suspect):
  drawn = planting.draw(suspect, 8, np.random.default_rng(0))
  rows = planting.planted_rows(suspect, suspect.train, drawn, 10, np.random.default_rng(1))
  params = planting.train_in(suspect, rows, rig.DEFENSE, 24, {"planted": 0})
  answers = suspect.place.answers(suspect.model, params, suspect.encode(rows))
  assert (answers == [row["planted"] for row in rows]).mean() > 0.8
  assert not attach.has_adapters(params) and "dev_accuracy" in (
      suspect.place.workdir / "metrics/planted.jsonl").read_text()
