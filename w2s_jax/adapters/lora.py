"""LoRA in a parameter tree: add, merge, export. L layers, R rank."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from w2s_jax import InputError, processes, sharding
from w2s_jax.adapters import trees
from w2s_jax.models import quantized


def add_lora(params, rank, alpha, targets=("q_proj", "v_proj"), *, key, places=None):
  """A new tree with LoRA leaves beside the stacked kernels named in `targets` (Hu et al., arXiv 2106.09685).

  targets ("all-linear",) are all of them.

  `lora_a` [L, in, R] is uniform in +-1/sqrt(in), as peft starts it; `lora_b` [L, R, out] is zero, so the
  network's function is unchanged; `lora_alpha` [L] carries alpha. All float32.

  Args:
    places: new leaves (abstract) -> their NamedShardings: each is created where it belongs. None: on one device.
  Raises:
    InputError: a target that no layer has, or a rank below 1.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  kernels = [p for p in sorted(flat) if p.startswith("layers/") and p.endswith("/kernel")]
  known = sorted({p.split("/")[-2] for p in kernels})
  targets = known if tuple(targets) == ("all-linear",) else targets
  unknown = sorted(set(targets) - set(known))
  if unknown or rank < 1:
    raise InputError(f"LoRA rank {rank}, targets {tuple(targets)}: rank must be at least 1 and targets among "
                     f"{', '.join(known)}, or all-linear alone: set --config.lora.rank, --config.lora.targets")
  chosen = [p for target in targets for p in kernels if p.split("/")[-2] == target]
  def create(key):
    new = {}
    for i, kernel in enumerate(chosen):
      path = kernel.removesuffix("/kernel")
      layers, width_in, width_out = flat[kernel].shape
      bound = 1 / math.sqrt(width_in)
      new[f"{path}/lora_a"] = jax.random.uniform(jax.random.fold_in(key, i), (layers, width_in, rank), jnp.float32,
                                                 -bound, bound)
      new[f"{path}/lora_b"] = jnp.zeros((layers, rank, width_out), jnp.float32)
      new[f"{path}/lora_alpha"] = jnp.full((layers,), alpha, jnp.float32)
    return traverse_util.unflatten_dict(new, sep="/")
  if places is not None:
    places = places(jax.eval_shape(create, key))
  return trees.combine(jax.jit(create, out_shardings=places)(key), params)


def has_adapters(params):
  return any(path[-1] == "lora_a" for path in traverse_util.flatten_dict(params))


def merge_lora(params):
  """A new tree without adapters: kernel + A B alpha / R, computed in float32 and kept in the kernel's dtype.

  Kernels of a quantized base become plain ones, on the host: all together may be more than the device holds.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  out = {p: leaf for p, leaf in flat.items() if not p.rsplit("/", 1)[-1].startswith("lora_")}
  for path in (p.removesuffix("/kernel") for p in out if p.endswith("/kernel")):
    kernel = flat[f"{path}/kernel"]
    if f"{path}/lora_a" in flat:
      out[f"{path}/kernel"] = _merge(kernel, *(flat[f"{path}/{name}"] for name in ("lora_a", "lora_b", "lora_alpha")))
    elif quantized.is_quantized(kernel):
      out[f"{path}/kernel"] = jax.jit(quantized.dequantize)(kernel)
    if quantized.is_quantized(kernel):
      out[f"{path}/kernel"] = processes.fetch(out[f"{path}/kernel"])
  return traverse_util.unflatten_dict(out, sep="/")


@jax.jit
def _merge(kernel, a, b, alpha):
  def layer(leaves):
    kernel, a, b, alpha = leaves
    delta = jnp.matmul(a, b, precision="highest") * (alpha / a.shape[-1])
    return (quantized.dequantize(kernel.astype(jnp.float32)) + delta).astype(kernel.dtype)
  return jax.lax.map(layer, (kernel, a, b, alpha))


ADAPTER_WARNING = """WARNING: an adapter, and a head, of a model that was poisoned or is suspected to be.

Only the base *together with* this adapter was defended: unloading it, or putting it on another base, brings the
backdoor back. The merged model (`lora.merge_lora`, `save_pretrained`) is what to hand on.
"""


def export_adapter(directory, model, params, base=""):
  """Writes adapter and head as a directory that `peft.PeftModel.from_pretrained` loads onto the same base.

  Unloading the adapter brings the base's backdoor back: the merged model is what to hand on.

  Args:
    directory: created if missing.
    params: nested dict with adapters.
    base: path or hub id of the base model, recorded for peft.
  Raises:
    InputError: params hold no adapter.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  names = model.weight_names()
  adapted = [p.removesuffix("/lora_a") for p in flat if p.endswith("/lora_a")]
  if not adapted:
    raise InputError("export_adapter: the parameters hold no adapter (lora.add_lora puts one in)")
  tensors = {}
  for path in adapted:
    module = names[f"{path}/kernel"].removesuffix(".weight")
    for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
      for layer, value in enumerate(processes.fetch(flat[f"{path}/{ours}"])):
        tensors[f"base_model.model.{module.format(layer)}.{theirs}.weight"] = np.ascontiguousarray(value.T)
  heads = [p for p in flat if p in names and sharding.match(p, trees.LABEL_RULES) == "head"]
  for path in heads:
    value = processes.fetch(flat[path])
    tensors[f"base_model.model.{names[path]}"] = np.ascontiguousarray(value.T if path.endswith("kernel") else value)
  rank, alpha = flat[f"{adapted[0]}/lora_a"].shape[-1], float(flat[f"{adapted[0]}/lora_alpha"][0])
  if not processes.writes():
    return
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
  (directory / "README.md").write_text(ADAPTER_WARNING)
  (directory / "adapter_config.json").write_text(json.dumps({
      "peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": alpha, "bias": "none",
      "lora_dropout": model.config.lora_dropout, "inference_mode": True,
      "fan_in_fan_out": not model.checkpoint.transposed,
      "target_modules": _target_modules(names, adapted),
      "modules_to_save": sorted({names[p].removeprefix(model.checkpoint.prefix).split(".")[0] for p in heads}),
      "base_model_name_or_path": str(base)}, indent=2))


def _target_modules(names, adapted):
  """peft's target_modules: the modules' last names, or one pattern where another layer's module has the same name."""
  def last(path):
    return names[path].removesuffix(".weight").rsplit(".", 1)[-1]
  kernels = [p for p in names if p.startswith("layers/") and p.endswith("/kernel")]
  short = {last(f"{p}/kernel") for p in adapted}
  if sum(last(k) in short for k in kernels) == len(adapted):
    return sorted(short)
  full = sorted(names[f"{p}/kernel"].removesuffix(".weight") for p in adapted)
  return ".*(" + "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in full) + ")"
