"""Tensors of safetensors files, a piece at a time, compared with numpy and with the safetensors library."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from w2s_jax.models.hf import pieces

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
SHAPES = {"wide": (3, 700), "tall": (700, 3), "tiles": (256, 384), "edges": (257, 131), "vector": (19,)}


def values(shape, dtype, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def small_pieces(monkeypatch):
  """The largest tensor has some tens of pieces."""
  monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
  monkeypatch.setattr(pieces, "TILE", 16)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("shape", [(3, 700), (257, 131), (128, 256)])
def test_a_copy_is_numpys(shape, source, target):
  """Bit for bit, whatever the dtypes, also between parts of larger arrays."""
  whole = values((shape[0] + 1, shape[1] + 2), source)
  part = whole[1:, 2:]
  for transposed in (False, True):
    out = np.zeros((900, 900), target)
    want = (part.T if transposed else part).astype(target)
    place = out[5:5 + want.shape[0], 7:7 + want.shape[1]]
    pieces.copy(part, place, transposed)
    assert place.tobytes() == want.tobytes() and not out[:5].any() and not out[:, :7].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_written_file_is_what_safetensors_writes(dtype, small_pieces, tmp_path):
  """Several threads write the tensors one by one, from transposed kernels."""
  tensors = {name: values(shape, dtype) for name, shape in SHAPES.items()} | {"norm": values((5,), np.float32)}
  described = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in tensors.items()}
  places = pieces.create(tmp_path / "ours", described)
  with pieces.threads() as run:
    for name, one in tensors.items():
      transposed = one.ndim == 2
      pieces.write(places[name], np.ascontiguousarray(one.T) if transposed else one, transposed, run)
  safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
  got, want = (safetensors.numpy.load_file(tmp_path / file) for file in ("ours", "theirs"))
  assert got.keys() == want.keys()
  for name, one in want.items():
    assert got[name].dtype == one.dtype and got[name].tobytes() == one.tobytes(), name
  with safetensors.safe_open(tmp_path / "ours", "np") as f:
    assert f.metadata() == {"format": "pt"}
  assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
  assert pieces.stored(tmp_path / "ours") == places


@pytest.mark.parametrize("dtype", DTYPES)
def test_mapped_rows_are_safetensors_slices(dtype, tmp_path):
  """Rows may have an odd length, and need not begin at a page of memory."""
  tensors = {name: values(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
  safetensors.numpy.save_file(tensors, tmp_path / "file")
  stored = pieces.stored(tmp_path / "file")
  for name, one in tensors.items():
    for rows in (slice(0, len(one)), slice(1, 2), slice(len(one) // 2, len(one))):
      assert pieces.mapped(stored[name], rows).tobytes() == one[rows].tobytes(), (name, rows)


def test_what_a_thread_raises_is_raised(tmp_path):
  """Otherwise a full disk would leave a file that is too short, without an error."""
  place = pieces.create(tmp_path / "file", {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32)})["a"]
  (tmp_path / "file").unlink()
  with pytest.raises(FileNotFoundError), pieces.threads() as run:
    pieces.write(place, np.zeros((4, 4), np.float32), True, run)


def test_dtypes_that_are_not_read_are_not_written(tmp_path):
  with pytest.raises(ValueError, match=r"saved in float32, float16, bfloat16, not \['a float64'\]"):
    pieces.create(tmp_path / "file", {"a": jax.ShapeDtypeStruct((4, 4), np.dtype("float64"))})
