"""Model directories from strangers: refused in one line, in bounded memory, and nothing in them is ever run."""

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from w2s_jax import InputError, adapters
from w2s_jax.adapters import soft
from w2s_jax.data import grammar, tokenization
from w2s_jax.models import load_pretrained, save_pretrained
from w2s_jax.models.hf.files import PICKLES

ADAPTER = "w2s_adapter.safetensors"
VOCAB = 64                                                           # of the models in conftest.py


@pytest.fixture(scope="module")
def originals(llama, bert, teacher, tmp_path_factory):
  """{name: directory} of tiny models with tokenizers.

  "shards" is the Llama in two files and an index, "prompted" has two soft tokens.
  """
  home = tmp_path_factory.mktemp("originals")
  texts = [row["text"] for row in grammar.rows("phrases", "train", 100)]
  prompted = llama[0], soft.put(*llama, np.ones((2, 32), np.float32))
  for name, (model, params) in {"llama": llama, "bert": bert, "teacher": teacher, "prompted": prompted}.items():
    tokenizer = tokenization.train(texts, "decoder" if model is llama[0] else "encoder", 60)
    save_pretrained(home / name, model, params, tokenizer)
  shards = shutil.copytree(home / "llama", home / "shards")
  tensors = load_file(shards / "model.safetensors")
  (shards / "model.safetensors").unlink()
  names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
  for file in set(names.values()):
    save_file({n: tensors[n] for n in tensors if names[n] == file}, shards / file, metadata={"format": "pt"})
  (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
  return {directory.name: directory for directory in home.iterdir()}


@pytest.fixture
def saved(originals, tmp_path):
  """saved(name) -> a copy of that directory, to be damaged."""
  return lambda name: shutil.copytree(originals[name], tmp_path / name)


def edit(file, **fields):
  """Sets fields of a JSON file. A field that is None is removed."""
  values = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps({k: v for k, v in (values | fields).items() if v is not None}))


def split(data):
  """(header, tensors' bytes) of a safetensors file."""
  size, = struct.unpack("<Q", data[:8])
  return json.loads(data[8:8 + size]), data[8 + size:]


def join(header, rest, size=None):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(header) if size is None else size) + header + rest


def refuses(match, call, *args):
  """Asserts that the call raises an InputError that matches, in printable characters."""
  with pytest.raises(InputError, match=match) as error:
    call(*args)
  assert str(error.value).isprintable()


def load_tokenizer(directory):
  return tokenization.load(directory, VOCAB)


class Payload:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_is_refused_wherever_it_lies_and_never_run(suffix, saved, tmp_path):
  directory, ran = saved("shards"), tmp_path / "ran"
  pickled, index = directory / f"pytorch_model{suffix}", directory / "model.safetensors.index.json"
  hint = rf"pytorch_model\{suffix} is a pickle, which can run code, and is never read: convert it .*save_pretrained"
  pickled.write_bytes(pickle.dumps(Payload(ran)))
  load_pretrained(directory)                                          # beside safetensors it is not looked at
  weight_map = json.loads(index.read_text())["weight_map"]
  edit(index, weight_map=weight_map | {"model.norm.weight": pickled.name})
  refuses(rf"shard {hint}", load_pretrained, directory)
  index.unlink()
  refuses(rf"no model.safetensors in .*; {hint}", load_pretrained, directory)
  for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
    shutil.copy(pickled, directory / name)
    refuses("cannot read|no model.safetensors", load_pretrained, directory)
  refuses("no tokenizer to be had", load_tokenizer, directory)
  assert not ran.exists()
  pickle.loads(pickled.read_bytes()).close()
  assert ran.exists()                                                 # the payload would have worked


@pytest.mark.parametrize("file, fields, match", [
    ("config.json", {"auto_map": {"AutoModelForSequenceClassification": "code.Model", "AutoConfig": "code.Config"}},
     r"config.json has auto_map, code of its own, which is never run: .* delete auto_map"),
    ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
     r"model_type is 'mine', wanted one of llama,"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"},
     r"tokenizer_config.json of .* has auto_map, code of its own, which is never run: .* delete auto_map"),
    ("tokenizer_config.json", {"auto_map": ["code.Tokenizer", "code.Tokenizer"]}, r"has auto_map"),
    ("tokenizer_config.json", {"tokenizer_class": "code.Tokenizer"},
     r"tokenizer_class 'code.Tokenizer' of .* is none of transformers' tokenizers, .* never run: .* set tokenizer_cla"),
    ("tokenizer_config.json", {"tokenizer_class": "AutoModel"}, r"tokenizer_class 'AutoModel' .* none of transformers"),
    ("tokenizer_config.json", {"tokenizer_class": "AutoProcessor"}, r"tokenizer_class 'AutoProcessor' .* none of"),
    ("config.json", {"tokenizer_class": "AutoTokenizer"}, r"tokenizer_class 'AutoTokenizer' of .* is none of")],
    ids=lambda x: None if isinstance(x, dict) else x[:30])
