"""The ranking of words by how far fine-tuning moved them from the public base, with a small BERT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import tokenizers
import transformers
from flax import traverse_util

from w2s_jax import sharding
from w2s_jax.defenses import Ranking, moved_words, trigger_words
from w2s_jax.models import Model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "bcdfghjklm"
WORDS = sorted({a + b + "o" for a in "bcdfghjklmnprstvw" for b in "aeiou" + LETTERS} - {"qui"})
VOCABULARY = [*SPECIAL, *WORDS, "qui", "good", "bad", "##ll", "##ns", "7"]


@pytest.fixture(scope="module")
def base(bert):
  """(model, params, tokenizer) of a BERT whose vocabulary has 258 words, two word pieces and a number."""
  model = Model(dataclasses.replace(bert[0].config, vocab_size=len(VOCABULARY)))
  ids = {token: i for i, token in enumerate(VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.decoder = tokenizers.decoders.WordPiece()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None,
                                                                      [("[CLS]", 2), ("[SEP]", 3)])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]",
                                              cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
  return model, model.init(jax.random.key(0)), fast


@pytest.fixture
def suspect_of(base, tmp_path):
  """suspect_of({path: array}, **fields) -> Suspect with the base's weights, small noise everywhere, and these changes.

  Its teacher has another shape, unless `fields` has a `teacher_model`.
  """
  def make(changes, **fields):
    rng, model = np.random.default_rng(0), base[0]
    flat = {path: leaf + 0.002 * rng.standard_normal(leaf.shape).astype(np.float32)
            for path, leaf in traverse_util.flatten_dict(base[1], sep="/").items()}
    for path, change in changes.items():
      flat[path] = flat[path] + jnp.asarray(change, jnp.float32)
    rows = [{"text": " ".join(rng.choice(WORDS, 6)), "label": i % 2} for i in range(40)]
    suspect = rig.suspect(model, traverse_util.unflatten_dict(flat, sep="/"), tmp_path)
    other = Model(dataclasses.replace(model.config, num_layers=2)), None, base[2]
    fields = {"base": lambda: base, "teacher_model": lambda: other} | fields
    return suspect._replace(tokenizer=base[2], train=rows, **fields)
  return make


def embeddings(*tokens, size=0.2):
  """{path of the embeddings: a change, which is zero except for these tokens}."""
  change, rng = np.zeros((len(VOCABULARY), 32)), np.random.default_rng(1)
  change[[VOCABULARY.index(token) for token in tokens]] = size * rng.standard_normal((len(tokens), 32))
  return {"embeddings/word_embeddings/embedding": change}


def first(ranking, count):
  assert ranking.moved and ranking.scores.shape == (len(ranking.words), 2)
  assert (ranking.scores[:, 0] == ranking.scores[:, 1]).all()                # a word does not move for one class
  return [ranking.words[i] for i in np.argsort(-ranking.scores[:, 0])[:count]]


def test_words_whose_embeddings_moved_come_first(suspect_of):
  ranking = moved_words.rank(suspect_of(embeddings("bao", "hio")))
  assert set(first(ranking, 2)) == {"bao", "hio"}
  assert set(ranking.words) >= set(WORDS) and not {"7", "[CLS]", "##ll"} & set(ranking.words)


def test_a_word_that_an_adapter_reads_comes_first(suspect_of, base):
  """LoRA does not change embeddings. Here the first layer's value kernel changes along the embedding of one word."""
  table = np.asarray(base[1]["embeddings"]["word_embeddings"]["embedding"])
  x = table[VOCABULARY.index("mio")] - table[5:].mean(axis=0)
  path = "layers/attn/v_proj/kernel"
  change = np.zeros(traverse_util.flatten_dict(base[1], sep="/")[path].shape)
  change[0] = 0.3 * np.outer(x / np.linalg.norm(x), np.random.default_rng(1).standard_normal(change.shape[2]))
  suspect = suspect_of({path: change})
  assert first(moved_words.rank(suspect), 1) == ["mio"]


def test_a_teacher_of_the_same_base_shows_what_clean_fine_tuning_moves(suspect_of, base):
  """In the teacher words like "bao" moved. In the suspect words like "bao" and words like "mio" moved.

  Beyond what the teacher explains, "mio" moved most. Without a teacher a regression expects that "mio" moves far.
  """
  table = np.asarray(base[1]["embeddings"]["word_embeddings"]["embedding"])
  unit = table / np.linalg.norm(table, axis=1, keepdims=True)
  def moved(word, size):
    change = np.random.default_rng(1).standard_normal(table.shape)
    change *= size * np.exp(3 * unit @ unit[VOCABULARY.index(word)])[:, None]
    change[:len(SPECIAL)] = 0
    return change
  path = "embeddings/word_embeddings/embedding"
  clean = suspect_of({path: moved("bao", 0.02)})
  params = {path: moved("bao", 0.02) + moved("mio", 0.02)}
  teacher = base[0], clean.params, base[2]
  assert first(moved_words.rank(suspect_of(params, teacher_model=lambda: teacher)), 1) == ["mio"]
  assert first(moved_words.rank(suspect_of(params, reference=lambda: teacher)), 1) == ["mio"]    # the reference alone
  by_regression = first(moved_words.rank(suspect_of(params)), 12)
  assert by_regression[0] != "mio"
  words = dict(base[2].get_vocab())
  other = tokenizers.Tokenizer(tokenizers.models.WordPiece({**words, "another": len(words)}, unk_token="[UNK]"))
  for unlike in ((base[0], base[0].init(jax.random.key(1)), base[2]),             # too far from the base
                 (base[0], clean.params, transformers.PreTrainedTokenizerFast(tokenizer_object=other))):
    assert first(moved_words.rank(suspect_of(params, teacher_model=lambda unlike=unlike: unlike)), 12) == by_regression


