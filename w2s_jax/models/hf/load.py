"""Reads Hugging Face model directories: safetensors only, with a check of every tensor, in small pieces."""

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from w2s_jax import InputError, quantized, sharding
from w2s_jax.models.hf import adapter_file, files, formats, pieces
from w2s_jax.models.hf.fields import Fields, listed, short
from w2s_jax.models.hf.places import resolve
from w2s_jax.models.model import Model, config_from_hf

LOG = logging.getLogger(__name__)

OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}               # in checkpoints converted from TensorFlow
FLOAT32 = r".*(norm|score|pooler|classifier|widen)/.*"             # leaves that stay float32 in any case: norms, heads
WRAPPED = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")      # DDP, torch.compile, peft, FSDP


def load_pretrained(path: str | Path, num_labels: int | None = None, dtype: str = "float32",
                    mesh: jax.sharding.Mesh | None = None, *, num_layers: int | None = None,
                    feature_width: int | None = None, seed: int | None = 0, head: str | None = None,
                    quantize: str = "", **runtime: Any) -> tuple[Model, dict]:
  """Loads a model directory or hub id in small pieces, with little memory beyond the arrays themselves.

  It includes adapters that could not be merged (`w2s_adapter.safetensors`), and logs that it does.

  Args:
    path: see `resolve`. To choose the base of an adapter, call `resolve` first.
    num_labels: number of classes; a head for another number in the checkpoint is an error. None: config.json's, or 2.
    dtype: dtype of the frozen base; norms and heads are always float32.
    mesh: devices for the leaves, placed by the model's `shardings`; None: the first device. Each host reads only its
      devices' slices.
    num_layers: number of layers to keep, from the first on (a small teacher from a larger model); None: all.
    feature_width: width of the W2S teacher's head on an encoder; None: the head in the directory, or no such head.
    seed: seed of a head that the checkpoint does not have (logged); None: a missing head is an error.
    head: "lm" selects the family's language-model head; the output's logits are then [B, V], for the pooled token.
    quantize: "int8", "int4" or "nf4" quantizes each layer kernel as soon as it is read (quantized.py).
    **runtime: remat, unroll, lora_dropout of the model's config.
  Returns:
    (Model, params): params is a nested dict of arrays.
  Raises:
    InputError: unsupported architecture, or missing, extra and wrongly shaped tensors, all listed at once.
  """
  if quantize:
    quantized.check(quantize)
  directory = resolve(str(path))
  files.check_links(directory)
  model, total_layers, tensors = _described(directory, num_labels, num_layers, feature_width,
                                            {"dtype": dtype, **runtime} | ({} if head is None else {"head": head}))
  abstract = model.abstract_params()
  leaves = traverse_util.flatten_dict(abstract, sep="/")
  names = formats.weight_names(model, leaves)
  fresh = _check_tensors(directory, model, leaves, names, tensors, total_layers)
  adapter = adapter_file.find(directory, model, {path: leaf.shape for path, leaf in leaves.items()}, total_layers)
  if adapter:
    LOG.warning(f"{directory}: with the adapter in {adapter_file.FILE}, which transformers ignores")
  places = dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  if mesh is not None:
    places = traverse_util.flatten_dict(sharding.param_shardings(abstract, model.shardings, mesh), sep="/")
  params = _fresh_head(directory, model, [leaf for leaf, name in names.items() if name in fresh], fresh, seed, mesh)
  with pieces.threads() as run:
    for leaf, name in names.items():
      if name not in fresh:
        leaf_dtype = jnp.float32 if re.fullmatch(FLOAT32, leaf) else jnp.dtype(dtype)
        transposed = formats.is_transposed(model, leaf)
        read = functools.partial(_read, tensors, name, transposed)
        params[leaf] = _place(read, leaves[leaf].shape, leaf_dtype, places[leaf], transposed, run)
        if quantize and quantized.is_layer_kernel(leaf):
          params[leaf] = _quantized(params[leaf], leaf, quantize, model.shardings, mesh)
    for leaf, shape in adapter.items():
      place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      if mesh is not None:
        place = sharding.leaf_sharding(leaf, jax.ShapeDtypeStruct(shape, jnp.float32), model.shardings, mesh)
      read = functools.partial(adapter_file.read, directory, leaf)
      params[leaf] = _place(read, shape, jnp.float32, place, False, run)
  return model, traverse_util.unflatten_dict(params, sep="/")


