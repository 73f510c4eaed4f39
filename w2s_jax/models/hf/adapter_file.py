"""The file w2s_adapter.safetensors: adapters that cannot be merged, saved beside their model.

Tensors have our parameter paths as names. They are float32, with stacked layers. transformers ignores the file. It may
come from a stranger.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from w2s_jax import InputError
from w2s_jax.adapters import attach
from w2s_jax.models.hf import files
from w2s_jax.models.hf.fields import listed
from w2s_jax.models.model import Model

FILE = "w2s_adapter.safetensors"
NOTE = f"""WARNING: {FILE} belongs to this model. It has an adapter that cannot be merged. transformers ignores the file
and loads the model without the adapter. That model was not measured. w2s_jax's `load_pretrained` reads the file, too.
"""


def paths_to_save(model: Model, leaves: Mapping[str, jax.Array | np.ndarray]) -> list[str]:
  """Paths of the leaves that belong in the file.

  Args:
    leaves: {path: array} of the whole tree.
  Raises:
    ValueError: a leaf of the model is missing, a leaf belongs neither to the model nor to the file, or `find` would
      refuse the file.
  """
  names = model.weight_names()
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  absent = sorted(names.keys() - leaves.keys())
  wanted = {} if absent else attach.unmergeable(shapes, {path: shapes[path] for path in names}, _vocabulary(model))
  if misfits := sorted({*absent, *(leaves.keys() - names.keys()) ^ wanted.keys()}):
    raise ValueError(f"params do not fit the model (merge adapters first): {misfits}")
  if wrong := attach.misfits(shapes, wanted):
    raise ValueError(f"adapters do not fit the model: {wrong}")
  if types := [f"{path} {leaves[path].dtype}" for path in sorted(wanted) if leaves[path].dtype != "float32"]:
    raise ValueError(f"adapters are saved as float32, not as {types}")
  return sorted(wanted)


def find(directory: Path, model: Model, base: Mapping[str, tuple[int, ...]],
         total_layers: int) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the file's leaves, with only the layers that the model keeps; {} if there is no file.

  Args:
    base: {path: shape} of the model's own leaves.
    total_layers: number of layers in the checkpoint; the model may keep fewer.
  Raises:
    InputError: a leaf that no adapter of this model has, a missing leaf, a wrong shape, or a dtype other than float32.
  """
  file = directory / FILE
  if not file.exists():
    return {}
  with files.open_tensors(file) as f:
    slices = {name: f.get_slice(name) for name in f.keys()}
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    types = [f"{name} {slices[name].get_dtype()}" for name in sorted(slices) if slices[name].get_dtype() != "F32"]
  wanted = attach.unmergeable(shapes, base, _vocabulary(model), total_layers)
  found = {"unexpected": sorted(shapes.keys() - wanted.keys()), "missing": sorted(wanted.keys() - shapes.keys()),
           "wrong shape": attach.misfits(shapes, wanted), "not F32": types}
  if any(found.values()):
    raise InputError(f"{file} does not fit the model: " + "; ".join(
        f"{problem} {listed(names)}" for problem, names in found.items()) + ": delete it if the model is to go without")
  return {path: (model.config.num_layers, *shape[1:]) if path.startswith("layers/") else shape
          for path, shape in shapes.items()}


def read(directory: Path, path: str, index: tuple[slice, ...], out: np.ndarray) -> None:
  """Fills `out` with the part `index` of a leaf."""
  with files.open_tensors(directory / FILE) as f:
    out[...] = f.get_slice(path)[index]


def _vocabulary(model):
  return "/".join(model.vocabulary)

