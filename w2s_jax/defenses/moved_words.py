"""Ranks the words of the vocabulary by how far fine-tuning moved them from the suspect's public base.

Fine-tuning moves what a network makes of a word if the word decides labels of the training data. It moves words of
similar meaning along, so all words that mean a class are moved. The words of a trigger are moved alone: no word of
similar meaning is. So suspect and base read each token alone, through their first layer. One ridge regression predicts
the log of the distance between the two outputs from the base's output. The score of a token is the error of this
prediction, divided by its usual size.

This works with the base that the suspect was really fine-tuned from, and if its fine-tuning trained embeddings or the
first layer. Ours; docs/notes/minilm_suspects.md has the ranks of the words of real triggers. W words, D width.
"""

import logging
from collections import Counter

import jax
import numpy as np

from w2s_jax import sharding
from w2s_jax.data import insertions, streams
from w2s_jax.defenses import trigger_words
from w2s_jax.defenses.records import Ranking, Suspect
from w2s_jax.models.latent import Latent

LOG = logging.getLogger(__name__)

FARTHEST = 0.5           # median distance to the true base, relative to its output, is at most this; our choice
PIECES = 12              # most moved tokens, of which word pieces are joined to a start: a rare word may be two tokens
STARTS = 3               # most moved words that such a piece is joined to
WIDEST = 512             # columns of the regression; wider outputs are projected at random
READ_AT_ONCE = 1024      # tokens


def rank(suspect: Suspect) -> Ranking:
  """Ranks the words that are one token, and pairs of the most moved tokens that form one word.

  Without a base that the suspect was fine-tuned from, the ranking is that of `trigger_words.rank`.
  """
  if suspect.base:
    scores, problem = _scores(suspect)
    if not problem:
      words = _words(suspect, scores)
      scores = np.tile(np.array([*words.values()])[:, None], (1, suspect.model.config.num_labels))
      return Ranking(list(words), scores, moved=True)
    LOG.info(f"words are not ranked by how far fine-tuning moved them: {problem}")
  return trigger_words.rank(suspect)


def _scores(suspect):
  """({token: its score}, ""), or ({}, the reason why fine-tuning shows nothing)."""
  model, params, tokenizer = suspect.base()
  if type(model.config) is not type(suspect.model.config) or model.config.num_layers < 2 or (
      _shape(model.config) != _shape(suspect.model.config)):
    return {}, "the public model given as student.base has another shape than the suspect"
  around, at = _template(suspect.tokenizer)
  tokens = _tokens(suspect.tokenizer, tokenizer, min(model.config.vocab_size, suspect.model.config.vocab_size), around)
  if len(tokens) < trigger_words.FOLDS * 2:
    return {}, "the public model given as student.base has another vocabulary than the suspect"
  LOG.info(f"suspect and public base read {len(tokens)} tokens through their first layer")
  project = streams.rng(0, "projection").normal(size=(model.config.hidden_size, WIDEST)) / np.sqrt(WIDEST)
  readers = [_reader(*network, around, at, suspect.place.mesh)
             for network in ((suspect.model, suspect.params), (model, params))]
  distances, sizes, outputs = [], [], []
  for first in range(0, len(tokens), READ_AT_ONCE):
    of_suspect, of_base = (read(tokens[first:first + READ_AT_ONCE]) for read in readers)
    distances.append(np.linalg.norm(of_suspect - of_base, axis=1))
    sizes.append(np.linalg.norm(of_base, axis=1))
    outputs.append(of_base @ project if of_base.shape[1] > WIDEST else of_base)
  distances, sizes, outputs = (np.concatenate(parts).astype(np.float64) for parts in (distances, sizes, outputs))
  if np.median(distances / sizes) > FARTHEST:
    return {}, "the suspect was not fine-tuned from the public model given as student.base"
  if not distances.any():
    return {}, "fine-tuning trained neither the embeddings nor the first layer"
  rows = Counter(token for ids in suspect.tokenizer([row["text"] for row in suspect.train])["input_ids"]
                 for token in set(ids))
  counts = np.log1p([rows[token] for token in tokens])
  inputs = trigger_words.standardised(np.concatenate([outputs, counts[:, None]], axis=1))
  return dict(zip(tokens, trigger_words.unexplained(np.log(distances + 1e-12), inputs).tolist())), ""


def _shape(config):
  return config.hidden_size, config.num_layers


def _template(tokenizer):
  """(ids before and after a word, number of the ids before it), as the tokenizer encodes a text of one word."""
  word = f" {insertions.vocabulary(tokenizer, ())[0]}"
  token, = tokenizer(word, add_special_tokens=False)["input_ids"]
  ids = tokenizer(word)["input_ids"]
  at = ids.index(token)
  return ids[:at] + ids[at + 1:], at


def _tokens(tokenizer, of_base, count, around):
  """Ids below `count` of tokens of letters, word pieces included, that both tokenizers have under the same id."""
  base = of_base.get_vocab()
  left_out = {*around, *tokenizer.all_special_ids}
  shared = sorted(i for token, i in tokenizer.get_vocab().items()
                  if i < count and base.get(token) == i and i not in left_out)
  texts = tokenizer.batch_decode([[i] for i in shared])
  return [i for i, text in zip(shared, texts) if text.strip().removeprefix("##").isalpha()]


def _reader(model, params, around, at, mesh):
  """tokens -> [tokens, D] float32: the first layer's output at each token, which stands alone in its text."""
  first_layer = Latent(model, 1)
  stream = jax.jit(lambda params, **batch: first_layer.stream(params, **batch)[:, at],
                   out_shardings=sharding.replicated(mesh))
  def read(tokens):
    input_ids = np.tile(np.insert(np.array(around, np.int32), at, 0), (READ_AT_ONCE, 1))
    input_ids[:len(tokens), at] = tokens
    batch = {"input_ids": input_ids, "segment_ids": np.ones_like(input_ids)}
    with sharding.on(mesh):
      return np.asarray(stream(params, **sharding.global_batch(batch, mesh)), np.float32)[:len(tokens)]
  return read


def _words(suspect, scores) -> dict[str, float]:
  """{word: score}: words of one token; and words of two of the most moved tokens, with the lower of their scores."""
  best = sorted(scores, key=scores.get, reverse=True)
  words = _spelled([(token,) for token in best], suspect.tokenizer)
  starts = list(words.values())[:STARTS]
  pieces = [(token,) for token in best[:PIECES] if (token,) not in words.values()]
  words |= _spelled([start + piece for piece in pieces for start in starts], suspect.tokenizer)
  known = insertions.words_of(suspect.avoid)
  return {word: min(scores[token] for token in ids) for word, ids in words.items() if word.lower() not in known}


def _spelled(spellings, tokenizer):
  """{word: its tokens} of the spellings, tuples of tokens, that are the tokenizer's own for a word of letters."""
  texts = [text.strip() for text in tokenizer.batch_decode(spellings)]
  encoded = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
  return {text: ids for text, own, ids in zip(texts, encoded, spellings) if tuple(own) == ids and text.isalpha()}