def test_code_in_the_directory_is_never_run(file, fields, match, saved, tmp_path):
  directory, ran = saved("llama"), tmp_path / "ran"
  code = f"open({str(ran)!r}, 'w').close()\nclass Tokenizer: pass\nModel = Config = Tokenizer\n"
  for name in ("code", "tokenizer", "modeling", "tokenization_llama", "sitecustomize"):
    (directory / f"{name}.py").write_text(code)
  (directory / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "code.Tokenizer"}}))
  edit(directory / file, **fields)
  refused_by_the_model = file == "config.json" and "tokenizer_class" not in fields
  refuses(match, load_pretrained if refused_by_the_model else load_tokenizer, directory)
  assert not ran.exists()
  exec(code)
  assert ran.exists()                                                 # the code would have worked


@pytest.mark.parametrize("name, file", [
    ("llama", "config.json"), ("llama", "model.safetensors"), ("llama", "tokenizer.json"), ("teacher", "w2s_head.json"),
    ("teacher", "w2s_head.safetensors"), ("shards", "model.safetensors.index.json"), ("prompted", ADAPTER),
    ("shards", "model-00001-of-00002.safetensors"), ("llama", "additional_chat_templates/chat.jinja"),
    ("llama", "additional_chat_templates")])
def test_a_link_to_outside_is_refused(name, file, saved, tmp_path):
  directory = saved(name)
  if "templates" in file:
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/chat.jinja").write_text("x")
  shutil.move(directory / file, tmp_path / "outside")
  (directory / file).symlink_to("../" * (1 + file.count("/")) + "outside")
  refuses(rf"{file} is a link to outside the model directory: copy what it points to", load_pretrained, directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_file_is_refused_and_waited_for_by_nobody(file, saved):
  """A pipe, a directory, a link to nowhere or to itself, and /dev/zero."""
  directory = saved("llama")
  (directory / file).unlink()
  os.mkfifo(directory / file)
  refuses(rf"{file} is neither a file nor a directory", load_pretrained, directory)
  refuses(rf"no tokenizer .*({file} is neither|none of tokenizer.json)", load_tokenizer, directory)
  (directory / file).unlink()
  (directory / file).mkdir()
  if "tokenizer" not in file:
    refuses(rf"cannot read .*{file}", load_pretrained, directory)
  if file != "model.safetensors":
    refuses("no tokenizer to be had", load_tokenizer, directory)
  (directory / file).rmdir()
  for target, match in (("nowhere", "is neither"), (file, "is neither"), ("/dev/zero", "is a link to outside")):
    (directory / file).symlink_to(target)
    refuses(rf"{file} {match}", load_pretrained, directory)
    refuses("no tokenizer to be had", load_tokenizer, directory)
    (directory / file).unlink()


def test_a_file_name_that_would_break_the_line_is_refused(saved):
  directory = saved("llama")
  (directory / "a\n\x1b[2J.bin").write_text("")
  refuses(r"the file name 'a\\n\\x1b\[2J.bin' cannot be printed", load_pretrained, directory)


def test_the_layout_of_the_hugging_face_cache_is_accepted(originals, tmp_path):
  """snapshots/REVISION/FILE -> ../../blobs/HASH is the cache's own; a link anywhere else is not."""
  revision, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
  for file in [*originals["teacher"].iterdir(), originals["teacher"] / "nested/README.md"]:
    blob = blobs / f"{file.name}-hash"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(file.read_bytes() if file.exists() else b"")
    link = revision / file.relative_to(originals["teacher"])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
  want, got = load_pretrained(originals["teacher"]), load_pretrained(revision)
  assert got[0] == want[0] and load_tokenizer(revision).get_vocab() == load_tokenizer(originals["teacher"]).get_vocab()
  jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
  (tmp_path / "outside").write_bytes((revision / "config.json").read_bytes())
  (blobs / "config.json-hash").unlink()
  (blobs / "config.json-hash").symlink_to(tmp_path / "outside")
  refuses("config.json is a link to outside the model directory", load_pretrained, revision)


def test_blobs_of_the_hugging_face_cache_may_lie_on_another_disk(originals, llama, tmp_path):
  """Then `blobs` is a link. A link of the model to any other place is still refused."""
  cache, disk = tmp_path / "models--a--b", tmp_path / "disk"
  shutil.copytree(originals["llama"], disk)
  (cache / "snapshots/0123").mkdir(parents=True)
  (cache / "blobs").symlink_to(disk)
  for file in disk.iterdir():
    (cache / "snapshots/0123" / file.name).symlink_to(f"../../blobs/{file.name}")
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(cache / "snapshots/0123")[1], llama[1])
  (disk / "config.json").rename(tmp_path / "outside")
  (disk / "config.json").symlink_to(tmp_path / "outside")
  refuses("config.json is a link to outside the model directory", load_pretrained, cache / "snapshots/0123")


def tensor(**fields):
  return lambda header: header["model.norm.weight"].update(fields)


def claim(header):
  header |= {"giant": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}


def rename(old, new, **fields):
  def change(header):
    header[new] = header.pop(old) | fields
  return change


HEADER = "cannot read .*model.safetensors: .*"
FIT = "does not fit its config.json .*"


