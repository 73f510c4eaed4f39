"""Loads Hugging Face fast tokenizers, trains the offline ones, encodes texts, counts words that truncation keeps."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from w2s_jax import InputError

# Files that may hold a tokenizer's vocabulary. Without any, transformers gives some model types an empty tokenizer.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE_FILES)
OWN = "give the model's own tokenizer"
READ = r"(config|vocab|merges|chat_template|.*token.*)\.(json|txt|jinja)|.*\.model"     # files that transformers reads
READ_BYTES = 64 << 20                                                                  # per file; no real one is larger


def load(directory: str | Path, vocab_size: int) -> Any:
  """The directory's fast tokenizer, with a padding token.

  A tokenizer that names no padding token gets that of config.json, provided it is one of the tokenizer's added tokens.
  Otherwise the end token becomes the padding token.

  Raises:
    InputError: the directory has no tokenizer, or one that is not fast, needs code of its own, has token ids beyond
      `vocab_size`, or has neither a padding nor an end token.
  """
  directory = Path(directory)
  try:
    return _load(directory, vocab_size)
  except InputError:
    raise
  except BaseException as e:  # transformers raises many types; a panic in Rust is a BaseException, no Exception
    if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
      raise
    raise InputError(f"no tokenizer to be had from {directory} ({str(e)[:200]!r}): put the model's "
                     "tokenizer.json and tokenizer_config.json into its directory") from e


def _load(directory, vocab_size):
  vocabularies = [name for name in VOCABULARY_FILES if (directory / name).is_file()]
  if not vocabularies:
    raise ValueError(f"none of {', '.join(VOCABULARY_FILES)}")
  for file in [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]:
    if not (file.is_file() or file.is_dir()):
      raise ValueError(f"{file.name} is neither a file nor a directory")
    if re.fullmatch(READ, file.name) and file.stat().st_size > READ_BYTES:
      raise ValueError(f"{file.name} has {file.stat().st_size} bytes, at most {READ_BYTES} are read")
  if set(vocabularies) <= set(SENTENCEPIECE_FILES):
    for name in vocabularies:                                  # the model type decides which one is read
      _check_sentencepiece(directory / name)
  import transformers  # late: it loads PyTorch if that is installed, and neither --help nor a refusal needs it
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory, config=_config(directory, vocab_size),
                                                         use_fast=True, trust_remote_code=False)
  if not tokenizer.is_fast:
    raise InputError(f"the tokenizer of {directory} is not a fast one: save it as tokenizer.json first")
  if len(tokenizer) > vocab_size:
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    advice = _advice(added, vocab_size) if tokenizer.vocab_size <= vocab_size else OWN
    raise InputError(f"the tokenizer of {directory} has {len(tokenizer)} tokens, the model only {vocab_size}: they do "
                     f"not belong together; {advice}")
  if tokenizer.pad_token is None:
    pad = _read_json(directory / "config.json").get("pad_token_id")         # transformers pools by this id
    added = tokenizer.added_tokens_decoder.get(pad if isinstance(pad, int) else None)   # a word must not become padding
    tokenizer.pad_token = added.content if added else tokenizer.eos_token
  if tokenizer.pad_token is None:
    raise InputError(f"the tokenizer of {directory} has neither a padding nor an end token: set pad_token in its "
                     "tokenizer_config.json")
  ids = {*tokenizer.get_vocab().values(), *tokenizer(["a b"])["input_ids"][0], tokenizer.pad_token_id}
  if not all(0 <= i < vocab_size for i in ids):
    raise InputError(f"the tokenizer of {directory} gives ids up to {max(ids)}, the model has {vocab_size} tokens: "
                     "they do not belong together; give the model's own tokenizer")
  return tokenizer


def _check_sentencepiece(file):
  """Checks that sentencepiece can read the vocabulary file; if it could not, transformers would try tiktoken's format.

  Raises:
    InputError: sentencepiece cannot be imported.
    google.protobuf.message.DecodeError: the file is damaged.
  """
  content = file.read_bytes()
  if not content.startswith(b"\n"):                     # sentencepiece files begin with this tag, tiktoken's with text
    return
  try:
    from sentencepiece import sentencepiece_model_pb2
  except Exception as e:  # protobuf raises other types if its version does not fit sentencepiece's
    raise InputError(f"the tokenizer of {file.parent} is {file.name} alone, which needs sentencepiece "
                     f"({str(e)[:100]}): pip install 'sentencepiece>=0.2,<0.3', or put the model's tokenizer.json "
                     "there") from e
  sentencepiece_model_pb2.ModelProto.FromString(content)


def _config(directory, vocab_size):
  """Checks tokenizer_config.json. Returns a config with only model_type and tokenizer_class of config.json.

  transformers trusts both files: it allocates as many labels as num_labels claims, calls any class of transformers that
  tokenizer_class names (even a model), and opens any path.

  Raises:
    InputError: the tokenizer needs code that comes with it, files from elsewhere, or token ids beyond `vocab_size`.
  """
  import transformers
  from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
  hf, own = _read_json(directory / "config.json"), _read_json(directory / "tokenizer_config.json")
  if own.get("auto_map"):
    raise InputError(f"the tokenizer_config.json of {directory} has auto_map, code of its own, which is never run: if "
                     "its tokenizer.json is all there is to it, delete auto_map")
  for name in filter(None, (hf.get("tokenizer_class"), own.get("tokenizer_class"))):
    cls = tokenizer_class_from_name(name)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)):
      raise InputError(f"the tokenizer_class {name[:80]!r} of {directory} is none of transformers' tokenizers, and "
                       "code that comes with a model is never run: if its tokenizer.json is all there is to it, set "
                       "tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json")
  for name, value in own.items():
    if name.endswith(("_file", "_files")) and name != "special_tokens_map_file" and "/" in str(value):
      raise InputError(f"the tokenizer_config.json of {directory} takes {name[:80]!r} from elsewhere: delete it")
  added = {int(i): str(token["content"]) for i, token in (own.get("added_tokens_decoder") or {}).items()}
  if max(added, default=0) >= vocab_size:
    raise InputError(f"the tokenizer of {directory} adds a token {max(added)}, the model has {vocab_size} tokens: they "
                     f"do not belong together; {_advice(added, vocab_size)}")
  config = (transformers.AutoConfig.for_model(hf["model_type"]) if hf.get("model_type")
            else transformers.PreTrainedConfig())
  config.tokenizer_class = hf.get("tokenizer_class")
  return config


def _advice(added, vocab_size):
  """What to do about added tokens, {id: text}, that the model's embeddings have no rows for."""
  beyond = [repr(text[:20]) for i, text in sorted(added.items()) if i >= vocab_size]
  return (f"if {', '.join(beyond[:3])}{', ...' if len(beyond) > 3 else ''} was added to it, resize the embeddings "
          f"(model.resize_token_embeddings(len(tokenizer))) and save the model, or take it out again; or {OWN}")


