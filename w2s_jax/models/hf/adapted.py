"""Merges a peft LoRA adapter with its base, once, into a cached directory that is read like any model directory."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from w2s_jax import InputError
from w2s_jax.data.tokenization import VOCABULARY_FILES
from w2s_jax.models.hf import converted, files, formats
from w2s_jax.models.hf.fields import Fields, listed, short
from w2s_jax.models.hf.formats import ADAPTER_CONFIG, ADAPTER_FILE
from w2s_jax.models.model import Model, config_from_hf

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# Fields of peft's config that are read here or that do not change the merged network. Any other must be empty or false.
HARMLESS = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
            "target_modules", "modules_to_save", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights",
            "rank_pattern", "peft_version", "auto_mapping", "qalora_group_size", "megatron_core", "ensure_weight_tying")


def is_adapter(directory: Path) -> bool:
  """Whether a directory holds an adapter and no model.

  Raises:
    InputError: it holds both. transformers would run the model *with* the adapter.
  """
  has_adapter = (directory / ADAPTER_CONFIG).exists()
  if has_adapter and any(directory.glob("model*.safetensors*")):
    raise InputError(f"{directory} holds a model and an adapter ({ADAPTER_CONFIG}), which transformers attaches to it: "
                     "keep the adapter in a directory of its own and give that, with --config.student.base")
  return has_adapter


def hub_id_of_base(directory: Path) -> str:
  """The hub id that the adapter names as its base. A path is refused, because the file may come from a stranger.

  Raises:
    InputError: the adapter names no hub id.
  """
  base = files.read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
  hub_id = isinstance(base, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base, re.ASCII)
  if not hub_id or Path(base).exists():
    raise InputError(f"{directory} is an adapter, whose base {short(base)} is no hub id: set --config.student.base to "
                     "the base's directory")
  return base


def directory_of(adapter: Path, base: Path) -> Path:
  """The cached directory of safetensors with base and adapter merged, in the base's dtype; written on first use.

  Raises:
    InputError: the adapter is of another kind, or has tensors that the base has no place for.
  """
  for directory in (adapter, base):
    files.check_links(directory)
  if w2s_files := sorted(file.name for file in base.glob("w2s_*")):
    raise InputError(f"{base}, the base of {adapter}, has a {w2s_files[0]}, which a merged model would not have: "
                     "give a base without it")
  if not (adapter / ADAPTER_FILE).is_file():
    raise InputError(f"{adapter} has {ADAPTER_CONFIG} but no {ADAPTER_FILE}: an adapter_model.bin is a pickle, which "
                     "is never read; save the adapter anew with peft, which writes safetensors")
  file_of, index = files.tensor_files(base), base / "model.safetensors.index.json"
  tokenizer = _tokenizer_files(adapter) or _tokenizer_files(base)
  def build(out):
    _write_merged(adapter, base, file_of, out)
    for file in tokenizer:
      shutil.copy(file, out)
  parts = [adapter / ADAPTER_CONFIG, adapter / ADAPTER_FILE, base / "config.json", *([index] if index.exists() else []),
           *sorted(set(file_of.values())), *tokenizer]
  return converted.directory_of(adapter, parts, build)


def _write_merged(adapter, base, file_of, out):
  """Writes config.json and the merged tensors: one file for each of the base's files, one for the adapter's heads.

  file_of: {tensor of the base: its file}.
  """
  scale_of, targets = _scale(files.read_json(adapter / ADAPTER_CONFIG), adapter)
  hf = files.read_json(base / "config.json")
  checkpoint = Model(config_from_hf(hf | {"num_labels": 2})).checkpoint
  full = formats.full_names(checkpoint, file_of)
  deltas, heads = _parts(adapter, set(full.values()), targets)
  placed = dict.fromkeys(heads, "model-heads.safetensors")
  safetensors.numpy.save_file(heads, out / "model-heads.safetensors", {"format": "pt"})
  for number, file in enumerate(sorted(set(file_of.values()))):
    values = {full[name]: _merged(file, name, deltas.get(full[name]), scale_of, checkpoint, adapter)
              for name in file_of if file_of[name] == file and full[name] not in heads}
    safetensors.numpy.save_file(values, out / f"model-{number}.safetensors", {"format": "pt"})
    placed |= dict.fromkeys(values, f"model-{number}.safetensors")
  (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
  (out / "config.json").write_text(json.dumps(_with_labels(hf, heads, checkpoint), indent=2))


def _tokenizer_files(directory):
  """The files of a directory's tokenizer; [] if it has no vocabulary."""
  if not any((directory / name).is_file() for name in VOCABULARY_FILES):
    return []
  return sorted(file for pattern in TOKENIZER for file in directory.glob(pattern) if file.is_file())


