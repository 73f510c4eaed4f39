"""Tensors of safetensors files a piece at a time: mapped to be read, transposed on the way, written where they belong.

safetensors checks a file's header; its reader and writer of values would each hold whole tensors beside the arrays.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax import InputError
from w2s_jax.models.hf import files
from w2s_jax.models.hf.fields import short

HOST = "cpu"                       # the platform whose devices share memory with numpy: no copy either way
PIECE_BYTES = 4 << 20              # read, or transposed and written, at a time by each thread
TILE = 128                         # rows and columns that are transposed at a time
THREADS = min(16, os.cpu_count() or 1)
Run = Callable[[Callable, Iterable], None]


class Stored(NamedTuple):
  """A tensor in a safetensors file.

  Attributes:
    dtype: as the header has it: "F32", "BF16", ...
    begin: where its bytes begin in the file.
  """
  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  begin: int


def stored(file: Path) -> dict[str, Stored]:
  """{name: Stored} of a file.

  Raises:
    InputError: it is no safetensors file, or its header has a name twice.
  """
  with files.open_tensors(file) as f:
    slices = {name: f.get_slice(name) for name in f.keys()}
    described = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
  with file.open("rb") as f:
    start = 8 + int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(start - 8), object_pairs_hook=functools.partial(_once, file))
  return {name: Stored(file, name, shape, dtype, start + header[name]["data_offsets"][0])
          for name, (shape, dtype) in described.items()}


def _once(file, pairs):
  """A dict of the pairs: another parser may take the other one of two that have the same name."""
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    raise InputError(f"cannot read {file}: its header has {short(next(n for n in names if names.count(n) > 1))} twice")
  return values


def mapped(tensor: Stored, rows: slice) -> np.ndarray:
  """Rows of a tensor of floats, in the mapped file: its pages count as memory for as long as the array is held."""
  dtype = np.dtype(files.FLOATS[tensor.dtype])
  row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
  begin = tensor.begin + rows.start * row_bytes
  page = begin - begin % mmap.ALLOCATIONGRANULARITY
  length = begin - page + (rows.stop - rows.start) * row_bytes
  with tensor.file.open("rb") as f:
    pages = mmap.mmap(f.fileno(), length, access=mmap.ACCESS_READ, offset=page)
  return np.ndarray((rows.stop - rows.start, *tensor.shape[1:]), dtype, pages, begin - page)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array of zeros in pages of its own, which `jax.device_put` takes over on the CPU without a copy.

  Memory of np.empty begins where XLA does not want it, and is of huge pages, which a virtual machine may get slowly.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def copy(values: np.ndarray, out: np.ndarray, transposed: bool) -> None:
  """out[...] = values, or values.T.

  Each tile passes through a small buffer: numpy's own transposing walks through all of the memory once for each
  column, and columns whose distance is a power of two push each other out of the processor's caches.
  """
  if values.dtype == out.dtype:  # as integers: numpy is slow with dtypes that are not its own, and keeps Python's lock
    bits = f"uint{8 * out.itemsize}"
    values, out = values.view(bits), out.view(bits)
  if not transposed:
    out[...] = values
    return
  buffer = np.empty((TILE, TILE), out.dtype)
  for i in range(0, out.shape[0], TILE):
    for j in range(0, out.shape[1], TILE):
      part = values[j:j + TILE, i:i + TILE]
      tile = buffer[:part.shape[0], :part.shape[1]]
      tile[...] = part
      out[i:i + TILE, j:j + TILE] = tile.T


@contextlib.contextmanager
def threads() -> Iterator[Run]:
  """Gives run(do, items), which calls do(item) of each item in several threads, and raises what one of them raises."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    yield lambda do, items: list(pool.map(do, items))


def create(file: Path, tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Stored]:
  """A new safetensors file, its header alone; where each tensor's bytes belong, for `write`.

  Source: https://github.com/huggingface/safetensors, "Format"; larger dtypes lie in front, so that all are aligned.

  Raises:
    ValueError: a dtype that `stored` tensors are not read in.
  """
  names = {jnp.dtype(dtype): name for name, dtype in files.FLOATS.items()}
  if wrong := [f"{name} {one.dtype}" for name, one in tensors.items() if one.dtype not in names]:
    raise ValueError(f"tensors are saved in {', '.join(map(str, names))}, not {wrong}")
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, one in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
    begin, end = end, end + math.prod(one.shape) * one.dtype.itemsize
    header[name] = {"dtype": names[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  file.write_bytes(len(text).to_bytes(8, "little") + text)
  return {name: Stored(file, name, one.shape, header[name]["dtype"], 8 + len(text) + header[name]["data_offsets"][0])
          for name, one in tensors.items()}


def write(tensor: Stored, values: np.ndarray, transposed: bool, run: Run) -> None:
  """Writes a tensor to its place in a file made by `create`.

  Args:
    values: of the tensor's shape, or [in, out] of a tensor [out, in] where `transposed`.
  """
  row_bytes = math.prod(tensor.shape[1:]) * values.itemsize
  count = max(1, PIECE_BYTES // row_bytes // TILE) * TILE
  def put(start):
    rows = slice(start, min(start + count, tensor.shape[0]))
    if transposed:
      piece = np.empty((rows.stop - rows.start, *tensor.shape[1:]), values.dtype)
      copy(values[:, rows], piece, True)
    else:
      piece = np.ascontiguousarray(values[rows])
    with tensor.file.open("r+b") as f:
      f.seek(tensor.begin + start * row_bytes)
      f.write(piece.view(np.uint8))
  run(put, range(0, tensor.shape[0], count))