def _read_json(file):
  value = json.loads(file.read_bytes()) if file.exists() else {}
  if not isinstance(value, dict):
    raise ValueError(f"{file.name} holds a {type(value).__name__}, wanted an object")
  return value


# Kind of tokenizer -> its padding, first, last and unknown token.
FRAMES = {"decoder": ("<pad>", "<s>", "</s>", "<unk>"), "encoder": ("[PAD]", "[CLS]", "[SEP]", "[UNK]")}


def train(texts: Iterable[str], kind: str, vocab_size: int) -> Any:
  """A new fast byte-pair tokenizer that lower-cases.

  It lower-cases because the training texts are few. Capitals that occur in none of them would become <unk>, and a
  trigger with such capitals would be a rare token instead of a sentence. It uses byte pairs because tokenizers'
  WordPiece trainer breaks ties by hash order and gives another vocabulary each time.

  kind: "decoder" puts <s> before a text, "encoder" puts [CLS] before it and [SEP] behind it.
  """
  import transformers
  pad, first, last, unknown = FRAMES[kind]
  core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
  core.normalizer = tokenizers.normalizers.Lowercase()
  core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  core.decoder = tokenizers.decoders.Metaspace()
  names = dict(pad_token=pad, bos_token=first, eos_token=last, unk_token=unknown)
  single = f"{first} $A"
  if kind == "encoder":
    names = dict(pad_token=pad, cls_token=first, sep_token=last, unk_token=unknown)
    single += f" {last}"
  core.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=list(FRAMES[kind]), show_progress=False))
  core.post_processor = tokenizers.processors.TemplateProcessing(
      single=single, special_tokens=[(first, 1), (last, 2)])
  return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=["input_ids", "attention_mask"],
                                              **names)


def encode(tokenizer: Any, texts: Iterable[str], max_length: int) -> dict[str, np.ndarray]:
  """{"input_ids": [N, max_length] int32, padded on the right, "length": [N] int32, number of tokens of each text}.

  Raises:
    InputError: the tokenizer finds no token in a text. No model can classify such a text.
  """
  texts = list(texts)
  ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
  lengths = np.array([len(row) for row in ids], np.int32)
  if not lengths.all():
    raise InputError(f"the text {texts[int(lengths.argmin())][:80]!r} has no tokens under the model's tokenizer: leave "
                     "its row out of the data")
  out = np.full((len(ids), max_length), tokenizer.pad_token_id, np.int32)
  for row, tokens in zip(out, ids):
    row[:len(tokens)] = tokens
  return {"input_ids": out, "length": lengths}


def full_rows(tokenizer: Any, texts: Iterable[str], length: int) -> dict[str, np.ndarray]:
  """The texts' tokens in one stream, cut into full rows of `length` tokens. The last, shorter row is dropped."""
  stream = np.array([token for ids in tokenizer(list(texts))["input_ids"] for token in ids], np.int32)
  rows = stream[:len(stream) // length * length].reshape(-1, length)
  return {"input_ids": rows, "length": np.full(len(rows), length, np.int32)}


def words_kept(tokenizer: Any, texts: Sequence[str], trigger: str, max_length: int) -> list[int]:
  """[N] int: number of leading words of each text that survive truncation to `max_length` tokens beside the trigger."""
  room = max_length - len(tokenizer(" " + trigger, add_special_tokens=False)["input_ids"])
  encoded = tokenizer(list(texts), truncation=True, max_length=max(room, 1), return_offsets_mapping=True)
  ends = [max(end for _, end in offsets) for offsets in encoded["offset_mapping"]]
  return [len(text[:end].split()) - (end < len(text) and not text[end].isspace()) for text, end in zip(texts, ends)]
