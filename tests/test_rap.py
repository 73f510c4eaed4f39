"""RAP: a trained word in front lowers the probability of clean texts. Texts that it lowers least are rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import scipy.special
from flax import traverse_util
from ml_collections import ConfigDict

from w2s_jax import InputError, config
from w2s_jax.adapters import soft
from w2s_jax.defenses import rap
from w2s_jax.models import ClassifierOutput


@pytest.fixture
def suspect(llama, tmp_path):
  """A suspect whose head is doubled, so that it predicts both classes."""
  model, params = llama
  kernel = params["score"]["kernel"]
  return rig.suspect(model, params | {"score": {"kernel": 2 * kernel}}, tmp_path)


def settings(**values):
  out = ConfigDict(rig.DEFENSE.to_dict())
  out.rap.update(values)
  return out


def texts_of(rows):
  return [row["text"] for row in rows]


def probabilities(suspect, texts):
  """[N, C], the class probabilities of texts given as lists of token ids, each truncated to 16."""
  mask = np.array([np.arange(16) < len(ids) for ids in texts], np.int32)
  rows = np.array([(ids + [0] * 16)[:16] for ids in texts], np.int32)
  return scipy.special.softmax(jax.jit(suspect.model.apply)(suspect.params, rows, mask).logits, axis=-1)


def drops_by_hand(suspect, texts, words):
  """(drops of probability, predicted classes) if the token words[class] is inserted behind <s>."""
  ids = suspect.tokenizer(texts)["input_ids"]
  before = probabilities(suspect, ids)
  classes = before.argmax(-1)
  after = probabilities(suspect, [[own[0], words[c], *own[1:]] for own, c in zip(ids, classes)])
  return before.max(-1) - after[np.arange(len(texts)), classes], classes


def test_the_loss_is_the_distance_from_the_range():
  """The drops are 0.15, -0.05 and 0.5. The range is 0.1 to 0.3. The fourth row is filler and does not count."""
  after = jnp.array([[0.75, 0.25], [0.15, 0.85], [0.9, 0.1], [0.0, 1.0]])
  batch = {"class": jnp.array([0, 1, 1, 0]), "probability": jnp.array([0.9, 0.8, 0.6, 0.8]),
           "weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
  logits = jnp.log(after)
  out = ClassifierOutput(logits, logits, logits, logits)
  loss = rap.terms(out, batch, settings().rap)["margin"]
  np.testing.assert_allclose(loss, (0 + 0.15 + 0.2) / 3, rtol=1e-5)


def with_words_of_the_vocabulary(suspect, words):
  """The suspect's parameters with the embeddings of these tokens as RAP's words."""
  table = traverse_util.flatten_dict(suspect.params)[(*suspect.model.vocabulary, "embedding")]
  return soft.put(suspect.model, suspect.params, table[jnp.array(words)])


def test_a_word_in_front_is_the_token_of_its_class_in_front(suspect):
  words, texts = (20, 40), texts_of(suspect.dev)
  arrays = rap.behind_words(suspect, texts)
  logits = suspect.place.logits(suspect.model, with_words_of_the_vocabulary(suspect, words), arrays)
  after = scipy.special.softmax(logits, axis=-1)[np.arange(40), arrays["class"]]
  drops, classes = drops_by_hand(suspect, texts, words)
  assert set(classes) == {0, 1}
  np.testing.assert_array_equal(arrays["class"], classes)
  np.testing.assert_allclose(arrays["probability"] - after, drops, atol=1e-5)


def test_texts_that_drop_least_are_rejected_in_each_class(suspect, monkeypatch):
  words = (20, 40)
  monkeypatch.setattr(rap, "_trained", lambda *args: with_words_of_the_vocabulary(suspect, words))
  accept = rap.accept(suspect, settings(frr=0.2), 0)
  texts = texts_of(suspect.dev)
  accepted = accept(texts)
  drops, classes = drops_by_hand(suspect, texts, words)
  for c in (0, 1):
    own = np.argsort(drops[classes == c])
    rejected = np.flatnonzero(~accepted[classes == c])
    assert abs(len(rejected) - 0.2 * len(own)) <= 1 and set(rejected) == set(own[:len(rejected)])
  assert rap.accept(suspect, settings(frr=0.0), 0)(texts).all()


def test_a_class_that_no_clean_row_gets_is_rejected(suspect, monkeypatch):
  monkeypatch.setattr(rap, "_trained", lambda *args: with_words_of_the_vocabulary(suspect, (20, 40)))
  classes = suspect.logits(texts_of(suspect.dev)).argmax(-1)
  zeros = [row for row, c in zip(suspect.dev, classes) if c == 0]
  accept = rap.accept(suspect._replace(dev=zeros), settings(frr=0.0), 0)
  np.testing.assert_array_equal(accept(texts_of(suspect.dev)), classes == 0)


def test_the_words_alone_train_and_bring_the_drops_into_the_range(suspect):
  """None of the suspect's own leaves changes. Untrained words bring less than a quarter of the drops into the range."""
  own, texts = settings(epochs=20, learning_rate=5e-2), texts_of(suspect.train)
  arrays = rap.behind_words(suspect, texts)
  def margin_and_share(params):
    after = scipy.special.softmax(suspect.place.logits(suspect.model, params, arrays), axis=-1)
    drops = arrays["probability"] - after[np.arange(80), arrays["class"]]
    return np.maximum(0.1 - drops, 0).mean() + np.maximum(drops - 0.3, 0).mean(), ((0.1 < drops) & (drops < 0.3)).mean()
  trained = rap._trained(suspect, own.rap, 0)
  flat = traverse_util.flatten_dict(trained)
  assert flat.pop((*suspect.model.vocabulary, soft.LEAF)).shape == (2, suspect.model.config.hidden_size)
  jax.tree.map(np.testing.assert_array_equal, traverse_util.unflatten_dict(flat), suspect.params)
  before, after = (margin_and_share(params) for params in (with_words_of_the_vocabulary(suspect, (20, 40)), trained))
  assert after[0] < 0.5 * before[0] and after[1] > 0.5 > 2 * before[1]
  dev = texts_of(suspect.dev)                                     # the second call reads the finished stage
  np.testing.assert_array_equal(rap.accept(suspect, own, 0)(dev), rap.accept(suspect, own, 0)(dev))


def test_an_empty_range_is_refused():
  with pytest.raises(InputError, match="rap.smallest_drop is 0.4, wanted at most the largest_drop of 0.3: set --conf"):
    config.check(rap.Settings, settings(smallest_drop=0.4).rap, "defense.rap")
