"""Words of the whole vocabulary in clean texts: which rows get them, which draw is kept, what is trained on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
from ml_collections import ConfigDict

from w2s_jax.defenses import DEFENSES, Ranking, distill, moved_words, records, trigger_words, w2s_words
from w2s_jax.training import stage


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def settings(**words):
  """Settings with which words are drawn from the whole vocabulary, unless `words` says otherwise."""
  return ConfigDict(rig.DEFENSE.to_dict() | {"words": rig.DEFENSE.words.to_dict() | {"pool": 0} | words})


def sources(suspect, rows):
  """(rows without inserted words, [(row, its clean row, its inserted words)] of the others)."""
  known = {row["id"]: row for row in suspect.train}
  clean, changed = [], []
  for row in rows:
    before, words = known[row["id"]], row["text"].split()
    assert row["label"] == before["label"]
    if row["text"] == before["text"]:
      clean.append(row)
      continue
    for word in before["text"].split():                        # the text keeps its own words
      words.remove(word)
    changed.append((row, before, words))
  return clean, changed


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_rows_of_each_epoch_gets_words(share, suspect):
  suspect.training.epochs = 3
  rows = w2s_words.rows(suspect, settings(share=share, most=6, draws=1), 0)
  _, changed = sources(suspect, rows)
  assert len(rows) == 3 * 80 and len(changed) == round(share * 80) * 3
  assert all(1 <= len(words) <= 6 for *_, words in changed)
  assert share == 0 or {len(words) for *_, words in changed} >= {2, 3}
  assert share in (0, 1) or len({before["id"] for _, before, _ in changed}) > share * 80     # each epoch draws its own


def test_words_go_into_the_shorter_half_of_the_texts(suspect):
  long = [row | {"text": f"{row['text']} here"} if i % 4 < 2 else row for i, row in enumerate(suspect.train)]
  _, changed = sources(suspect._replace(train=long), w2s_words.rows(suspect._replace(train=long), settings(), 0))
  assert changed and {before["id"] % 4 for _, before, _ in changed} == {2, 3}


def test_the_draw_is_kept_that_suspect_and_teacher_dispute_most(suspect, monkeypatch):
  """The suspect's logits grow with the number of words, the teacher's do not. So the longest draw is kept."""
  def logits(self, model, params, arrays):
    return np.stack([arrays["length"], np.zeros(len(arrays["length"]))], axis=1).astype(np.float32)
  def teacher(rows, keep):
    assert not keep and len(rows) <= 500
    return {"teacher_logits": np.full((len(rows), 2), [-30.0, 0])}
  monkeypatch.setattr(type(suspect.place), "logits", logits)
  monkeypatch.setattr(trigger_words, "READ_AT_ONCE", 500)
  flat = suspect._replace(teacher=teacher, max_length=64)
  def mean_words(draws):
    _, changed = sources(flat, w2s_words.rows(flat, settings(draws=draws), 0))
    return np.mean([len(words) for *_, words in changed])
  assert mean_words(20) > mean_words(3) + 0.5 > mean_words(1) + 1


def test_words_of_measured_triggers_are_not_drawn(suspect):
  def drawn(avoid):
    _, changed = sources(suspect, w2s_words.rows(suspect._replace(avoid=avoid), settings(), 0))
    return {word for *_, words in changed for word in words}
  assert {"fine", "meal"} <= drawn(("cf",)) and not {"fine", "meal"} & drawn(("a fine meal",))


def test_from_base_words_draws_from_the_whole_vocabulary_and_reads_no_model(suspect):
  """A quarter of the rows of three epochs keep their labels and get words, none of them of a measured trigger."""
  def unread(*args, **kwargs):
    raise AssertionError("a model was read")
  suspect.training.epochs = 3
  blind = suspect._replace(teacher=unread, params=None, avoid=("a fine meal",))
  rows = DEFENSES["from_base_words"].recipe.rows(blind, rig.DEFENSE, 0)
  clean, changed = sources(suspect, rows)
  assert (len(clean), len(changed)) == (180, 60)
  drawn = {word for *_, words in changed for word in words}
  assert len(drawn) > 10 and not {"fine", "meal"} & drawn


def test_a_pool_is_the_most_suspicious_words_of_each_class(suspect, monkeypatch):
  scores = np.zeros((4, 2))
  scores[2, 0] = scores[1, 1] = 5.0
  ranking = Ranking(["meal", "room", "fine", "poor"], scores)
  def drawn(suspect):
    _, changed = sources(suspect, w2s_words.rows(suspect, settings(pool=1), 0))
    return {word for *_, words in changed for word in words}
  monkeypatch.setattr(moved_words, "rank", lambda suspect: ranking)
  assert drawn(suspect) == {"fine", "room"}
  monkeypatch.setattr(records, "MOVED", 1)
  moved = ranking._replace(scores=np.tile([[1.0], [4.0], [2.0], [3.0]], 2), moved=True)
  assert moved.most_suspicious(3) == ["room"]
  assert moved._replace(moved=False).most_suspicious(3) == ["fine", "poor", "room"]
  monkeypatch.setattr(moved_words, "rank", None)                   # the search has ranked the words before
  assert drawn(suspect._replace(ranking=ranking._replace(scores=-scores))) == {"meal"}


def test_rows_are_a_function_of_the_seed(suspect):
  first, again, other = (w2s_words.rows(suspect, settings(), seed) for seed in (0, 0, 1))
  assert first == again != other


def test_words_are_within_what_is_not_cut_off(suspect):
  """Texts of 28 words are truncated to 16 tokens, and these include the inserted words."""
  long = suspect._replace(train=[row | {"text": " ".join([row["text"]] * 4)} for row in suspect.train])
  for row, _, words in sources(long, w2s_words.rows(long, settings(share=1.0, most=4, draws=1), 0))[1]:
    ids = suspect.tokenizer(row["text"], truncation=True, max_length=16)["input_ids"]
    left = suspect.tokenizer.decode(ids, skip_special_tokens=True).split()
    assert all(left.count(word) for word in words)


def test_few_steps_read_few_rows(suspect):
  suspect.training.update(epochs=50, max_steps=11)                            # 11 x 16 rows are fewer than 3 x 80
  assert len(w2s_words.rows(suspect, settings(), 0)) == 3 * 80


def test_the_teacher_reads_the_text_that_the_student_reads(suspect, monkeypatch):
  """It reads the draws once and the rows once. The rows are those of all epochs, so they train for one epoch."""
  read, trained = [], {}
  def teacher(rows, keep=True):
    read.append(rows)
    lengths = suspect.encode(rows)["length"].astype(np.float32)              # features that say which text was read
    return {"teacher_logits": np.zeros((len(rows), 2), np.float32), "teacher_features": np.tile(lengths[:, None], 32)}
  def train_stage(plan, starts, arrays, dev, place):
    trained.update(arrays[0], epochs=plan.settings.epochs)
    return starts
  monkeypatch.setattr(stage, "train_stage", train_stage)
  suspect.training.update(epochs=2)
  distill.train(DEFENSES["w2s_words"].recipe, suspect._replace(teacher=teacher), settings(), {"w2s_words": 0})
  assert [len(rows) for rows in read] == [3 * 80, 2 * 80]
  assert trained["epochs"] == 1 and suspect.training.epochs == 2
  np.testing.assert_array_equal(trained["input_ids"], suspect.encode(read[1])["input_ids"])
  np.testing.assert_array_equal(trained["teacher_features"][:, 0], trained["length"])


def test_two_seeds_train_and_keep_the_dtypes(suspect):
  suspect.training.update(epochs=8, learning_rate=5e-2)
  narrow = suspect._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), suspect.params))
  cleaned = distill.train(DEFENSES["w2s_words"].recipe, narrow, settings(), {"w2s_words": 0, "w2s_words-seed1": 1})
  dev = suspect.encode(suspect.dev)
  for params in cleaned:
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert suspect.place.task.is_correct(suspect.place.answers(suspect.model, params, dev), dev).mean() > 0.8
