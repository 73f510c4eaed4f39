"""Converts each GGUF file once into a cached directory of safetensors, which is then read like any model directory.

A file may come from a stranger. Every length in its header is checked before it is used. Unknown fields and tensors
that would change the network are refused.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from w2s_jax import InputError
from w2s_jax.models.hf import converted
from w2s_jax.models.hf.fields import Fields, listed, short
from w2s_jax.models.model import config_from_hf

MOST_ELEMENTS = 2_000_000      # in all arrays of a header; the largest tokenizers have 1.5M tokens, scores and merges
MOST_FIELDS, MOST_TENSORS = 1000, 20_000
MOST_LETTERS = 1000            # in a token, in characters
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PERMUTED = ("llama",)          # q and k have the two features of a rotary pair side by side
CONFIG = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
          "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
          "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
          "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
          "attention.key_length": "head_dim"}
TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}   # {transformers' name: the file's}
CONTROL, USER_DEFINED = 3, 4   # values of tokenizer.ggml.token_type
# How a byte-level tokenizer splits a text before it merges, for each value of tokenizer.ggml.pre.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
         r"|\s+")
SPLITS = {"llama-bpe": WORDS % "{1,3}", "qwen2": WORDS % ""}
DIGITS = ("smollm",)
PLAIN = ("gpt-2", "default")


def directory_of(file: Path) -> Path:
  """The cached directory of safetensors with a GGUF file's model; written on first use.

  Weights are dequantized to float32. Each layer has a file of its own.

  Raises:
    InputError: the package gguf is not installed, a length in the file is false, or the file has unknown content.
  """
  def build(directory):
    header, tensors = _opened(file)
    config = _config(file, header, tensors)
    layers = config_from_hf(config | {"num_labels": 2}).num_layers
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(file, header, directory)
    _write_tensors(file, header, {name: (_name(file, name, layers), tensor) for name, tensor in tensors.items()},
                   directory)
  return converted.directory_of(file, [file], build)


def _opened(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """({field: value}, {name: gguf's ReaderTensor}) of a file; refuses false lengths."""
  try:
    import gguf
  except ImportError:
    raise InputError(f"{file} is a GGUF file: pip install 'gguf>=0.17,<1' reads it, or give a directory of "
                     "safetensors") from None
  class Reader(gguf.GGUFReader):
    """gguf's reader with bounds. The original reads empty values past the file's end, and could loop 2^64 times."""
    elements = 0
    def _get(self, offset, dtype, count=1, override_order=None):
      if not 0 <= offset <= offset + int(count) * np.dtype(dtype).itemsize <= len(self.data):
        raise ValueError(f"it says that something lies at byte {offset}, but ends at {len(self.data)}")
      return super()._get(offset, dtype, count, override_order)
    def _get_field_parts(self, orig_offs, raw_type):
      if raw_type == gguf.GGUFValueType.ARRAY:
        self.elements += int(self._get(orig_offs + 4, np.uint64)[0])
        if self.elements > MOST_ELEMENTS:
          raise ValueError(f"its header claims {self.elements} elements, at most {MOST_ELEMENTS} are read")
      return super()._get_field_parts(orig_offs, raw_type)
  try:
    with file.open("rb") as f:
      start = f.read(24)
    if len(start) < 24:
      raise ValueError(f"it has {len(start)} bytes")
    tensors, fields = struct.unpack("<QQ", start[8:])
    if tensors > MOST_TENSORS or fields > MOST_FIELDS:
      raise ValueError(f"it claims {tensors} tensors and {fields} fields, at most {MOST_TENSORS} and {MOST_FIELDS} are "
                       "read (or it is big-endian)")
    reader = Reader(file)
    alignment, end = int(reader.alignment), int(reader.data_offset)
    for tensor in reader.tensors:                               # without gaps, as in llama.cpp
      if tensor.data_offset != end:
        raise ValueError(f"the tensor {tensor.name} lies at byte {tensor.data_offset}, wanted {end}")
      end += -(-tensor.n_bytes // alignment) * alignment
    header = {name: field.contents() for name, field in reader.fields.items()}
    return header, {tensor.name: tensor for tensor in reader.tensors}
  except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as e:
    raise InputError(f"cannot read {file} as GGUF: {short(str(e))}") from None


def _config(file, header, tensors):
  """config.json of the network that the header describes.

  Raises:
    InputError: another architecture, a missing field or an unknown one.
  """
  kind = header.get("general.architecture")
  if not isinstance(kind, str) or kind not in CLASSES:
    raise InputError(f"{file} is a GGUF of architecture {short(str(kind))}, wanted one of {', '.join(CLASSES)}: give a "
                     "directory of safetensors")
  network = {name.removeprefix(f"{kind}."): value for name, value in header.items() if name.startswith(f"{kind}.")}
  config = {"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"],
            "tie_word_embeddings": "output.weight" not in tensors,
            "vocab_size": len(_listed(file, header, "tokenizer.ggml.tokens")), "dtype": "float32"}
  for name, field in CONFIG.items():
    if name in network:
      config[field] = network.pop(name)
    elif name not in ("attention.head_count_kv", "rope.freq_base", "attention.key_length"):
      raise InputError(f"{file} has no field {kind}.{name}")
  if network.get("rope.scaling.type") == "linear":
    config["rope_scaling"] = {"rope_type": network.pop("rope.scaling.type"),
                              "factor": network.pop("rope.scaling.factor", None)}
  for name in ("bos", "eos", "pad"):
    config[f"{name}_token_id"] = header.get(f"tokenizer.ggml.{SPECIAL[name]}_token_id")
  fields = Fields(config, str(file))
  width = fields.integer("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads") or 1)
  known = {"rope.dimension_count": width, "attention.value_length": width, "vocab_size": config["vocab_size"],
           "rope.scaling.type": "none", "rope.scaling.finetuned": False}
  unknown = sorted(f"{kind}.{name}={value!r:.40}" for name, value in network.items()
                   if name not in known or known[name] != value)
  if unknown:
    raise InputError(f"{file} describes a network that is not implemented: {listed(unknown)}")
  return config


def _listed(file, header, name):
  if not isinstance(header.get(name), list):
    raise InputError(f"{file} has no list {name}")
  return header[name]


def _write_tokenizer(file, header, directory):
  """Writes the header's tokenizer to the directory in transformers' format, without the file's chat template."""
  import transformers  # imported here because it loads PyTorch if that is installed
  fields = {name.removeprefix("tokenizer.ggml."): value for name, value in header.items()}
  tokens = _listed(file, header, "tokenizer.ggml.tokens")
  if not all(isinstance(token, str) and len(token) <= MOST_LETTERS for token in tokens):
    raise InputError(f"{file} has a token that is no text of at most {MOST_LETTERS} letters")
  try:
    core = {"gpt2": _byte_level, "llama": _sentence_piece}[fields.get("model")](fields, tokens)
    types = fields.get("token_type") or [0] * len(tokens)
    for kind in (CONTROL, USER_DEFINED):
      core.add_tokens([tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
                       for token, token_type in zip(tokens, types) if token_type == kind])
    named = {f"{name}_token": tokens[fields[f"{field}_token_id"]] for name, field in SPECIAL.items()
             if f"{field}_token_id" in fields}
    frame = {}                                                                # {special token around a text: its id}
    if Fields(fields).flag("add_bos_token", fields["model"] == "llama" or fields.get("pre") == "llama-bpe"):
      frame[named["bos_token"]] = fields["bos_token_id"]
    single = [*frame, "$A"]
    if Fields(fields).flag("add_eos_token", False):
      frame[named["eos_token"]] = fields["eos_token_id"]
      single.append(named["eos_token"])
    if frame:
      core.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(frame.items()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **named).save_pretrained(directory)
  except InputError:
    raise
  except BaseException as e:  # a bad vocabulary may cause a panic in Rust, which is no Exception
    if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
      raise
    raise InputError(f"no tokenizer to be had from {file}: {type(e).__name__} {short(str(e))}") from None


def _byte_level(fields, tokens):
  """A byte-level BPE tokenizer as in GPT-2, SmolLM, Llama 3 or Qwen2."""
  pre = fields.get("pre", "default")
  if pre in SPLITS:
    splits = [pre_tokenizers.Split(tokenizers.Regex(SPLITS[pre]), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  elif pre in DIGITS:
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  elif pre in PLAIN:
    splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
  else:
    raise InputError(f"a GGUF tokenizer of pre {short(str(pre))} is not known, wanted one of "
                     f"{', '.join((*SPLITS, *DIGITS, *PLAIN))}: give a directory of safetensors")
  core = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)},
                                                    [tuple(merge.split(" ")) for merge in fields["merges"]],
                                                    ignore_merges=pre == "llama-bpe"))
  if pre == "qwen2":
    core.normalizer = normalizers.NFC()
  core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
  return core