@pytest.mark.parametrize("change, match", [
    (claim, HEADER + "invalid offset"),
    (tensor(shape=[2**40]), HEADER + "invalid shape, data type, or offset"),
    (tensor(shape=[2**32, 2**33]), HEADER + "overflow"),
    (tensor(shape=[-32]), HEADER + "invalid value"), (tensor(shape="32"), HEADER + "invalid type"),
    (tensor(shape=[10**400]), HEADER), (tensor(shape=[32.0]), HEADER + "invalid type"),
    (tensor(shape=[8, 4]), FIT + r"wrong shape \['model.norm.weight \(8, 4\), wanted \(32,\)'\]"),
    (tensor(shape=[]), HEADER + "invalid shape"),
    (tensor(shape=[32] + [1] * 100_000), FIT + r"1, 1\.\.\. \(1 in all\)"),
    (tensor(data_offsets=[0, 128]), HEADER + "offset"), (tensor(data_offsets=[128, 0]), HEADER + "offset"),
    (tensor(data_offsets=[0, 2**63]), HEADER + "offset"), (tensor(data_offsets=[-1, 127]), HEADER + "invalid value"),
    (tensor(dtype="F64"), HEADER + "invalid shape, data type"), (tensor(dtype="F16"), HEADER + "invalid shape, data"),
    (tensor(dtype="F8_E4M3", shape=[128]), r"'model.norm.weight' is F8_E4M3, wanted one of F32, F16, BF16"),
    (tensor(dtype="F64", shape=[16]), r"'model.norm.weight' is F64, wanted one of F32"),
    (tensor(dtype="I32"), r"'model.norm.weight' is I32, wanted one of F32"),
    (tensor(dtype="BOOL", shape=[128]), r"'model.norm.weight' is BOOL, wanted one of F32"),
    (tensor(dtype="F32\n\x1b[2J"), HEADER + r"unknown variant `F32\\n\\x1b\[2J"), (tensor(dtype=4), HEADER),
    (rename("model.norm.weight", "a\nb"), FIT + r"missing \['model.norm.weight'\]; unexpected \['a\\nb'\]"),
    (rename("model.norm.weight", "a\nb", dtype="I32"), r"'a\\nb' is I32"),
    (rename("model.norm.weight", "model.norm.weight" * 10**4), FIT + r"\.\.\. \(1 in all\); wrong shape none"),
    (lambda header: header.update(__metadata__={"format": 1}), HEADER + "expected a string"),
    (lambda header: header.clear(), HEADER)],
    ids=lambda x: x if isinstance(x, str) else "")
def test_a_header_that_lies(change, match, saved):
  file = saved("llama") / "model.safetensors"
  header, rest = split(file.read_bytes())
  change(header)
  file.write_bytes(join(header, rest))
  refuses(match, load_pretrained, file.parent)


@pytest.mark.parametrize("write", [
    lambda header, rest: b"", lambda header, rest: b"\x08", lambda header, rest: join(header, rest)[:-1000],
    lambda header, rest: join(header, rest)[:200], lambda header, rest: join(header, rest + b"\0" * 100),
    lambda header, rest: join(header, rest, 2**63), lambda header, rest: join(header, rest, 2**64 - 1),
    lambda header, rest: join(header, rest, 10), lambda header, rest: join(header, rest, 99_000_000),
    lambda header, rest: join(b"[]", rest), lambda header, rest: join(b"\xff" * 50, rest),
    lambda header, rest: join(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", rest),
    lambda header, rest: join(json.dumps(header).encode()[:-1] + b',"model.norm.weight":{}}', rest)],
    ids=["empty", "one byte", "cut in the data", "cut in the header", "more data", "2^63", "2^64-1", "short size",
         "long size", "list", "not UTF-8", "deep", "twice"])
@pytest.mark.parametrize("name, file", [("llama", "model.safetensors"), ("teacher", "w2s_head.safetensors"),
                                        ("prompted", ADAPTER)])
def test_a_file_that_is_none(write, name, file, saved):
  file = saved(name) / file
  file.write_bytes(write(*split(file.read_bytes())))
  refuses(f"cannot read .*{file.name}: '", load_pretrained, file.parent)


def test_a_tensor_under_its_old_and_its_new_name(saved):
  """Which of the two is loaded would be left to chance."""
  file = saved("bert") / "model.safetensors"
  tensors = load_file(file)
  name = "bert.embeddings.LayerNorm.weight"
  save_file(tensors | {name.replace("weight", "gamma"): tensors[name] + 1}, file)
  refuses(rf"has the tensor '{name}' twice", load_pretrained, file.parent)


@pytest.mark.parametrize("tensors,head_config", [
    ({"model.embed_tokens.weight": (VOCAB, 32), "score.weight": (2, 32)}, False),
    ({"model.embed_tokens.weight": (VOCAB, 32), "score.weight": (2, 32)}, True),
    ({"w2s.widen.weight": (8, 32), "w2s.widen.bias": (8,), "classifier.weight": (2, 8), "classifier.bias": (2,)},
     False)])
def test_a_head_file_that_would_hide_the_models_own_tensors(tensors, head_config, saved):
  """transformers runs model.safetensors, so we must not read, scan and clean other tensors beside it."""
  directory = saved("llama")
  save_file({name: np.full(shape, 7, np.float32) for name, shape in tensors.items()},
            directory / "w2s_head.safetensors")
  if head_config:
    (directory / "w2s_head.json").write_text('{"feature_width": 8}')
  with pytest.raises(InputError, match="w2s_head.safetensors is not the W2S head|cannot carry the W2S"):
    load_pretrained(directory)


def test_a_teachers_backbone_with_a_classifier_of_its_own(saved):
  """transformers would run that classifier."""
  directory = saved("teacher")
  own = load_file(directory / "model.safetensors")
  save_file(own | {"classifier.weight": np.zeros((2, 32), np.float32), "classifier.bias": np.zeros(2, np.float32)},
            directory / "model.safetensors")
  with pytest.raises(InputError, match="w2s_head.safetensors is not the W2S head"):
    load_pretrained(directory)


def test_a_name_twice_in_a_header(saved):
  """Two parsers may differ about which one counts."""
  file = saved("llama") / "model.safetensors"
  content = file.read_bytes()
  size = int.from_bytes(content[:8], "little")
  header = content[8:8 + size].rstrip()
  name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
  header = header[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(entry).encode() + b"}"
  header += b" " * (-len(header) % 8)
  file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size:])
  with pytest.raises(InputError, match=f"its header has '{name}' twice"):
    load_pretrained(file.parent)


