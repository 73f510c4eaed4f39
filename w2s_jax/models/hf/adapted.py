"""A peft adapter in: LoRA merged into its base once, in the cache, into a directory that is read like any other."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from w2s_jax import InputError
from w2s_jax.models.hf import converted, files
from w2s_jax.models.hf.fields import Fields, listed, short
from w2s_jax.models.model import model_types

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# Fields of peft's config that do not change the merged network; any other one must be empty or false.
HARMLESS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
            "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "bias",
            "use_rslora", "init_lora_weights", "rank_pattern", "layers_to_transform", "layers_pattern", "peft_version",
            "auto_mapping", "qalora_group_size", "megatron_core", "ensure_weight_tying")


def is_adapter(directory: Path) -> bool:
  """Whether a directory holds an adapter and no model.

  Raises:
    InputError: it holds both, of which transformers would run the model *with* the adapter.
  """
  there = (directory / CONFIG).exists()
  if there and any(directory.glob("model*.safetensors*")):
    raise InputError(f"{directory} holds a model and an adapter ({CONFIG}), which transformers attaches to it: keep "
                     "the adapter in a directory of its own and give that, with --config.student.base")
  return there


def hub_id_of_base(directory: Path) -> str:
  """The hub id that the adapter names as its base; a path in a stranger's file is not followed.

  Raises:
    InputError: it names none.
  """
  base = files.read_json(directory / CONFIG).get("base_model_name_or_path")
  if not isinstance(base, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base, re.ASCII) or Path(base).exists():
    raise InputError(f"{directory} is an adapter, whose base {short(base)} is no hub id: set --config.student.base to "
                     "the base's directory")
  return base


def directory_of(adapter: Path, base: Path) -> Path:
  """The directory of safetensors that base and adapter were, or are now, merged into; of the base's dtype.

  Raises:
    InputError: another kind of adapter; tensors that the base has no place for.
  """
  for directory in (adapter, base):
    files.check_links(directory)
  scale_of = _scale(files.read_json(adapter / CONFIG), adapter)
  if not (adapter / WEIGHTS).is_file():
    raise InputError(f"{adapter} has {CONFIG} but no {WEIGHTS}: an adapter_model.bin is a pickle, which is never read; "
                     "save the adapter anew with peft, which writes safetensors")
  hf, where = files.read_json(base / "config.json"), files.tensor_files(base)
  families = model_types()
  checkpoint = families[Fields(hf).string("model_type", None, families)].tensors[hf["model_type"]]
  bare = not any(name.startswith(checkpoint.prefix) for name in where)   # saved from the backbone class alone
  full = {name: checkpoint.prefix * bare + name for name in where}
  deltas, heads = _parts(adapter, set(full.values()))
  own, others = (sorted(file for pattern in TOKENIZER for file in directory.glob(pattern))
                 for directory in (adapter, base))
  def build(out):
    index = dict.fromkeys(heads, "model-heads.safetensors")
    safetensors.numpy.save_file(heads, out / "model-heads.safetensors", {"format": "pt"})
    for number, file in enumerate(sorted(set(where.values()))):
      with files.open_tensors(file) as f:
        values = {full[name]: _merged(f.get_tensor(name), deltas.get(full[name]), scale_of, checkpoint, adapter)
                  for name in where if where[name] == file and full[name] not in heads}
      safetensors.numpy.save_file(values, out / f"model-{number}.safetensors", {"format": "pt"})
      index |= dict.fromkeys(values, f"model-{number}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (out / "config.json").write_text(json.dumps(_with_labels(hf, heads, checkpoint), indent=2))
    for file in own or others:
      shutil.copy(file, out)
  parts = [adapter / CONFIG, adapter / WEIGHTS, base / "config.json", *sorted(set(where.values())), *(own or others)]
  return converted.directory_of(adapter, parts, build)


def _scale(config: dict[str, Any], adapter: Path):
  """rank -> factor of B A; refuses what would make another network than B A added to the kernels."""
  fields = Fields(config, CONFIG)
  fields.string("peft_type", None, ("LORA",))
  fields.string("bias", "none", ("none",))
  if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
    raise InputError(f"{adapter}: init_lora_weights {short(config['init_lora_weights'])} changes the base's own "
                     "kernels: merge it with peft (merge_and_unload) and give the merged model")
  odd = [f"{name}={short(value)}" for name, value in config.items()
         if value not in (None, False, 0, "", [], {}) and name not in HARMLESS]
  if odd:
    raise InputError(f"{adapter} is an adapter with {listed(odd)}, which is not implemented: merge it with peft "
                     "(merge_and_unload) and give the merged model")
  alpha, square = fields.positive("lora_alpha"), fields.flag("use_rslora", False)
  return lambda rank: alpha / (rank ** 0.5 if square else rank)


def _parts(adapter, base_names):
  """({tensor of the base: {"A", "B"}}, {tensor: value} of what the adapter has instead of the base's)."""
  deltas, heads, odd = {}, {}, []
  with files.open_tensors(adapter / WEIGHTS) as f:
    for name in f.keys():
      place = re.fullmatch(r"base_model\.model\.(.{1,300}?)(?:\.lora_(A|B))?\.(weight|bias)", name, re.ASCII)
      target = f"{place[1]}.{place[3]}" if place else ""
      if place and place[2] and place[3] == "weight" and target in base_names:
        deltas.setdefault(target, {})[place[2]] = f.get_tensor(name)
      elif place and not place[2] and "lora_" not in target:
        heads[target] = f.get_tensor(name)
      else:
        odd.append(name)
  odd += [name for name, pair in deltas.items() if set(pair) != {"A", "B"}]
  if odd:
    raise InputError(f"{adapter / WEIGHTS} has tensors that its base has no place for: {listed(odd)}: give the base "
                     "that it was trained on (--config.student.base)")
  return deltas, heads


def _merged(value, pair, scale_of, checkpoint, adapter):
  """kernel + scale B A, added in float32 and rounded once."""
  if pair is None:
    return value
  a, b = (pair[name].astype(np.float32) for name in "AB")
  fits = a.ndim == b.ndim == 2 and 0 < a.shape[0] == b.shape[1]
  delta = scale_of(a.shape[0]) * (b @ a) if fits else np.zeros(())
  delta = delta if checkpoint.transposed else delta.T
  if delta.shape != value.shape:
    raise InputError(f"{adapter}: A {a.shape} and B {b.shape} do not fit a kernel of {value.shape}: give the base that "
                     "the adapter was trained on (--config.student.base)")
  return (value.astype(np.float32) + delta).astype(value.dtype)


def _with_labels(hf, heads, checkpoint):
  """The base's config.json as a classifier's, with as many classes as the adapter's head has rows."""
  hf = hf | {"architectures": [f"{checkpoint.name}ForSequenceClassification"]}
  rows = {len(value) for name, value in heads.items() if name in HEADS and value.ndim}
  labels = hf.get("id2label")
  if rows and not (isinstance(labels, dict) and {len(labels)} == rows):
    hf = {name: value for name, value in hf.items() if name not in ("id2label", "label2id")}
    hf["num_labels"] = rows.pop()
  return hf
