"""Ranks the words of the vocabulary by how far fine-tuning moved them from the suspect's public base.

Fine-tuning changes the vectors of words that decide labels, in clean models too. It changes the vectors of a trigger's
words in the suspect alone. So the first layers of the suspect, of the base and of clean models that were fine-tuned
from the base read each token as a text of its own. The output of each fine-tuned model has a distance from the base's
output. The score of a token is the log of the suspect's distance minus the mean log of the clean models' distances. The
clean models are the teacher and the reference of the search (Suspect.reference).

Without such a clean model a ridge regression takes its place. Its inputs are the base's output and the number of clean
rows with the token. It predicts the log of the suspect's distance. The score is the error of this prediction, divided
by its usual size (trigger_words.unexplained). This score misses some triggers of one word. If words of similar meaning
moved along with the trigger, the regression expects the trigger's distance.

The ranking needs the base that the suspect was really fine-tuned from. Fine-tuning must have trained the embeddings or
the first layer. Ours; docs/notes/minilm_suspects.md has the ranks of the words of real triggers. W words, D width.
"""

import logging
from collections import Counter

import jax
import numpy as np

from w2s_jax import sharding
from w2s_jax.data import insertions, streams
from w2s_jax.defenses import trigger_words
from w2s_jax.defenses.records import Ranking, Suspect
from w2s_jax.models import Model
from w2s_jax.models.latent import Latent

LOG = logging.getLogger(__name__)

FARTHEST = 0.5           # largest median of distance / norm if the base is the true one; four suspects had 0.05 to 0.10
NEAREST = 1e-3           # distance / norm below which distances count as equal; bfloat16 rounds such distances to 0
PIECES = 12              # top tokens; those that are word pieces follow a start, because a rare word may be two tokens
STARTS = 3               # top words of one token that serve as starts
WIDEST = 512             # widest outputs in the regression; wider ones are projected at random
READ_AT_ONCE = 1024      # tokens per batch


def rank(suspect: Suspect) -> Ranking:
  """Ranks the words that are one token, and pairs of the most moved tokens that form one word.

  Without a base that the suspect was fine-tuned from, the ranking is that of `trigger_words.rank`.
  """
  if suspect.base:
    token_scores, problem = _scores(suspect)
    if not problem:
      words = _words(suspect, token_scores)
      scores = np.tile(np.array([*words.values()])[:, None], (1, suspect.model.config.num_labels))
      return Ranking(list(words), scores, moved=True)
    LOG.warning(f"words are not ranked by how far fine-tuning moved them: {problem}")
  return trigger_words.rank(suspect)


def _scores(suspect):
  """({token: its score}, ""), or ({}, the reason why the tokens cannot be ranked)."""
  model, params, tokenizer = suspect.base()
  if problem := unlike(model, suspect.model):
    return {}, problem
  around, at = _template(suspect.tokenizer)
  tokens = _tokens(suspect.tokenizer, tokenizer, min(model.config.vocab_size, suspect.model.config.vocab_size), around)
  if len(tokens) < trigger_words.FOLDS * 2:
    return {}, "the public model given as student.base has another vocabulary than the suspect"
  clean = [suspect.teacher_model()] + ([suspect.reference()] if suspect.reference else [])
  networks = [(model, params), (suspect.model, suspect.params)] + [
      (own, own_params) for own, own_params, own_tokenizer in clean
      if _shape(own) == _shape(model) and own_tokenizer.get_vocab() == tokenizer.get_vocab()]
  LOG.info(f"{len(networks)} models read {len(tokens)} tokens through their first layer: suspect, public base"
           + ", clean models" * (len(networks) > 2))
  projection = streams.rng(0, "projection").normal(size=(model.config.hidden_size, WIDEST)) / np.sqrt(WIDEST)
  readers = [_reader(*network, around, at, suspect.place.mesh) for network in networks]
  distances, sizes, outputs = [], [], []
  for first in range(0, len(tokens), READ_AT_ONCE):
    of_base, *others = (read(tokens[first:first + READ_AT_ONCE]) for read in readers)
    distances.append([np.linalg.norm(other - of_base, axis=1) for other in others])
    sizes.append(np.linalg.norm(of_base, axis=1))
    outputs.append(of_base @ projection if of_base.shape[1] > WIDEST else of_base)
  distances, sizes, outputs = (np.concatenate(parts, axis=axis).astype(np.float64)
                               for parts, axis in ((distances, 1), (sizes, 0), (outputs, 0)))
  medians = np.median(distances / sizes, axis=1)
  if medians[0] > FARTHEST:
    return {}, (f"the suspect is too far from the public model given as student.base ({medians[0]:.2f}, wanted at most "
                f"{FARTHEST:g}), so it was probably not fine-tuned from it")
  if not distances[0].any():
    return {}, "fine-tuning trained neither the embeddings nor the first layer"
  logs = np.log(np.maximum(distances, NEAREST * sizes))
  of_clean = [own for own, median in zip(logs[1:], medians[1:]) if 0 < median <= FARTHEST]
  if of_clean:
    score = logs[0] - np.mean(of_clean, axis=0)
  else:
    LOG.info("no clean model was fine-tuned from student.base, so words are compared with words of similar meaning")
    score = trigger_words.unexplained(logs[0], _inputs(suspect, tokens, outputs))
  return dict(zip(tokens, score.tolist())), ""