def test_a_header_that_is_too_large_is_not_parsed(saved):
  file = saved("llama") / "model.safetensors"
  header = b"{" + b" " * (17 << 20) + b"}"
  file.write_bytes(struct.pack("<Q", len(header)) + header)
  with pytest.raises(InputError, match="has a header of 17825794 bytes, at most 16777216 are read"):
    load_pretrained(file.parent)


@pytest.mark.parametrize("name,tensor", [("llama", "score.weight"), ("bert", "classifier.bias")])
def test_a_head_of_a_dtype_that_is_not_read(name, tensor, saved):
  file = saved(name) / "model.safetensors"
  tensors = load_file(file)
  save_file(tensors | {tensor: tensors[tensor].astype(np.float64)}, file)
  with pytest.raises(InputError, match=f"'{tensor}' is F64, wanted one of F32"):
    load_pretrained(file.parent)


@pytest.mark.parametrize("model_type", [[], {}, None, 3])
def test_a_model_type_that_is_no_name(model_type, saved):
  directory = saved("llama")
  content = json.loads((directory / "config.json").read_text()) | {"model_type": model_type}
  (directory / "config.json").write_text(json.dumps(content))
  with pytest.raises(InputError, match="model_type"):
    load_pretrained(directory)


@pytest.mark.parametrize("weight_map, match", [
    ({"a": "../model.safetensors"}, "shard '../model.safetensors' lies outside the model directory"),
    ({"a": "/etc/passwd"}, "shard '/etc/passwd' lies outside"), ({"a": ""}, "shard '' lies outside"),
    ({"a": ".."}, r"shard '\.\.' lies outside"), ({"a": "a\0b"}, r"shard 'a\\x00b' .* is no plain file name"),
    ({"a": "\ud800"}, r"shard '\\ud800' .* is no plain file name"), ({"a": "a\nb"}, "is no plain file name"),
    ({"a": "x" * 10**6}, r"shard 'x{30,40}\.\.\.x{30,40}' .* is no plain file name"),
    ({"a": "x" * 250}, "cannot read .*x: "), ({"a": "config.json"}, "cannot read .*config.json"),
    ({"a": 3}, "want a weight_map from tensor names to file names"), ({"a": ["b"]}, "want a weight_map"),
    (["a"], "want a weight_map"), (None, "want a weight_map"), ({}, FIT + r"missing \['model.embed_tokens.weight'"),
    ({"a\nb": "one.safetensors"}, r"has no tensor 'a\\nb' although the index says so")])
def test_an_index_that_lies(weight_map, match, saved):
  directory = saved("llama")
  (directory / "model.safetensors").rename(directory / "one.safetensors")
  edit(directory / "model.safetensors.index.json", weight_map=weight_map)
  refuses(match, load_pretrained, directory)


DEEP = b"[" * 10**5 + b"]" * 10**5