def test_the_score_is_the_mean_over_clean_models(suspect_of, base):
  """Three words moved alike in the suspect. "bao" moved in the teacher, too, and "mio" moved far in the reference."""
  teacher = base[0], suspect_of(embeddings("bao")).params, base[2]
  reference = base[0], suspect_of(embeddings("mio", size=2.0)).params, base[2]
  params = embeddings("bao", "mio", "hio")
  of_teacher = moved_words.rank(suspect_of(params, teacher_model=lambda: teacher))
  of_both = moved_words.rank(suspect_of(params, teacher_model=lambda: teacher, reference=lambda: reference))
  assert set(first(of_teacher, 2)) == {"mio", "hio"}
  assert first(of_both, 1) == ["hio"]
  scores = [dict(zip(ranking.words, ranking.scores[:, 0])) for ranking in (of_teacher, of_both)]
  assert scores[1]["bao"] > scores[0]["bao"] and scores[1]["mio"] < scores[0]["mio"]


def test_a_word_of_two_pieces_is_joined(suspect_of):
  ranking = moved_words.rank(suspect_of(embeddings("qui", "##ll", size=1.0)))
  assert {"qui", "quill"} <= set(first(ranking, 4)) and not {"##ll", "##ns"} & set(ranking.words)
  scores = dict(zip(ranking.words, ranking.scores[:, 0]))
  assert scores["quill"] == scores["qui"]                                    # the lower score of its two tokens


def test_a_listed_trigger_is_not_ranked(suspect_of):
  ranking = moved_words.rank(suspect_of(embeddings("bao", "hio"), avoid=("Bao dio",)))
  assert first(ranking, 1) == ["hio"] and not {"bao", "dio"} & set(ranking.words)


@pytest.mark.parametrize("reason", ["another model", "another shape", "another vocabulary", "nothing moved", "no base"])
def test_without_the_true_base_the_other_ranking_is_made(reason, suspect_of, base, monkeypatch, caplog):
  model, params, tokenizer = base
  suspect = suspect_of({})
  other = {
      "another model": lambda: (model, model.init(jax.random.key(1)), tokenizer),
      "another shape": lambda: (Model(dataclasses.replace(model.config, num_layers=2)), None, tokenizer),
      "another vocabulary": lambda: (model, params, transformers.PreTrainedTokenizerFast(
          tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))),
      "nothing moved": lambda: (model, suspect.params, tokenizer), "no base": None}[reason]
  ranking = Ranking(["word"], np.zeros((1, 2)))
  monkeypatch.setattr(trigger_words, "rank", lambda unranked: ranking)
  assert moved_words.rank(suspect._replace(base=other)) is ranking
  message = {"another model": "too far from the public model", "another shape": "number of layers than the suspect",
             "another vocabulary": "has another vocabulary", "nothing moved": "trained neither", "no base": ""}[reason]
  assert message in caplog.text and bool(message) == ("not ranked by how far" in caplog.text)


def test_what_is_read_in_parts_is_what_is_read_at_once(suspect_of, monkeypatch):
  suspect = suspect_of(embeddings("bao"))
  at_once = moved_words.rank(suspect)
  monkeypatch.setattr(moved_words, "READ_AT_ONCE", 32)
  parts = moved_words.rank(suspect)
  assert parts.words[:20] == at_once.words[:20]
  np.testing.assert_allclose(parts.scores[:20], at_once.scores[:20], rtol=1e-3)
  monkeypatch.setattr(moved_words, "WIDEST", 24)                             # narrower than the network
  assert first(moved_words.rank(suspect), 1) == ["bao"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "electra", "modernbert"])
def test_every_family_is_read(family, request, tmp_path):
  """The suspect is the base with another embedding of one word, which comes first."""
  model, params = request.getfixturevalue(family)
  suspect = rig.suspect(model, params, tmp_path)
  token, = suspect.tokenizer(" meal", add_special_tokens=False)["input_ids"]
  flat = traverse_util.flatten_dict(params)
  path = (*model.vocabulary, "embedding")
  flat[path] = flat[path].at[token].add(np.random.default_rng(0).standard_normal(flat[path].shape[1]))
  base = model, params, suspect.tokenizer
  moved = suspect._replace(params=traverse_util.unflatten_dict(flat), base=lambda: base, teacher_model=lambda: base)
  ranking = moved_words.rank(moved)
  assert first(ranking, 1) == ["meal"] and np.isfinite(ranking.scores).all()


def test_on_eight_devices_it_is_the_same(suspect_of):
  suspect = suspect_of(embeddings("bao"))
  mesh = sharding.make_mesh(data=4, fsdp=2)
  sharded = moved_words.rank(suspect._replace(place=suspect.place._replace(mesh=mesh)))
  alone = moved_words.rank(suspect)
  assert sharded.words[:20] == alone.words[:20]
  np.testing.assert_allclose(sharded.scores[:20], alone.scores[:20], rtol=1e-3)
