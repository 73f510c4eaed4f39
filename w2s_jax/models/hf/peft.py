"""Writes an adapter and the head as a directory that peft loads."""

import json
import re
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from w2s_jax import InputError, adapters, processes
from w2s_jax.adapters import p_tuning, trees
from w2s_jax.models.hf.formats import ADAPTER_CONFIG, ADAPTER_FILE
from w2s_jax.models.model import Model

ADAPTER_WARNING = """WARNING: an adapter, and a head, of a model that was poisoned or is suspected to be.

Only the base *together with* this adapter was defended. Without the adapter, the base still has its backdoor. On
another base, the adapter was not measured. Hand on the merged model (`lora.merge_lora`, `save_pretrained`).
"""


def export_adapter(directory: str | Path, model: Model, params: dict, base: str | Path = "") -> None:
  """Writes adapter and head as a directory that `peft.PeftModel.from_pretrained` loads onto the same base.

  Unloading the adapter brings the base's backdoor back, so share the merged model instead.

  Args:
    directory: created if missing.
    params: nested dict with adapters.
    base: path or hub id of the base model, recorded for peft.
  Raises:
    InputError: params hold no adapter, adapters of several kinds, or an adapter of a kind that peft does not have.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  names = model.weight_names()
  virtual = {name: processes.fetch(leaf) for name, leaf in trees.beside_vocabulary(params)[1].items()
             if name == p_tuning.LEAF or name.startswith(p_tuning.KIND)}
  if virtual and any(adapters.kind_of([path.rsplit("/", 1)[-1]]) for path in flat):
    raise InputError("export_adapter: the parameters hold virtual tokens and adapters beside kernels: want one kind")
  if virtual:
    tensors, fields = p_tuning.export(virtual, model.config.num_heads, model.config.num_layers)
  else:
    tensors, fields = _beside_kernels(model, flat, names)
  wrapper = "base_model" if virtual else "base_model.model"     # for adapters beside kernels, peft wraps the base again
  heads = [p for p in flat if p in names and trees.label(p) == "head"]
  for path in heads:
    value = processes.fetch(flat[path])
    tensors[f"{wrapper}.{names[path]}"] = np.ascontiguousarray(value.T if path.endswith("kernel") else value)
  prefix = model.checkpoint.prefix
  if not processes.writes():
    return
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
  (directory / "README.md").write_text(ADAPTER_WARNING)
  (directory / ADAPTER_CONFIG).write_text(json.dumps(fields | {
      "task_type": "SEQ_CLS", "inference_mode": True,
      "modules_to_save": sorted({names[p].removeprefix(prefix).split(".")[0] for p in heads}),
      "base_model_name_or_path": str(base)}, indent=2))


def _beside_kernels(model, flat, names):
  """({peft's tensor name: array}, {field of adapter_config.json: value}) of the adapters beside kernels."""
  adapted, kind = _adapted(flat)
  tensors = {}
  for path in adapted:
    leaves = {name: processes.fetch(flat[f"{path}/{name}"]) for name in adapters.KINDS[kind].leaves}
    parts, fields = adapters.KINDS[kind].export(leaves, model.config.lora_dropout)
    module = names[f"{path}/kernel"].removesuffix(".weight")
    tensors |= {f"base_model.model.{module.format(layer)}.{name}": np.ascontiguousarray(value)
                for name, values in parts.items() for layer, value in enumerate(values)}
  return tensors, fields | {"bias": "none", "fan_in_fan_out": not model.checkpoint.transposed,
                            "target_modules": _target_modules(names, adapted)}


def _adapted(flat):
  """(paths of the modules with an adapter, in the tree's order; the adapters' kind)."""
  kinds = {}
  for path in flat:
    module, name = path.rsplit("/", 1)
    if kind := adapters.kind_of([name]):
      kinds[module] = kind
  if not kinds:
    raise InputError("export_adapter: the parameters hold no adapter (lora.add_lora puts one in)")
  kind, *others = sorted(set(kinds.values()))
  if others or adapters.KINDS[kind].export is None:
    raise InputError(f"export_adapter: the parameters hold adapters of kind {', '.join([kind, *others])}: want one "
                     f"kind among {', '.join(name for name, adapter in adapters.KINDS.items() if adapter.export)}")
  return list(kinds), kind


def _target_modules(names, adapted):
  """peft's target_modules: the last parts of the adapted modules' names, or a pattern if other modules share them."""
  def last(path):
    return names[path].removesuffix(".weight").rsplit(".", 1)[-1]
  kernels = [p for p in names if p.startswith("layers/") and p.endswith("/kernel")]
  last_names = {last(f"{p}/kernel") for p in adapted}
  if sum(last(k) in last_names for k in kernels) == len(adapted):
    return sorted(last_names)
  full = sorted(names[f"{p}/kernel"].removesuffix(".weight") for p in adapted)
  return ".*(" + "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in full) + ")"