def _fresh_head(directory, model, leaves, names, seed, mesh):
  """{path: leaf} of new leaves for the tensors `names` that the checkpoint lacks; logs the names."""
  if not names:
    return {}
  missing = ", ".join(sorted(names))
  if seed is None:
    raise InputError(f"{directory} has no {missing}: it is no classifier; give a fine-tuned one")
  _warn_once(f"{directory}: no {missing} in the checkpoint; initialised with seed {seed}")
  return traverse_util.flatten_dict(model.init(jax.random.key(seed), mesh, leaves), sep="/")


@functools.cache
def _warn_once(message):
  """Logs each message once, because several stages may load the same checkpoint."""
  LOG.warning(message)


def _described(directory, num_labels, num_layers, feature_width, runtime):
  """(Model, number of the checkpoint's layers, {tensor name: pieces.Stored}), from config and safetensors headers."""
  hf = files.read_json(directory / "config.json")
  hf["num_labels"] = Fields(hf).num_labels() if num_labels is None else num_labels
  quantization = Fields(hf).section("quantization_config")
  if quantization.values and quantization.values.get("quant_method") != "gguf":      # dequantized GGUFs keep this
    raise InputError(f"{directory} is quantized (quantization_config in its config.json), but only floats can be read: "
                     f"{files.DEQUANTIZE}")
  own_head = feature_width is None and (directory / formats.HEAD_CONFIG).exists()
  if own_head:
    widened = Fields(files.read_json(directory / formats.HEAD_CONFIG), formats.HEAD_CONFIG)
    feature_width = widened.integer("feature_width")
  if feature_width is not None:
    runtime = runtime | {"feature_width": feature_width}
  model = Model(config_from_hf(hf, **runtime))
  total_layers = model.config.num_layers
  if num_layers is not None:
    if not 1 <= num_layers <= total_layers:
      raise InputError(f"{directory} has {total_layers} layers, {num_layers} were asked for: lower num_layers "
                       "(--config.teacher.layers)")
    model = Model(dataclasses.replace(model.config, num_layers=num_layers))
  tensors = _find_tensors(directory, model.checkpoint)
  if own_head and "w2s.widen.weight" not in tensors:  # w2s_head.json could ask for a new head of any size
    raise InputError(f"{directory} has a {formats.HEAD_CONFIG}, but no w2s.widen.weight in a {formats.HEAD_FILE}")
  return model, total_layers, tensors


def _find_tensors(directory, checkpoint):
  """{tensor name: pieces.Stored} of the checkpoint, with the names that a model with a head has."""
  file_of = files.tensor_files(directory)
  full = {name: re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{OLD_NORM_NAMES[m[1]]}", whole)
          for name, whole in formats.full_names(checkpoint, file_of).items()}
  file = directory / formats.HEAD_FILE
  if file.exists():
    heads = dict.fromkeys(files.tensor_names(file), file)
    if (not (directory / formats.HEAD_CONFIG).exists() or set(heads) != set(formats.W2S_HEAD.values())
        or set(heads) & {*file_of, *full.values()}):              # it would hide tensors that transformers runs
      raise InputError(f"{file} is not the W2S head of a teacher's backbone, and transformers does not read it: delete "
                       f"it, or give a directory that a run left as models/teacher")
    file_of, full = file_of | heads, full | {name: name for name in heads}
  out = {}
  for file in set(file_of.values()):
    for name, tensor in pieces.stored(file).items():
      if file_of[name] != file:
        continue
      if full[name] in out:
        raise InputError(f"{directory} has the tensor {short(full[name])} twice, under an old and a new name")
      if not re.fullmatch(checkpoint.unused, full[name]):     # unused tensors are checked later, if the model has them
        files.check_dtype(file, name, tensor.dtype)
      out[full[name]] = tensor
  return out


