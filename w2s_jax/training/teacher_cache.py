"""The frozen teacher's logits and features of the clean rows: computed once, kept in files, memory-mapped."""

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
  """{"logits" [N, C], "features" [N, D]} float32: read-only maps of files, whatever N is.

  Args:
    cache: directory that runs share; made where it is not there. Where it cannot be written the arrays are in memory.
    teacher: the teacher's model directory: its weights, config and tokenizer are part of the key.
    texts: [N]; so are these, in their order,
    dtype: and the teacher's dtype,
    max_length: and the tokens at which texts are cut.
    compute: called where nothing has this key; fills the arrays that the function it is given makes, (name, shape) ->
      array.
  Raises:
    InputError: what lies under the key was made from something else, or has been changed since.
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
  """Where the files are made, inside the cache; None where nothing can be written there."""
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
    with open(f"{part}/{name}.npy", "r+b") as f:     # a full disk is an error here, and a dead process at a map's page
      os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return array
  try:
    compute(on_disk)
    _finish(part, directory, key)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _finish(part, directory, key):
  """The files appear whole or not at all; where another run was faster, its files are as good."""
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
    made = json.loads((directory / "key.json").read_text())
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in NAMES}
    fits = made == {"key": key, "files": sha256(directory, "*.npy")} and all(len(a) == rows for a in arrays.values())
  except (OSError, ValueError, KeyError) as e:
    raise _foreign(directory, e) from None
  if not fits:
    raise _foreign(directory, "made from another teacher or other texts, or changed since")
  return arrays


def _foreign(directory, why):
  return InputError(f"{directory} does not hold this teacher's outputs ({why}): delete it, they are computed again")
