"""A directory with a sentencepiece model alone has the token ids of sentencepiece and transformers.

The models are trained here, with the settings of the published ones.
"""

import json
import sys

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from w2s_jax import InputError
from w2s_jax.data import grammar, tokenization
from w2s_jax.models import load_pretrained
from w2s_jax.training import embedding_row

# Fields of lmsys/vicuna-7b-v1.5's tokenizer_config.json that differ between models. It has no tokenizer.json.
VICUNA = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False, pad_token=None,
              bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096, padding_side="right")
LLAMA = dict(model_type="bpe", vocab_size=512, byte_fallback=True, split_digits=True, add_dummy_prefix=True,
             normalization_rule_name="identity", remove_extra_whitespaces=False)
XLM_ROBERTA = dict(model_type="unigram", vocab_size=110)                 # <unk>, <s>, </s>: 0, 1, 2 here and in LLAMA
DEBERTA = dict(model_type="unigram", vocab_size=110, pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]",
               bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
CORPUS = [row["text"] for row in grammar.rows("phrases", "train", 500)]
TEXTS = [*CORPUS[:30], "The  meal\nis 3.14 good  ", "naïve 東京", "mn cf", "a", "Zürich: 10 000 €"]


def make(directory, file, model_type, spec, **config):
  """Trains a sentencepiece model, writes it with config files into `directory`, and returns its processor."""
  directory.mkdir(exist_ok=True)
  with (directory / file).open("wb") as f:
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=f, minloglevel=2, **spec)
  if not (directory / "config.json").exists():
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
  if config:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
  return sentencepiece.SentencePieceProcessor(model_file=str(directory / file))


def vicuna(directory):
  return make(directory, "tokenizer.model", "llama", LLAMA, **VICUNA)


# ids_of(sentencepiece's ids) -> the family's. XLM-RoBERTa has <s>, <pad>, </s> and <unk> in front of all other pieces.
@pytest.mark.parametrize("file,model_type,spec,config,ids_of", [
    ("tokenizer.model", "llama", LLAMA, VICUNA, lambda ids: [1, *ids]),
    ("tokenizer.model", "llama", LLAMA, {}, lambda ids: ids),            # transformers 5 adds <s> only if told to
    ("sentencepiece.bpe.model", "xlm-roberta", XLM_ROBERTA, {}, lambda ids: [0, *(i + 1 if i else 3 for i in ids), 2]),
    ("spm.model", "deberta-v2", DEBERTA, {}, lambda ids: [1, *ids, 2])],
    ids=["vicuna", "llama", "xlm-roberta", "deberta"])
def test_token_ids_are_sentencepieces_and_transformers(file, model_type, spec, config, ids_of, tmp_path):
  processor = make(tmp_path, file, model_type, spec, **config)
  tokenizer = tokenization.load(tmp_path, 600)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    got = tokenizer(text)["input_ids"]
    assert got == ids_of(processor.encode(text)) == theirs(text)["input_ids"], text
  for text in (" leading", "x</s> y", "10\u00a0000", "", " "):   # where transformers and sentencepiece differ
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
  tokenizer.save_pretrained(tmp_path / "saved")                          # as tokenizer.json, which needs no package
  (tmp_path / "saved/config.json").write_text(json.dumps({"model_type": model_type}))
  assert [p.name for p in (tmp_path / "saved").glob("*.json")].count("tokenizer.json") == 1
  again = tokenization.load(tmp_path / "saved", 600)
  assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_logits_of_a_vicuna_directory_are_transformers(tmp_path):
  """transformers' model reads sentencepiece's ids of one text at a time, ours a batch of texts."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4, initializer_range=0.3, num_labels=2, pad_token_id=0)
  theirs = transformers.LlamaForSequenceClassification(config).eval()
  theirs.save_pretrained(tmp_path)
  processor = vicuna(tmp_path)
  model, params = load_pretrained(tmp_path)
  batch = tokenization.encode(tokenization.load(tmp_path, 512), TEXTS, 32)
  mask = np.arange(32) < batch["length"][:, None]
  got = np.asarray(model.apply(params, batch["input_ids"], mask.astype(np.int32)).logits)
  with torch.no_grad():
    want = [theirs(torch.tensor([[1, *processor.encode(text)][:32]])).logits[0].numpy() for text in TEXTS]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
  assert np.ptp(got) > 0.5


def test_the_token_of_a_word_is_that_behind_another_word(tmp_path):
  vicuna(tmp_path)
  tokenizer = tokenization.load(tmp_path, 600)
  assert tokenizer.convert_ids_to_tokens(embedding_row.token_of(tokenizer, "good")) == "▁good"


def test_without_sentencepiece_one_line_names_it(tmp_path, monkeypatch):
  vicuna(tmp_path)
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(InputError, match=r"is tokenizer.model alone, which needs sentencepiece .*pip install "
                                       r"'sentencepiece>=0.2,<0.3', or put the model's tokenizer.json there") as error:
    tokenization.load(tmp_path, 512)
  assert str(error.value).isprintable()


def test_a_damaged_model_is_not_called_tiktokens(tmp_path):
  vicuna(tmp_path)
  file = tmp_path / "tokenizer.model"
  file.write_bytes(file.read_bytes()[:-7])
  with pytest.raises(InputError, match="no tokenizer to be had .*pars") as error:
    tokenization.load(tmp_path, 512)
  assert str(error.value).isprintable() and "tiktoken" not in str(error.value)


def test_a_model_with_more_pieces_than_the_embeddings_is_refused(tmp_path):
  vicuna(tmp_path)
  with pytest.raises(InputError, match="has 512 tokens, the model only 511"):
    tokenization.load(tmp_path, 511)