def _check_tensors(directory, model, leaves, names, tensors, total_layers):
  """Compares the checkpoint with the model; returns the names of the head tensors to initialise.

  These are the tensors of the head's modules that the checkpoint lacks completely. If the model has the W2S head and
  the checkpoint does not, the whole head is initialised. The checkpoint's own head was trained on other features and
  may carry the backdoor.
  """
  c, checkpoint = model.config, model.checkpoint
  wanted = {}                                                             # {tensor name: shape in the file}
  for leaf, name in names.items():
    stacked = "{}" in name
    shape = leaves[leaf].shape[1:] if stacked else leaves[leaf].shape
    shape = shape[::-1] if formats.is_transposed(model, leaf) else shape
    wanted |= dict.fromkeys(formats.names_by_layer(model, name).values(), shape)
  heads = {name for table in (checkpoint.weights, names) for leaf, name in table.items()
           if re.fullmatch(formats.HEAD, leaf)}
  replaced = getattr(c, "feature_width", 0) and not any(t.startswith("w2s.") for t in tensors)
  modules = {t.rsplit(".", 1)[0] for t in tensors}
  head_names = {name for leaf, name in names.items() if re.fullmatch(formats.HEAD, leaf)}
  fresh = {t for t in head_names if replaced or t.rsplit(".", 1)[0] not in modules}

  def unused(name):
    layer = re.search(r"\.(\d+)\.", name)
    return (re.fullmatch(checkpoint.unused, name) or (replaced and name in heads)
            or (layer and c.num_layers <= int(layer[1][:9]) < total_layers))   # layers cut off by num_layers
  missing = sorted(set(wanted) - set(tensors) - fresh)
  extra = sorted(t for t in set(tensors) - set(wanted) if not unused(t))
  wrong = [f"{t} {tensors[t].shape}, wanted {wanted[t]}" for t in sorted(set(wanted) & set(tensors) - fresh)
           if tensors[t].shape != wanted[t]]
  if missing or extra or wrong:
    prefix = next((p for p in WRAPPED if tensors and all(tensor.name.startswith(p) for tensor in tensors.values())),
                  None)
    if prefix:
      raise InputError(f"the names of all tensors of {directory} begin with {prefix!r}, because a wrapper around the "
                       "model was saved: save the model inside the wrapper with save_pretrained(DIR)")
    raise InputError(f"{directory} does not fit its config.json (num_labels={c.num_labels}): "
                     f"missing {listed(missing)}; unexpected {listed(extra)}; wrong shape {listed(wrong)}")
  for name in sorted(set(wanted) & set(tensors) - fresh):
    files.check_dtype(tensors[name].file, tensors[name].name, tensors[name].dtype)
  return fresh


def _read(tensors, name, transposed, index, out):
  """Fills `out` with the part `index` of a parameter leaf. It stacks the layers, and transposes if `transposed`."""
  stacked = "{}" in name
  inner = index[1:] if stacked else index
  for layer, part in enumerate(out if stacked else [out], index[0].start):
    tensor = tensors.get(name.format(layer))
    if tensor is None:  # Checkpoint.absent
      part[...] = 1
      continue
    rows, *others = inner[::-1] if transposed else inner
    pieces.copy(pieces.mapped(tensor, rows)[:, *others], part, transposed)


def _place(read, shape, dtype, place, transposed, run):
  """The array with the sharding `place`, filled by read(index, out). Only a few pieces lie in memory beside it."""
  order = (*range(len(shape) - 2), -1, -2) if transposed else range(len(shape))  # order of the axes in the file
  shards = []
  for device, index in place.addressable_devices_indices_map(shape).items():
    index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape))
    cut = _cut([index[axis] for axis in order], pieces.PIECE_BYTES // jnp.dtype(dtype).itemsize)
    cut = [tuple(piece[axis] for axis in order) for piece in cut]
    sizes = [s.stop - s.start for s in index]
    if device.platform == pieces.HOST or len(cut) == 1:
      whole = pieces.empty(sizes, dtype)
      run(lambda piece: read(piece, whole[_within(piece, index)]), cut)
      shards.append(jax.block_until_ready(jax.device_put(whole, device)))
      continue
    shard = jnp.zeros(sizes, dtype, device=device)
    for piece in cut:
      part = np.empty([s.stop - s.start for s in piece], dtype)
      read(piece, part)
      start = [s.start for s in _within(piece, index)]
      shard = jax.block_until_ready(_write(shard, jax.device_put(part, device), start))
    shards.append(shard)
  return jax.make_array_from_single_device_arrays(shape, place, shards)


def _within(piece, index):
  """The index of a piece within the shard that has the index `index`."""
  return tuple(slice(p.start - s.start, p.stop - s.start) for p, s in zip(piece, index))


def _quantized(kernel, path, name, rules, mesh):
  make = functools.partial(quantized.quantize, name=name)
  places = None
  if mesh is not None:
    places = sharding.leaf_sharding(path, jax.eval_shape(make, kernel), rules, mesh)
  return jax.jit(make, out_shardings=places, donate_argnums=0)(kernel)


def _cut(index, max_elements):
  """Splits `index` into indices of at most `max_elements` elements each, along its first axes first."""
  if not index:
    return [()]
  rows = max(1, max_elements // math.prod(s.stop - s.start for s in index[1:]))
  firsts = [slice(i, min(i + rows, index[0].stop)) for i in range(index[0].start, index[0].stop, rows)]
  return [(first, *rest) for first in firsts for rest in _cut(index[1:], max_elements)]


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole, piece, start):
  bits = f"uint{8 * whole.dtype.itemsize}"  # XLA on CPUs would convert all of `whole` from bfloat16 to float32 and back
  return jax.lax.dynamic_update_slice(whole.view(bits), piece.view(bits), start).view(whole.dtype)
