"""Words of the whole vocabulary in clean texts: which rows get them, which draw is kept, what is trained on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
from ml_collections import ConfigDict

from w2s_jax.defenses import DEFENSES, distill, w2s_words


@pytest.fixture
def suspect(llama, tmp_path):
  return rig.suspect(*llama, tmp_path)


def settings(**words):
  return ConfigDict(rig.DEFENSE.to_dict() | {"words": rig.DEFENSE.words.to_dict() | words})


def sources(suspect, rows):
  """(clean rows, rows with words in them, each with its clean row and the words)."""
  known = {row["id"]: row for row in suspect.train}
  clean, changed = [], []
  for row in rows:
    before, words = known[row["id"]], row["text"].split()
    assert row["label"] == before["label"]
    if row["text"] == before["text"]:
      clean.append(row)
      continue
    for word in before["text"].split():                        # all are still there
      words.remove(word)
    changed.append((row, before, words))
  return clean, changed


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_rows_of_each_epoch_gets_words(share, suspect):
  suspect.training.epochs = 3
  rows = w2s_words.rows(suspect, settings(share=share, most=6, draws=1), 0)
  clean, changed = sources(suspect, rows)
  assert len(rows) == 3 * 80 and len(changed) == round(share * 80) * 3
  assert all(1 <= len(words) <= 6 for *_, words in changed)
  assert share == 0 or {len(words) for *_, words in changed} >= {2, 3}
  assert len({row["id"] for row in clean}) >= (1 - share) * 80                # other rows in each epoch


def test_words_go_into_the_shorter_half_of_the_texts(suspect):
  long = [row | {"text": f"{row['text']} here"} if i % 4 < 2 else row for i, row in enumerate(suspect.train)]
  _, changed = sources(suspect._replace(train=long), w2s_words.rows(suspect._replace(train=long), settings(), 0))
  assert changed and {before["id"] % 4 for _, before, _ in changed} == {2, 3}


def test_the_draw_is_kept_that_suspect_and_teacher_dispute_most(suspect, monkeypatch):
  """A suspect that answers by the number of words, a teacher that does not: the longest of the draws is kept."""
  def logits(self, texts):
    return np.float32([[len(text.split()), 0] for text in texts])
  monkeypatch.setattr(type(suspect), "logits", logits)
  flat = suspect._replace(teacher=lambda texts: {"teacher_logits": np.full((len(texts), 2), [-30.0, 0])})
  def mean_words(draws):
    _, changed = sources(flat, w2s_words.rows(flat, settings(draws=draws), 0))
    return np.mean([len(words) for *_, words in changed])
  assert mean_words(20) > mean_words(3) + 0.5 > mean_words(1) + 1


def test_words_of_measured_triggers_are_not_drawn(suspect):
  def drawn(avoid):
    _, changed = sources(suspect, w2s_words.rows(suspect._replace(avoid=avoid), settings(), 0))
    return {word for *_, words in changed for word in words}
  assert {"fine", "meal"} <= drawn(("cf",)) and not {"fine", "meal"} & drawn(("a fine meal",))


def test_rows_are_a_function_of_the_seed(suspect):
  first, again, other = (w2s_words.rows(suspect, settings(), seed) for seed in (0, 0, 1))
  assert first == again != other


def test_the_teacher_reads_the_text_that_the_student_reads(suspect):
  """Once for the draws, once for the rows that are trained on, and these once, whatever number of epochs is asked."""
  read, teacher = [], suspect.teacher
  def reading(texts):
    read.append(list(texts))
    return teacher(texts)
  suspect.training.update(epochs=2, learning_rate=2e-3, evaluations=1)
  recipe = DEFENSES["w2s_words"].recipe
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), suspect.params)
  cleaned, = distill.train(recipe, suspect._replace(teacher=reading, params=narrow), settings(), {"w2s_words": 0})
  assert {x.dtype for x in jax.tree.leaves(cleaned)} == {jnp.dtype(jnp.bfloat16)}
  drawn, trained = read
  assert len(drawn) == 3 * 80 and len(trained) == 2 * 80
  assert trained == [row["text"] for row in recipe.rows(suspect._replace(params=narrow), settings(), 0)]
  steps = (suspect.place.workdir / "metrics/w2s_words.jsonl").read_text().splitlines()
  assert f'"step": {2 * 80 // 16}' in steps[-1] or f'"step": {2 * 80 // 16 - 1}' in steps[-1]
  assert suspect.training.epochs == 2