@pytest.mark.parametrize("data, match", [
    (b"", "Expecting value"), (b"{", "Expecting property"), (b"[1]", "it holds a list, wanted an object"),
    (b"3", "it holds a int"), (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number"), (b'{"a": "\xff"}', "codec can't decode"),
    (b'{"a": ' + DEEP + b"}", "recursion|Stack"), (b'{"a": 1' + b"0" * 10**5 + b"}", "digits"),
    (b'{"a": ' + b" " * (65 << 20) + b"1}", "it has 68157448 bytes, at most 67108864 are read")],
    ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("name, file", [("llama", "config.json"), ("shards", "model.safetensors.index.json"),
                                        ("teacher", "w2s_head.json")])
def test_json_that_is_none(data, match, name, file, saved):
  file = saved(name) / file
  file.write_bytes(data)
  refuses(rf"cannot read .*{file.name}: .*{match}", load_pretrained, file.parent)


RANGE = r"wanted an integer in "


@pytest.mark.parametrize("fields, match", [
    ({"num_hidden_layers": 10**9}, f"num_hidden_layers is 1000000000, {RANGE}1..1024"),
    ({"num_hidden_layers": 1024}, FIT + r"missing \['model.layers.10.input_layernorm.weight'.*\.\.\. \(9189 in all\)"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, "), ({"hidden_size": 10**9}, "hidden_size is 1000000000, "),
    ({"hidden_size": 10**400}, r"hidden_size is 10+\.\.\.0+, "), ({"hidden_size": "32"}, "hidden_size is '32', "),
    ({"hidden_size": 32.0}, "hidden_size is 32.0, "), ({"hidden_size": True}, "hidden_size is True, "),
    ({"hidden_size": [32]}, r"hidden_size is \[32\], "), ({"hidden_size": "\x1b\n" * 99}, r"hidden_size is '\\x1b\\n"),
    ({"hidden_size": 64}, FIT + r"wrong shape \['model.embed_tokens.weight \(64, 32\), wanted \(64, 64\)'"),
    ({"hidden_size": 2**24, "intermediate_size": 2**24, "vocab_size": 2**24, "head_dim": 2**24}, FIT),
    ({"vocab_size": -1}, f"vocab_size is -1, {RANGE}1..16777216"), ({"vocab_size": 65}, FIT + r"wanted \(65, 32\)"),
    ({"head_dim": 7}, "head_dim 7 must be even"), ({"head_dim": 2}, f"head_dim is 2, {RANGE}4.."),
    ({"num_attention_heads": 3}, "3 attention heads must be divisible by num_key_value_heads, got 2"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0, "),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1, wanted a number"),
    ({"rms_norm_eps": True}, "rms_norm_eps is True, "), ({"attention_dropout": 1}, "attention_dropout is 1, wanted"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted true or false"),
    ({"tie_word_embeddings": False, "model_type": "qwen2"}, FIT + "q_proj.bias"),
    ({"pad_token_id": [[0]]}, r"pad_token_id is \[\[0\]\], wanted an integer"),
    ({"pad_token_id": [0]}, r"pad_token_id is \[0\], "), ({"pad_token_id": "0"}, "pad_token_id is '0', "),
    ({"pad_token_id": -2}, f"pad_token_id is -2, {RANGE}-1.."),
    ({"bos_token_id": 2**40}, "bos_token_id is 1099511627776, "),
    ({"eos_token_id": [[2]]}, r"eos_token_id is \[2\], "), ({"eos_token_id": [1] * 100}, r"eos_token_id is \[1, 1, 1"),
    ({"id2label": {"0": {"a": 1}, "1": "b"}}, r"id2label is \{'0': \{'a': 1\}, .*wanted names of the classes"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\], wanted one of"), ({"model_type": 3}, "model_type is 3, "),
    ({"hidden_act": {"a": "silu"}}, r"hidden_act \{'a': 'silu'\} is not supported \(want 'silu'\)"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\], wanted an object"),
    *(({"rope_parameters": {"rope_type": "linear", "factor": factor}}, f"rope_parameters: factor is {shown}, wanted a")
      for factor, shown in (("2", "'2'"), (-2, "-2"), (True, "True"), (0, "0"), (10**30, "10+"), ([], r"\[\]"))),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters has no field 'factor'"),
    ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type is \['linear'\], wanted one of default"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                          "original_max_position_embeddings": 8}}, "low_freq_factor 4.0 must be less than high_freq_")],
    ids=lambda x: str(x)[:40])
def test_a_config_that_lies(fields, match, saved):
  directory = saved("llama")
  edit(directory / "config.json", **fields)
  refuses(match, load_pretrained, directory)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_rope_factor_that_is_no_number(text, saved):
  file = saved("llama") / "config.json"
  edit(file, rope_parameters={"rope_type": "linear", "factor": 0.5})
  file.write_text(file.read_text().replace("0.5", text))
  refuses("factor is -?inf, wanted a number|is not a JSON number", load_pretrained, file.parent)


def test_odd_things_that_are_harmless_load(saved, llama):
  """Classes of another number, several end tokens, a key given twice (the last one counts), an unknown field."""
  directory = saved("llama")
  edit(directory / "config.json", id2label={"0": "a", "5": [1]}, eos_token_id=[1, 2], num_labels=10**9, other=[[[]]])
  text = (directory / "config.json").read_text()
  (directory / "config.json").write_text(text.replace("{", '{"hidden_size": "x", ', 1))
  model, params = load_pretrained(directory)
  assert (model.config.labels, model.config.eos_token_id, model.config.num_labels) == ((), (1, 2), 2)
  jax.tree.map(np.testing.assert_array_equal, params, llama[1])


@pytest.mark.parametrize("width, match", [
    (2**24, r"wrong shape .*w2s.widen.weight \(40, 32\), wanted \(16777216, 32\)"),
    (2**25, "feature_width is 33554432, wanted an integer in 1..16777216"),
    ("40", "w2s_head.json: feature_width is '40', wanted an integer"),
    (None, "w2s_head.json has no field 'feature_width'")])
def test_a_teachers_head_that_lies(width, match, saved):
  directory = saved("teacher")
  edit(directory / "w2s_head.json", feature_width=width)
  refuses(match, load_pretrained, directory)


def test_a_teachers_head_without_its_tensors_is_not_made_afresh(saved):
  """A fresh head would be as large as w2s_head.json claims."""
  directory = saved("teacher")
  edit(directory / "w2s_head.json", feature_width=2**24)
  (directory / "w2s_head.safetensors").unlink()
  refuses("has a w2s_head.json, but no w2s.widen.weight in a w2s_head.safetensors", load_pretrained, directory)


SOFT = "embed_tokens/soft"
LOW, HIGH = "layers/attn/v_proj/low", "layers/attn/v_proj/high"
LIES = [
    ({SOFT: (2, 31)}, r"wrong shape \['embed_tokens/soft \(2, 31\), wanted \(tokens in 1..65536, 32\)'\]"),
    ({SOFT: (0, 32)}, r"soft \(0, 32\), wanted"), ({SOFT: (32,)}, r"soft \(32,\), wanted"),
    ({SOFT: (65537, 32)}, r"soft \(65537, 32\), wanted"), ({SOFT: (1, 2, 32)}, r"soft \(1, 2, 32\), wanted"),
    ({"embeddings/word_embeddings/soft": (2, 32)}, r"unexpected \['embeddings/word_embeddings/soft'\]; missing none"),
    ({"score/kernel": (32, 2)}, r"unexpected \['score/kernel'\]"), ({"a\nb": (1,)}, r"unexpected \['a\\nb'\]"),
    ({"x" * 10**5: (1,)}, r"unexpected \['x+\.\.\. \(1 in all\)"), ({"": (1,)}, r"unexpected \[''\]"),
    ({f"layers/attn/v_proj/lora_{x}": (3, 16, 16) for x in "ab"}, r"unexpected \['layers/attn/v_proj/lora_a', "),
    ({LOW: (3, 32, 4)}, r"unexpected none; missing \['layers/attn/v_proj/high'\]"),
    ({LOW: (3, 32, 4), HIGH: (3, 5, 16)}, r"low \(3, 32, 4\), wanted \(3, 32, size in 1..65536\)"),
    ({LOW: (2, 32, 4), HIGH: (3, 4, 16)}, r"low \(2, 32, 4\), wanted \(3, 32, "),
    ({"layers/attn/x_proj/low": (3, 32, 4)}, r"unexpected \['layers/attn/x_proj/low'\]"),
    ({"score/low": (3, 32, 4)}, r"unexpected \['score/low'\]")]


@pytest.mark.parametrize("shapes, match", LIES, ids=lambda x: str(x)[:60])
def test_an_adapter_that_lies(shapes, match, saved, monkeypatch):
  """Beside soft tokens there is a kind with two leaves of a common size, which cannot be merged."""
  monkeypatch.setitem(adapters.KINDS, "pair", adapters.Adapter(
      {"low": ("adapter", ("layers", "in", "size")), "high": ("adapter", ("layers", "size", "out"))}, None, None))
  directory = saved("prompted")
  load_pretrained(directory)
  save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, directory / ADAPTER)
  refuses(rf"{ADAPTER} does not fit the model: .*{match}.*delete it", load_pretrained, directory)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.bool_])
def test_an_adapter_of_another_type(dtype, saved):
  directory = saved("prompted")
  save_file({SOFT: np.ones((2, 32), dtype)}, directory / ADAPTER)
  refuses(r"not F32 \['embed_tokens/soft (F16|F64|I32|BOOL)'\]", load_pretrained, directory)


def test_an_adapter_that_is_a_pickle_is_refused_and_not_run(saved, tmp_path):
  directory = saved("prompted")
  (directory / ADAPTER).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
  refuses(f"cannot read .*{ADAPTER}", load_pretrained, directory)
  assert not (tmp_path / "ran").exists()


TOKENIZER, OPTIONS = "tokenizer.json", "tokenizer_config.json"
BAD_MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}    # tokenizers panics
BAD_PATTERN = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
FOREIGN_TOKEN = {"type": "TemplateProcessing", "pair": [], "single": [
    {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [64], "tokens": ["<s>"]}}}


@pytest.mark.parametrize("file, fields, match", [
    (TOKENIZER, {"model": {}}, ""), (TOKENIZER, {"model": None}, ""), (TOKENIZER, {"added_tokens": [3]}, ""),
    (TOKENIZER, {"normalizer": BAD_MAP}, "precompiled_charsmap"),
    (TOKENIZER, {"pre_tokenizer": BAD_PATTERN}, "Oniguruma error"),
    (TOKENIZER, {"post_processor": FOREIGN_TOKEN}, "gives ids up to 64, the model has 64 tokens"),
    (OPTIONS, {"extra_special_tokens": [f"<{i}>" for i in range(9)]}, "has 69 tokens, the model only 64"),
    (OPTIONS, {"added_tokens_decoder": {str(10**12): {"content": "x"}}}, "adds a token 1000000000000, the model has"),
    (OPTIONS, {"pad_token": [["a"]]}, "pad_token"), (OPTIONS, {"pad_token": 3}, "pad_token"),
    (OPTIONS, {"pad_token": "\ud800"}, "surrogates"), (OPTIONS, {"model_max_length": "x"}, "not supported between"),
    (OPTIONS, {"tokenizer_class": 3}, "must be string"), (OPTIONS, {"tokenizer_class": ["a"]}, "unhashable"),
    (OPTIONS, {"fast_tokenizer_files": ["../outside/tokenizer.1.json"]}, "takes 'fast_tokenizer_files' from elsewhere"),
    (OPTIONS, {"vocab_file": "/etc/passwd"}, "takes 'vocab_file' from elsewhere: delete it"),
    ("config.json", {"model_type": ["llama"]}, "unhashable"),
    ("config.json", {"model_type": "x"}, "Unrecognized model identifier: x")],
    ids=lambda x: str(x)[:40])
def test_a_tokenizer_that_lies(file, fields, match, saved):
  directory = saved("llama")
  values = json.loads((directory / file).read_text())
  (directory / file).write_text(json.dumps(values | fields))
  refuses(f"the tokenizer.* of .*{match}|no tokenizer to be had from .*{match}", load_tokenizer, directory)


@pytest.mark.parametrize("file", [TOKENIZER, OPTIONS, "config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"null", b'{"a": "\xff"}', b'{"a": ' + DEEP + b"}"],
                         ids=["empty", "cut", "list", "number", "null", "not UTF-8", "deep"])
def test_a_tokenizer_file_that_is_no_json(file, data, saved):
  directory = saved("llama")
  (directory / file).write_bytes(data)
  refuses("no tokenizer to be had from .*llama ", load_tokenizer, directory)


def test_a_vocabulary_larger_than_the_model_or_than_any(saved):
  directory = saved("llama")
  values = json.loads((directory / TOKENIZER).read_text())
  values["model"]["vocab"]["zz"] = 10**6                              # JAX clamps this index into the table
  (directory / TOKENIZER).write_text(json.dumps(values))
  refuses("gives ids up to 1000000, the model has 64 tokens", load_tokenizer, directory)
  with open(directory / TOKENIZER, "r+b") as f:
    f.truncate(2**40)                                                 # sparse
  refuses("tokenizer.json has 1099511627776 bytes, at most 67108864 are read", load_tokenizer, directory)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_and_exits_are_not_caught(error, originals, monkeypatch):
  """We catch a panic of the tokenizers library, which is no Exception either, but not these two."""
  def stop(*args, **kwargs):
    raise error
  monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stop)
  with pytest.raises(error):
    load_tokenizer(originals["llama"])


