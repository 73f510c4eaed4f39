"""What was converted once: directories of safetensors beside the hub's cache, by the content they were made from."""

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
VERSION = 2                                     # of what gguf.py and adapted.py make of a file


def directory_of(source: Path, files: list[Path], build: Callable[[Path], None]) -> Path:
  """The directory below $HF_HOME that build(directory) filled, now or before, from files of this content.

  Args:
    source: what is converted, for messages.
  Raises:
    InputError: it cannot be written.
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
    if not done.is_dir():                       # else another process was first
      raise InputError(f"cannot write {done} ({e.strerror}): free some disk, or set HF_HOME elsewhere") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
  return done


@functools.lru_cache(maxsize=1000)
def _digest(file, size, modified):
  """sha256 of a file, once per process and state of the file."""
  with file.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