def _scale(config: dict[str, Any], adapter: Path):
  """(function rank -> factor of B A, names of the adapted modules).

  Raises:
    InputError: the adapter changes the base in another way than by adding B A to kernels.
  """
  fields = Fields(config, ADAPTER_CONFIG)
  fields.string("peft_type", None, ("LORA",))
  fields.string("bias", "none", ("none",))
  if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
    raise InputError(f"{adapter}: init_lora_weights {short(config['init_lora_weights'])} changes the base's own "
                     "kernels: merge it with peft (merge_and_unload) and give the merged model")
  unknown = [f"{name}={short(value)}" for name, value in config.items()
             if value not in (None, False, 0, "", [], {}) and name not in HARMLESS]
  if unknown:
    raise InputError(f"{adapter} is an adapter with {listed(unknown)}, which is not implemented: merge it with peft "
                     "(merge_and_unload) and give the merged model")
  alpha, use_rslora = fields.positive("lora_alpha"), fields.flag("use_rslora", False)
  targets = config.get("target_modules")
  if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
    raise InputError(f"{adapter}: target_modules is {short(targets)}, wanted a list of names: merge it with peft "
                     "(merge_and_unload) and give the merged model")
  return lambda rank: alpha / (rank ** 0.5 if use_rslora else rank), targets


def _parts(adapter, base_names, targets):
  """({tensor of the base: {"A": array, "B": array}}, {tensor: array that is added or replaces the base's})."""
  deltas, heads, unknown = {}, {}, []
  for name in files.tensor_names(adapter / ADAPTER_FILE):
    parsed = re.fullmatch(r"base_model\.model\.(.{1,300}?)(?:\.lora_(A|B))?\.(weight|bias)", name, re.ASCII)
    target = f"{parsed[1]}.{parsed[3]}" if parsed else ""
    adapted = parsed and any(f".{parsed[1]}".endswith(f".{module}") for module in targets)      # peft's rule
    if adapted and parsed[2] and parsed[3] == "weight" and target in base_names:
      deltas.setdefault(target, {})[parsed[2]] = files.float_tensor(adapter / ADAPTER_FILE, name)
    elif parsed and not adapted and not parsed[2] and "lora_" not in target:
      heads[target] = files.float_tensor(adapter / ADAPTER_FILE, name)
    else:
      unknown.append(name)
  unknown += [name for name, pair in deltas.items() if set(pair) != {"A", "B"}]
  if unknown:
    raise InputError(f"{adapter / ADAPTER_FILE} has tensors that its target_modules or its base have no place for: "
                     f"{listed(unknown)}: give the base that it was trained on (--config.student.base)")
  return deltas, heads


def _merged(file, name, pair, scale_of, checkpoint, adapter):
  """The base's tensor. An adapted kernel becomes kernel + scale B A, added in float32 and rounded once."""
  value = files.float_tensor(file, name)
  if pair is None:
    return value
  a, b = (pair[side].astype(np.float32) for side in "AB")
  fits = a.ndim == b.ndim == 2 and 0 < a.shape[0] == b.shape[1]
  shape = (b.shape[0], a.shape[1]) if fits else ()
  if value.shape != (shape if checkpoint.transposed else shape[::-1]):
    raise InputError(f"{adapter}: A {a.shape} and B {b.shape} do not fit a kernel of {value.shape}: give the base that "
                     "the adapter was trained on (--config.student.base)")
  delta = scale_of(a.shape[0]) * (b @ a)
  return (value.astype(np.float32) + (delta if checkpoint.transposed else delta.T)).astype(value.dtype)


def _with_labels(hf, heads, checkpoint):
  """The base's config.json as a classifier's. If the adapter has a head, its rows give the number of classes."""
  hf = hf | {"architectures": [f"{checkpoint.name}ForSequenceClassification"]}
  rows = {len(value) for name, value in heads.items() if name in HEADS and value.ndim}
  labels = hf.get("id2label")
  if rows and not (isinstance(labels, dict) and {len(labels)} == rows):
    hf = {name: value for name, value in hf.items() if name not in ("id2label", "label2id")}
    hf["num_labels"] = rows.pop()
  return hf