GIANTS = """
import json, resource, shutil, sys
from pathlib import Path
from w2s_jax import InputError
from w2s_jax.data import tokenization
from w2s_jax.models import load_pretrained
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10      # MiB on Linux
for directory in map(Path, sys.argv[1:3]):                             # whole ones, for what any loading takes
  load_pretrained(directory)
  tokenization.load(directory, 64)
before = peak()
for directory in map(Path, sys.argv[3:]):
  for call in (load_pretrained, lambda d: tokenization.load(d, 64)):
    try:
      call(directory)
    except InputError as e:
      print(str(e)[:200])
print(json.dumps([before, peak()]))
"""


def test_claims_of_giants_take_no_memory(originals, tmp_path):
  """A header, configs, a head and a tokenizer claim terabytes, or counts of which transformers would build lists."""
  def copy(number, name):
    return shutil.copytree(originals[name], tmp_path / str(number))
  directories = [copy(i, name) for i, name in enumerate(("llama", "llama", "llama", "teacher", "llama", "llama"))]
  header, rest = split((directories[0] / "model.safetensors").read_bytes())
  claim(header)
  (directories[0] / "model.safetensors").write_bytes(join(header, rest))
  edit(directories[1] / "config.json", hidden_size=2**24, vocab_size=2**24, intermediate_size=2**24,
       num_labels=3_000_000)
  edit(directories[2] / "config.json", num_hidden_layers=1024, head_dim=2**24, num_attention_heads=2**24)
  edit(directories[3] / "w2s_head.json", feature_width=2**24)
  (directories[3] / "w2s_head.safetensors").unlink()
  edit(directories[4] / "config.json", model_type="qwen2", num_hidden_layers=10**7)
  edit(directories[5] / "tokenizer_config.json", added_tokens_decoder={str(10**12): {"content": "x"}})
  out = subprocess.run([sys.executable, "-c", GIANTS, originals["llama"], originals["teacher"], *directories],
                       capture_output=True, text=True, cwd=Path(__file__).parents[1])
  assert out.returncode == 0, out.stderr
  *lines, peaks = out.stdout.splitlines()
  before, after = json.loads(peaks)
  assert len(lines) == 6 and after - before < 100, (lines, before, after)


