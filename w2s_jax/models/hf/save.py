"""Writes Hugging Face model directories, which transformers loads; each appears complete or not at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from w2s_jax import InputError, processes
from w2s_jax.models.hf import adapter_file, formats, pieces
from w2s_jax.models.hf.files import read_json
from w2s_jax.models.model import Model
from w2s_jax.models.padding import with_padding_token

MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")
TEMPLATES = "additional_chat_templates"      # a directory that transformers' tokenizers write


def _is_model_directory(directory):
  """Whether the directory holds a model and no other files, which would be lost if it were replaced."""
  return ((directory / "config.json").is_file() and "model_type" in read_json(directory / "config.json")
          and all(f.is_file() and f.suffix in MODEL_SUFFIXES or f.name == TEMPLATES for f in directory.iterdir()))


def save_pretrained(directory: str | Path, model: Model, params: dict, tokenizer: Any = None,
                    id2label: dict[int, str] | None = None, card: str | None = None) -> None:
  """Writes a directory that transformers loads; it appears complete or not at all.

  The W2S teacher's head goes to `w2s_head.safetensors`. Adapters that cannot be merged, such as soft tokens, go to
  `w2s_adapter.safetensors`. `load_pretrained` reads both files. transformers ignores both: it loads a teacher's
  backbone alone, and a model without its adapter. The card warns of the missing adapter.

  Args:
    directory: created; an existing model directory is replaced, any other directory with files is refused.
    params: nested dict without adapters that can be merged (`lora.merge_lora` first).
    tokenizer: a transformers tokenizer to save as well; its padding token goes into the model's config.
    id2label: names of the classes; None: those that the model was loaded with, or LABEL_0, ...
    card: text of the model card, README.md.
  Raises:
    ValueError: params hold adapters that can be merged, or do not fit the model.
    InputError: the directory holds other files than a model's, or the tokenizer's padding token does not fit the model
      (`padding.with_padding_token`).
  """
  if tokenizer is not None:
    model = with_padding_token(model, tokenizer)
  c = model.config
  names = model.weight_names()
  leaves = traverse_util.flatten_dict(params, sep="/")
  adapter_paths = adapter_file.paths_to_save(model, leaves)
  directory = Path(directory)
  if directory.exists() and any(directory.iterdir()) and not _is_model_directory(directory):
    raise InputError(f"{directory} exists and is not a model directory alone: give a new one")
  checkpoint = model.checkpoint
  widened = getattr(c, "feature_width", 0)
  tensors, head = {}, {}                                                  # {tensor name: _Part}
  for path, name in names.items():
    for layer, tensor in formats.names_by_layer(model, name).items():
      part = _Part(leaves[path], layer, formats.is_transposed(model, path))
      if widened and re.fullmatch(formats.HEAD, path):
        head[tensor] = part
      else:                                                               # with our head, the backbone is saved alone
        tensors[tensor.removeprefix(checkpoint.prefix if widened else "")] = part
  shards = split_state_dict_into_shards_factory(
      tensors, get_storage_size=lambda t: t.nbytes, get_storage_id=lambda t: None,
      filename_pattern="model{suffix}.safetensors", max_shard_size="5GB")
  files = {formats.HEAD_FILE: head} if head else {}
  if adapter_paths:
    files[adapter_file.FILE] = {path: _Part(leaves[path], None, False) for path in adapter_paths}
    card = "\n".join([card, adapter_file.NOTE] if card else [adapter_file.NOTE])
  files |= {file: {k: tensors[k] for k in keys} for file, keys in shards.filename_to_tensors.items()}
  staging = directory.with_name(directory.name + ".part")
  processes.wait(f"before {directory}")                                   # until every process has checked it
  if processes.writes():
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
  with pieces.threads() as run:
    for file, parts in files.items():
      _write(staging / file, parts, run)
  if processes.writes():
    _finish(staging, directory, model, shards, bool(head), leaves, tokenizer, id2label, card)
  processes.wait(f"saved {directory}")


def _finish(staging, directory, model, shards, has_head, leaves, tokenizer, id2label, card):
  """Writes the files beside the tensors, and replaces the directory with `staging`."""
  c = model.config
  if has_head:
    (staging / formats.HEAD_CONFIG).write_text(json.dumps({"feature_width": c.feature_width}))
  if shards.is_sharded:
    (staging / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}))
  dtype = next(leaf.dtype for path, leaf in leaves.items() if re.fullmatch(r"layers/.*/kernel", path))
  (staging / "config.json").write_text(json.dumps(_config(model, id2label, dtype), indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(staging)
  if card is not None:
    (staging / "README.md").write_text(card)
  old = directory.with_name(directory.name + ".old")
  if directory.exists():
    shutil.rmtree(old, ignore_errors=True)             # a process that was killed below left it
    os.replace(directory, old)
  os.replace(staging, directory)
  if old.exists():
    shutil.rmtree(old)


class _Part(NamedTuple):
  """A tensor to write to a file. Its values are fetched from the leaf only when they are written."""
  leaf: jax.Array | np.ndarray
  layer: int | None
  transposed: bool

  @property
  def described(self) -> jax.ShapeDtypeStruct:
    shape = self.leaf.shape if self.layer is None else self.leaf.shape[1:]
    return jax.ShapeDtypeStruct(shape[::-1] if self.transposed else shape, self.leaf.dtype)

  @property
  def nbytes(self) -> int:
    return self.leaf.nbytes // (1 if self.layer is None else self.leaf.shape[0])

  def values(self) -> np.ndarray:
    """The values, not transposed. All processes must call it."""
    if isinstance(self.leaf, np.ndarray):
      return self.leaf if self.layer is None else self.leaf[self.layer]
    if self.leaf.is_fully_addressable and {device.platform for device in self.leaf.devices()} == {pieces.HOST}:
      return _on_host(self.leaf, self.layer)
    return processes.fetch(self.leaf if self.layer is None else self.leaf[self.layer])


def _on_host(leaf, layer):
  """The values of a leaf, or of one of its layers, from shards in the host's memory. A single shard is not copied.

  Indexing the leaf itself would compile a program, and JAX would keep a copy of the whole leaf.
  """
  shards = [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0]
  if layer is not None:                                                   # no rule shards the layer axis
    shards = [(index[1:], values[layer]) for index, values in shards]
  if len(shards) == 1:
    return shards[0][1]
  out = np.empty(leaf.shape if layer is None else leaf.shape[1:], leaf.dtype)
  for index, values in shards:
    out[index] = values
  return out


def _write(file, parts, run):
  """Writes {tensor name: _Part}, one tensor after the other. All processes must call it."""
  if processes.writes():
    places = pieces.create(file, {name: part.described for name, part in parts.items()})
  for name, part in parts.items():
    values = part.values()
    if processes.writes():
      pieces.write(places[name], values, part.transposed, run)


def _config(model, id2label, dtype):
  """transformers' config.json for the model."""
  config, checkpoint = model.config, model.checkpoint
  labels = id2label or dict(enumerate(config.labels or [f"LABEL_{i}" for i in range(config.num_labels)]))
  kind = checkpoint.classifier
  if config.head == "lm":
    kind = checkpoint.language_model
  return config.to_hf() | {
      "architectures": [checkpoint.name + ("Model" if getattr(config, "feature_width", 0) else kind)],
      "model_type": config.model_type,
      "num_labels": config.num_labels, "id2label": {str(i): n for i, n in labels.items()},
      "label2id": {n: i for i, n in labels.items()}, "problem_type": "single_label_classification", "dtype": str(dtype)}
