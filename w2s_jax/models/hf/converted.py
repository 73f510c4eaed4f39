"""A cache of converted models: directories of safetensors below $HF_HOME, named by the content of their sources."""

import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from w2s_jax import InputError

LOG = logging.getLogger(__name__)
VERSION = 2                                     # of the conversions; if it changes, all files are converted again


def directory_of(source: Path, files: list[Path], build: Callable[[Path], None]) -> Path:
  """The cached directory for files of this content. If it does not exist yet, `build` fills it.

  Args:
    source: the file or directory that is converted, for messages.
    files: all files that the result depends on.
    build: writes the result into the directory that it gets.
  Raises:
    InputError: a file cannot be read, or the directory cannot be written.
  """
  try:
    contents = [_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  except OSError as e:
    raise InputError(f"cannot read {e.filename} ({e.strerror})") from None
  digest = hashlib.sha256(repr((VERSION, contents)).encode())
  done = Path(huggingface_hub.constants.HF_HOME) / "w2s_jax" / digest.hexdigest()[:32]
  if done.is_dir():
    return done
  LOG.info(f"{source}: converting to safetensors in {done}, once")
  try:
    done.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=done.parent))
  except OSError as e:
    raise InputError(f"cannot write to {done.parent} ({e.strerror}): set HF_HOME to a directory that can be "
                     "written") from None
  try:
    build(part)
    os.replace(part, done)
  except OSError as e:
    if not done.is_dir():                       # otherwise another process was first
      raise InputError(f"cannot write {done} ({e.strerror}): free some disk, or set HF_HOME elsewhere") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
  return done


@functools.lru_cache(maxsize=1000)
def _digest(file, size, modified):
  """sha256 of a file. A process computes it once unless the file's size or time of modification changes."""
  with file.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