# What is fuzzed: (model, file, what reads it).
TARGETS = [("llama", "model.safetensors", load_pretrained), ("bert", "model.safetensors", load_pretrained),
           ("teacher", "w2s_head.safetensors", load_pretrained), ("teacher", "w2s_head.json", load_pretrained),
           ("shards", "model.safetensors.index.json", load_pretrained), ("llama", "config.json", load_pretrained),
           ("prompted", ADAPTER, load_pretrained),
           ("bert", "config.json", load_pretrained), ("llama", "config.json", load_tokenizer),
           ("llama", TOKENIZER, load_tokenizer), ("bert", TOKENIZER, load_tokenizer),
           ("llama", OPTIONS, load_tokenizer), ("bert", OPTIONS, load_tokenizer)]
ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 16, 31, 32, 64, 2**24, 2**31, 2**40, 2**63, 2**64, 10**9, 10**400, 0.5,
       -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "3", "\0", "\ud800", "\x1b[2J", "a\nb", "../x", "/dev/zero",
       "F64", "F16", "I32", "BOOL", "F8_E4M3", "LlamaTokenizer", "BertTokenizer", "AutoModel", "qwen2", "gpt2",
       "roberta", "distilbert", "mistral", "linear", "llama3", "BPE", "WordPiece", "Unigram", "WordLevel", "Sequence",
       BAD_PATTERN, BAD_MAP, {"type": "Lowercase"}, [], [0], [[0]], [-1], [2**40], [0, 128], [32, 32], {}, {"a": 1},
       {"0": []}]
