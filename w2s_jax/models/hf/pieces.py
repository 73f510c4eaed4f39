"""Reads (through memory maps) and writes the tensors of safetensors files in small pieces, transposed if needed.

safetensors checks a file's header. Its functions for the values are not used, because they would hold whole tensors in
memory beside the arrays.
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

HOST = "cpu"                       # platform whose devices share memory with numpy, without copies
PIECE_BYTES = 4 << 20              # bytes that each thread reads, or transposes and writes, at a time
TILE = 256                         # rows and columns that are transposed at a time
PADDING = 64                       # bytes between a tile's rows in its buffer: one line of the processor's caches
THREADS = min(16, os.cpu_count() or 1)
Run = Callable[[Callable, Iterable], None]


class Stored(NamedTuple):
  """A tensor in a safetensors file.

  Attributes:
    dtype: its name in the header: "F32", "BF16", ...
    begin: offset of its first byte in the file.
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
    described = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}
  with file.open("rb") as f:
    start = 8 + int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(start - 8), object_pairs_hook=functools.partial(_once, file))
  return {name: Stored(file, name, shape, dtype, start + header[name]["data_offsets"][0])
          for name, (shape, dtype) in described.items()}


def _once(file, pairs):
  """A dict of the pairs. Refuses a name that occurs twice: another parser may take its other value."""
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    raise InputError(f"cannot read {file}: its header has {short(next(n for n in names if names.count(n) > 1))} twice")
  return values


def mapped(tensor: Stored, rows: slice) -> np.ndarray:
  """Rows of a float tensor in the memory-mapped file. Its pages count as used memory while the array exists."""
  dtype = np.dtype(files.FLOATS[tensor.dtype])
  row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
  begin = tensor.begin + rows.start * row_bytes
  page = begin - begin % mmap.ALLOCATIONGRANULARITY
  length = begin - page + (rows.stop - rows.start) * row_bytes
  with tensor.file.open("rb") as f:
    pages = mmap.mmap(f.fileno(), length, access=mmap.ACCESS_READ, offset=page)
  return np.ndarray((rows.stop - rows.start, *tensor.shape[1:]), dtype, pages, begin - page)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array of zeros in memory pages of its own. On the CPU `jax.device_put` uses them without a copy.

  Memory from np.empty lacks the alignment that XLA needs. It is also in huge pages, which may be slow to get in a
  virtual machine.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape)


def copy(values: np.ndarray, out: np.ndarray, transposed: bool) -> None:
  """Copies `values`, or its transpose, into `out`.

  Each tile passes through a small buffer. numpy's own transposition walks through all of the memory once per column.
  Values at a distance of a power of two evict each other from the processor's caches, so the buffer's rows are padded.
  Smaller tiles are slower in several threads, which then wait for Python's lock most of the time.
  """
  if values.dtype == out.dtype:  # as integers, because numpy copies ml_dtypes' bfloat16 slowly and holds the GIL
    bits = f"uint{8 * out.itemsize}"
    values, out = values.view(bits), out.view(bits)
  if not transposed:
    out[...] = values
    return
  buffer = np.empty((TILE, TILE + PADDING // out.itemsize), out.dtype)
  for i in range(0, out.shape[0], TILE):
    for j in range(0, out.shape[1], TILE):
      part = values[j:j + TILE, i:i + TILE]
      tile = buffer[:part.shape[0], :part.shape[1]]
      tile[...] = part
      out[i:i + TILE, j:j + TILE] = tile.T


@contextlib.contextmanager
def threads() -> Iterator[Run]:
  """Yields run(do, items), which calls do(item) for each item in several threads and raises their exceptions."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    yield lambda do, items: list(pool.map(do, items))


def create(file: Path, tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Stored]:
  """Creates a safetensors file with its header alone; returns {name: Stored}, the places that `write` fills.

  Source: https://github.com/huggingface/safetensors, "Format". Larger dtypes come first, so that all are aligned.

  Raises:
    ValueError: a dtype that is not in files.FLOATS.
  """
  names = {jnp.dtype(dtype): name for name, dtype in files.FLOATS.items()}
  if wrong := [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in names]:
    raise ValueError(f"tensors are saved in {', '.join(map(str, names))}, not {wrong}")
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
    begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  file.write_bytes(len(text).to_bytes(8, "little") + text)
  return {name: Stored(file, name, tensor.shape, header[name]["dtype"],
                       8 + len(text) + header[name]["data_offsets"][0]) for name, tensor in tensors.items()}


def write(tensor: Stored, values: np.ndarray, transposed: bool, run: Run) -> None:
  """Writes a tensor to its place in a file made by `create`.

  Args:
    values: array of the tensor's shape; if `transposed`, [in, out] for a tensor [out, in].
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
