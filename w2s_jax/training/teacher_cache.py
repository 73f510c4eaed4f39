"""Caches the frozen teacher's logits and features of the clean rows in files, which are read memory-mapped."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from w2s_jax import InputError, processes
from w2s_jax.models import sha256

LOG = logging.getLogger(__name__)

NAMES = ("logits", "features")


def outputs(cache: Path, teacher: Path, texts: list[str], dtype: str, max_length: int,
            compute: Callable[[Callable[[str, tuple[int, ...]], np.ndarray]], None]) -> dict[str, np.ndarray]:
  """{"logits" [N, C], "features" [N, D]} float32, memory-mapped and read-only.

  The key of the cached files is a hash of the teacher's files, the texts in their order, `dtype` and `max_length`.

  Args:
    cache: directory that runs share; created if it does not exist. If it cannot be written, the arrays stay in memory.
    teacher: the teacher's model directory, with its weights, config and tokenizer.
    texts: [N] strings.
    dtype: dtype of the teacher.
    max_length: length to which texts are truncated, in tokens.
    compute: called if no files have this key. It gets a function `empty`, (name, shape) -> array, and writes the
      outputs to the arrays that `empty` returns.
  Raises:
    InputError: the files of this key were made from other inputs, or have been changed since.
  """
  key = {"texts": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
         "teacher": sha256(teacher, "*.safetensors", "*.json"), "dtype": dtype, "max_length": max_length}
  directory = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  if not processes.first_says(directory.exists()):
    part = _new_folder(cache) if processes.writes() else None
    kept = processes.first_says(part is not None)
    if part:
      _fill(part, directory, key, compute)
    else:
      arrays = {}
      compute(lambda name, shape: arrays.setdefault(name, np.empty(shape, np.float32)))
    processes.wait(f"computed {directory}")
    if not kept:
      return arrays
  return _open(directory, key, len(texts))


def _new_folder(cache):
  """Creates a temporary directory for the new files inside the cache; None if the cache cannot be written."""
  try:
    cache.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="part-", dir=cache)
  except OSError as e:
    LOG.warning(f"{cache} cannot be written ({e.strerror}): the teacher's outputs stay in memory, and the next run "
                "computes them again")
    return None


def _fill(part, directory, key, compute):
  def on_disk(name, shape):
    array = np.lib.format.open_memmap(f"{part}/{name}.npy", "w+", np.float32, shape)
    with open(f"{part}/{name}.npy", "r+b") as f:     # a full disk raises here; a write to the map would kill us
      os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return array
  try:
    compute(on_disk)
    _finish(part, directory, key)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _finish(part, directory, key):
  """Renames the complete directory to its final name. If another run was faster, its equal files stay."""
  files = sha256(part, "*.npy")
  with open(f"{part}/key.json", "w") as f:
    json.dump({"key": key, "files": files}, f)
  try:
    os.rename(part, directory)
  except OSError:
    if not directory.exists():
      raise


def _open(directory, key, rows):
  try:
    recorded = json.loads((directory / "key.json").read_text())
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in NAMES}
    same_files = recorded == {"key": key, "files": sha256(directory, "*.npy")}
    fits = same_files and all(len(a) == rows for a in arrays.values())
  except (OSError, EOFError, ValueError, KeyError) as e:
    raise _foreign(directory, e) from None
  if not fits:
    raise _foreign(directory, "made from another teacher or other texts, or changed since")
  return arrays


def _foreign(directory, why):
  return InputError(f"{directory} does not hold this teacher's outputs ({why}): delete it, they are computed again")