VALUES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9) | st.recursive(
    st.sampled_from(ODD), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                      max_size=3), max_leaves=6)
KEYS = st.sampled_from([
    "auto_map", "rope_scaling", "rope_parameters", "sliding_window", "id2label", "eos_token_id", "quantization_config",
    "tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "chat_template", "model_max_length",
    "init_inputs", "truncation", "padding", "vocab_file", "__metadata__", "weight_map", "score.weight",
    "w2s.widen.bias"]) | st.text(max_size=5)


def change(draw, values):
  """Sets, removes or adds an entry somewhere in JSON values."""
  where = values
  while True:
    key = draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where)))) if where else None
    if key is None or not isinstance(where[key], (dict, list)) or draw(st.booleans()):
      break
    where = where[key]
  action = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
  value = copy.deepcopy(draw(VALUES))                                 # a later change may modify it
  if action == "remove" and key is not None:
    del where[key]
  elif isinstance(where, dict):
    where[draw(KEYS) if action == "add" or key is None else key] = value
  elif action == "set" and key is not None:
    where[key] = value
  else:
    where.append(value)


def damage(draw, data):
  """Cuts, flips, inserts, doubles or nests bytes."""
  at = draw(st.integers(0, len(data)))
  deep = b":" + b"[" * draw(st.sampled_from([200, 970, 10**5]))
  return draw(st.sampled_from([
      lambda: data[:at], lambda: data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:],
      lambda: data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 8:],
      lambda: data[:at] + data[at + draw(st.integers(1, 50)):], lambda: data + data,
      lambda: data.replace(b"{", b'{"hidden_size": 64, "model": 1,', 1),
      lambda: data.replace(b":", deep, 1)]))()


def mutated(draw, name, data):
  """A file's bytes after one to three changes of its JSON, sometimes of its bytes."""
  header, rest = split(data) if name.endswith(".safetensors") else (json.loads(data), None)
  kind = draw(st.sampled_from(["json", "json", "json", "bytes", "both"]))
  if kind != "bytes":
    for _ in range(draw(st.integers(1, 3))):
      change(draw, header)
  text = json.dumps(header).encode()
  size = len(text)
  if kind != "json":
    text = damage(draw, text)
    size = draw(st.sampled_from([len(text), len(text), size, 2**40]))
  if rest is None:
    return text
  return join(text, rest[:draw(st.sampled_from([None, None, None, -1, 100, 0]))], size)


def fuzz(originals, examples):
  """Reads this many mutated directories: each loads, or ends in one printable line; both happen."""
  outcomes = []
  @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                       suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(data=st.data())
  def read_one(data):
    name, file, read = data.draw(st.sampled_from(TARGETS))
    file = originals[name] / file
    whole = file.read_bytes()
    try:
      file.write_bytes(mutated(data.draw, file.name, whole))
      read(file.parent)
      outcomes.append("loaded")
    except InputError as e:
      assert str(e).isprintable() and len(str(e)) < 20_000
      outcomes.append("refused")
    finally:
      file.write_bytes(whole)
  read_one()
  assert len(outcomes) >= examples and min(outcomes.count("loaded"), outcomes.count("refused")) > examples // 20


def test_mutated_directories_load_or_are_refused(originals):
  fuzz(originals, 600)


@pytest.mark.long
def test_ten_thousand_mutated_directories_load_or_are_refused(originals):
  fuzz(originals, 10_000)