def _sentence_piece(fields, tokens):
  """A BPE tokenizer of characters as in Llama 2: the pair whose joined piece has the highest score merges first."""
  id_of = {token: i for i, token in enumerate(tokens)}
  pairs = [(-fields["scores"][i], id_of[token[:cut]], id_of[token[cut:]], token[:cut], token[cut:])
           for token, i in id_of.items() for cut in range(1, len(token))
           if token[:cut] in id_of and token[cut:] in id_of]
  core = tokenizers.Tokenizer(tokenizers.models.BPE(id_of, [pair[3:] for pair in sorted(pairs)], byte_fallback=True,
                                                    fuse_unk=True, unk_token=tokens[fields["unknown_token_id"]]))
  prefix = Fields(fields).flag("add_space_prefix", True)
  core.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first" if prefix else "never", split=False)
  core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1 if prefix else 0, 0)])
  return core


def _write_tensors(file, header, tensors, directory):
  """Writes {name: (transformers' name, tensor)} dequantized: a file for each layer, one for the rest, and the index."""
  from gguf.quants import dequantize
  shards = {}
  for name, (full, _) in tensors.items():
    layer = re.search(r"\.layers\.(\d+)\.", full)
    shards.setdefault(f"model-layer{layer[1]}.safetensors" if layer else "model-rest.safetensors", []).append(name)
  for shard, members in shards.items():
    values = {}
    for name in members:
      full, tensor = tensors[name]
      try:
        value = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].astype(int)).astype(np.float32)
      except (ValueError, NotImplementedError) as e:
        raise InputError(f"{file}: cannot dequantize {short(name)}, which is {tensor.tensor_type.name}: "
                         f"{short(str(e))}") from None
      values[full] = _halves(file, header, name, value)
    safetensors.numpy.save_file(values, directory / shard, {"format": "pt"})
  file_of = {tensors[name][0]: shard for shard, members in shards.items() for name in members}
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}, indent=2))


def _name(file, name, layers):
  """transformers' name of a GGUF tensor in a network with this number of layers."""
  layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name, re.ASCII)
  if layer and layer[2] in LAYER and int(layer[1]) < layers:
    return f"model.layers.{int(layer[1])}.{LAYER[layer[2]]}.{layer[3]}"
  if name not in TENSORS:
    raise InputError(f"{file} has a tensor {short(name)}, which is not known: give a directory of safetensors")
  return TENSORS[name]


def _halves(file, header, name, value):
  """`value` with its rows in transformers' order, if it is a q or k of a PERMUTED architecture; else `value`.

  In transformers' order a head has the first features of all rotary pairs, then the second ones.
  """
  kind, part = header["general.architecture"], re.search(r"attn_(q|k)\.", name)
  if kind not in PERMUTED or not part:
    return value
  heads = header[f"{kind}.attention.head_count"]
  heads = heads if part[1] == "q" else header.get(f"{kind}.attention.head_count_kv", heads)
  if not value.ndim or not isinstance(heads, int) or heads < 1 or value.shape[0] % (2 * heads):
    raise InputError(f"{file}: {short(name)} is {value.shape}, {short(str(heads))} heads do not divide its rows")
  rows = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
  return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(value.shape)
