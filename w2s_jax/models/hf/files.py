"""Opens and checks the files of a model directory, which may come from a stranger."""

import hashlib
import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from w2s_jax import InputError
from w2s_jax.models.hf.fields import finite_json, listed, short

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
JSON_BYTES = 64 << 20                                              # largest JSON file that is read
OTHERS = (".h5", ".msgpack", ".safetensors", ".gguf", ".onnx")       # models in other files than model.safetensors
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # by name in a safetensors header
HEADER_BYTES = 16 << 20               # largest header of a safetensors file that is read
LFS = b"version https://git-lfs"
DEQUANTIZE = ("where you trust it, load it with transformers and save model.dequantize() with save_pretrained, or give "
              "the model from before it was quantized")


def read_json(path: Path) -> dict:
  """The object in a JSON file.

  Raises:
    InputError: it cannot be read, does not parse, or is no object.
  """
  try:
    if not path.is_file():
      raise OSError("no such file" + (what_is_there(path.parent) if path.name == "config.json" else ""))
    if path.stat().st_size > JSON_BYTES:
      raise ValueError(f"it has {path.stat().st_size} bytes, at most {JSON_BYTES} are read")
    value = json.loads(path.read_bytes(), parse_constant=finite_json)
  except (OSError, ValueError, RecursionError) as e:
    raise InputError(f"cannot read {path}: {e}") from None
  if not isinstance(value, dict):
    raise InputError(f"cannot read {path}: it holds a {type(value).__name__}, wanted an object")
  return value


def check_links(directory: Path) -> None:
  """Refuses a directory that has a link to elsewhere, an unprintable name, or anything but files and directories.

  It checks two levels, as deep as files are read (transformers reads additional_chat_templates/*.jinja). In the Hugging
  Face cache, files in snapshots/REVISION may link to its blobs.

  Raises:
    InputError: names the file.
  """
  home = directory.resolve()
  allowed = [home]
  if home.parent.name == "snapshots":
    allowed.append(Path(os.path.realpath(home.parent.parent / "blobs")))
  for file in sorted([*directory.glob("*"), *directory.glob("*/*")]):
    if not file.name.isprintable():
      raise InputError(f"{directory}: the file name {short(file.name)} cannot be printed: remove or rename it")
    real = os.path.realpath(file)                                  # Path.resolve raises for a link to itself
    if file.is_symlink() and not any(Path(real).is_relative_to(place) for place in allowed):
      raise InputError(f"{file} is a link to outside the model directory: copy what it points to, if you trust it")
    if not (os.path.isfile(real) or os.path.isdir(real)):
      raise InputError(f"{file} is neither a file nor a directory: remove it")


def tensor_files(directory: Path) -> dict[str, Path]:
  """{tensor name: safetensors file}, from one file or from the shards of an index.

  Pickles and paths outside the directory are refused. An index must name exactly the tensors of each shard, because
  transformers loads whole shards.
  """
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
    file_of = {tensor: directory / name for tensor, name in names.items()}
    for file in sorted(set(file_of.values())):
      stored, indexed = set(tensor_names(file)), {tensor for tensor in file_of if file_of[tensor] == file}
      if missing := sorted(indexed - stored):
        raise InputError(f"{file} has no tensor {short(missing[0])} although the index says so")
      if extra := sorted(stored - indexed):
        raise InputError(f"{file} has tensors that the index does not place there, which transformers would load: "
                         f"{listed(extra)}")
    return file_of
  if not single.exists():
    pickles = sorted(f.name for f in directory.glob("*") if f.suffix in PICKLES)
    hint = f"; {_pickle_hint(pickles[0])}" if pickles else what_is_there(directory)
    raise InputError(f"no model.safetensors in {directory}{hint}")
  return dict.fromkeys(tensor_names(single), single)


def what_is_there(directory: Path) -> str:
  """For the message that a directory has no model: a hint at models in other places or formats; "" without any."""
  below = sorted(str(file.parent.relative_to(directory)) for pattern in ("*/config.json", "snapshots/*/config.json")
                 for file in directory.glob(pattern) if b'"model_type"' in _start(file))
  if below:
    return f"; but there is one in {listed(below)}: give the directory of one"
  others = sorted(file.name for file in directory.glob("*") if file.suffix in OTHERS
                  and file.name != "model.safetensors")
  gguf = " (a .gguf file is read if its own path is given)" if any(name.endswith(".gguf") for name in others) else ""
  return f"; {listed(others)} is not read{gguf}: save the model by transformers' save_pretrained(DIR)" if others else ""


def _pickle_hint(name):
  return (f"{name} is a pickle, which can run code, and is never read: convert it where you trust it, with "
          "transformers' model.save_pretrained(DIR)")


def tensor_names(file: Path) -> list[str]:
  with open_tensors(file) as f:
    return list(f.keys())


def open_tensors(file: Path) -> safetensors.safe_open:
  """The file's reader. A header of more than HEADER_BYTES is refused before it is parsed."""
  size = int.from_bytes(_start(file)[:8], "little")
  if HEADER_BYTES < size <= file.stat().st_size:
    raise InputError(f"{file} has a header of {size} bytes, at most {HEADER_BYTES} are read")
  try:
    return safetensors.safe_open(file, framework="np")
  except (safetensors.SafetensorError, OSError) as e:
    if _start(file).startswith(LFS):
      raise InputError(f"{file} is a pointer of Git LFS, not the weights: fetch them with git lfs pull") from None
    raise InputError(f"cannot read {file}: {str(e)[:300]!r}") from None  # repr, because e quotes the header


def _start(file):
  """The first 64 KiB of a file, enough for a config.json; b"" if it is no file."""
  if not file.is_file():
    return b""
  with file.open("rb") as f:
    return f.read(1 << 16)


def check_dtype(file: Path, name: str, dtype: str) -> None:
  """Raises InputError unless `dtype`, a tensor's dtype in the header, is in FLOATS."""
  if dtype not in FLOATS:
    hint = f": if the model is quantized, {DEQUANTIZE}" if re.fullmatch(r"([IU]|F[48]).*", dtype) else ""
    raise InputError(f"{file}: {short(name)} is {dtype}, wanted one of {', '.join(FLOATS)}{hint}")


def float_tensor(file: Path, name: str) -> np.ndarray:
  """A tensor of the file.

  Raises:
    InputError: it does not hold floats.
  """
  with open_tensors(file) as f:
    check_dtype(file, name, f.get_slice(name).get_dtype())
    return f.get_tensor(name)


def sha256(directory: str | Path, *patterns: str) -> dict[str, str]:
  """{file name: sha256} of the directory's files that match one of the patterns."""
  out = {}
  for file in sorted(file for pattern in patterns for file in Path(directory).glob(pattern)):
    with file.open("rb") as f:
      out[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
  return out