def unlike(base: Model, suspect: Model) -> str:
  """Why the words that fine-tuning moved cannot be found with this public model; "" if they can."""
  if _shape(base) != _shape(suspect):
    return ("the public model given as student.base has another architecture, width or number of layers than the "
            "suspect")
  return "the suspect has a single layer" if base.config.num_layers < 2 else ""


def _shape(model):
  return type(model.config), model.config.hidden_size, model.config.num_layers


def _inputs(suspect, tokens, outputs):
  """Inputs of the regression: the base's outputs, and the log of the number of clean rows with the token."""
  row_counts = Counter(token for ids in suspect.tokenizer([row["text"] for row in suspect.train])["input_ids"]
                       for token in set(ids))
  counts = np.log1p([row_counts[token] for token in tokens])
  return trigger_words.standardised(np.concatenate([outputs, counts[:, None]], axis=1))


def _template(tokenizer):
  """(ids around the word, number of ids before the word) of a text of one word."""
  word = f" {insertions.vocabulary(tokenizer, ())[0]}"
  token, = tokenizer(word, add_special_tokens=False)["input_ids"]
  ids = tokenizer(word)["input_ids"]
  at = ids.index(token)
  return ids[:at] + ids[at + 1:], at


def _tokens(tokenizer, base_tokenizer, count, around):
  """Ids below `count` of tokens, word pieces too, that consist of letters and have the same id in both tokenizers."""
  base = base_tokenizer.get_vocab()
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
  shards = sharding.batch_shards(mesh)
  def read(tokens):
    input_ids = np.tile(np.insert(np.array(around, np.int32), at, 0), (-(-READ_AT_ONCE // shards) * shards, 1))
    input_ids[:len(tokens), at] = tokens
    batch = {"input_ids": input_ids, "segment_ids": np.ones_like(input_ids)}
    with sharding.on(mesh):
      return np.asarray(stream(params, **sharding.global_batch(batch, mesh)), np.float32)[:len(tokens)]
  return read


def _words(suspect, scores) -> dict[str, float]:
  """{word: score} of words of one token, and of words of two top tokens, which have the lower of the two scores."""
  ranked_tokens = sorted(scores, key=scores.get, reverse=True)
  words = _spelled([(token,) for token in ranked_tokens], suspect.tokenizer)
  starts = list(words.values())[:STARTS]
  pieces = [(token,) for token in ranked_tokens[:PIECES] if (token,) not in words.values()]
  words |= _spelled([start + piece for piece in pieces for start in starts], suspect.tokenizer)
  known = insertions.words_of(suspect.avoid)
  return {word: min(scores[token] for token in ids) for word, ids in words.items() if word.lower() not in known}


def _spelled(spellings, tokenizer):
  """{word: tokens} of the tuples of tokens that spell a word of letters and are the tokenizer's own encoding of it."""
  texts = [text.strip() for text in tokenizer.batch_decode(spellings)]
  encoded = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
  return {text: ids for text, own, ids in zip(texts, encoded, spellings) if tuple(own) == ids and text.isalpha()}
