"""Makes the device mesh, finds the sharding of parameters from rules on their paths, and places batches on devices."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # both axes shard the rows of a batch
RUNS = "runs"                # name of the vmapped axis over runs that train together
Value = TypeVar("Value")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1,
              devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Mesh with axes `data`, `fsdp` and `tensor` of these sizes. One size may be -1, which means all remaining devices.

  Raises:
    InputError: the product of the sizes is not the number of devices, or the devices' wiring does not allow the mesh.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    rest = int(-np.prod(sizes))
    sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
  if min(sizes) < 1 or np.prod(sizes) != len(devices):
    raise InputError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} device(s): their "
                     "product must be the device count (one of them may be -1): set --config.mesh.data/.fsdp/.tensor")
  try:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  except NotImplementedError as e:  # jax cannot map these sizes to a TPU's torus
    raise InputError(f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} cannot be laid on this slice: each "
                     "size must be a product of the slice's own (of 4x4x4: 4, 16 or 64): set --config.mesh.*") from e


def match(path: str, rules: Iterable[tuple[str, Value]]) -> Value:
  """The value of the first rule whose pattern matches the whole path; ValueError if no rule matches."""
  for pattern, value in rules:
    if re.fullmatch(pattern, path):
      return value
  raise ValueError(f"parameter {path!r} matches no rule; add one (there is no catch-all on purpose)")


def param_shardings(params: dict, rules: Sequence[tuple[str, P]], mesh: jax.sharding.Mesh) -> dict:
  """NamedSharding of every leaf of a nested parameter dict, by the first rule that matches the leaf's path.

  Args:
    rules: (pattern, PartitionSpec) pairs, such as a model's `shardings`.
  Raises:
    InputError: a mesh axis does not divide the dimension that it shards. The message names the leaf and both numbers.
    ValueError: a leaf matches no rule.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict({path: leaf_sharding(path, leaf, rules, mesh) for path, leaf in flat.items()},
                                      sep="/")


def leaf_sharding(path: str, leaf: Any, rules: Sequence[tuple[str, P]], mesh: jax.sharding.Mesh) -> Any:
  """NamedSharding of one leaf. A quantized leaf gets one for each of its arrays, which all have the leaf's axes.

  Raises:
    InputError, ValueError: see `param_shardings`.
  """
  spec = match(path, rules)
  def place(array):
    axes_split = []
    for size, whole, axes in zip(array.shape, leaf.shape, spec):
      parts = int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))
      if size == 1 < whole:                             # one scale serves the whole axis, so it is not sharded
        axes = None
      elif size % parts:
        raise InputError(f"{path} {tuple(array.shape)}: dimension {size} is not divisible by mesh axis {axes}={parts}: "
                         "set --config.mesh.data/.fsdp/.tensor")
      axes_split.append(axes)
    return NamedSharding(mesh, P(*axes_split))
  return jax.tree.map(place, leaf)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, BATCH)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Number of shards of a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: jax.sharding.Mesh, knob: str) -> None:
  """Raises InputError unless the mesh's `data` x `fsdp` devices divide `batch_size` rows."""
  if batch_size % (shards := batch_shards(mesh)):
    raise InputError(f"batch of {batch_size} rows cannot be split over data x fsdp = {shards} devices: set {knob} to a "
                     "multiple of it, or --config.mesh.*")


def on(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
  """Context in which code is traced for this mesh. Within it `split_rows` has an effect."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_rows(x: jax.Array) -> jax.Array:
  """Shards the rows of x [R, ...] like a batch, and no other axis. Outside the context `on` x is unchanged.

  Without this constraint XLA shards the width of activations over `fsdp`, which also shards the kernels. Every device
  then computes all rows. If batches are large, XLA also all-reduces about 100 times the bytes of one layer's kernels.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty else jax.lax.with_sharding_constraint(x, BATCH)


def stacked(places: Any) -> Any:
  """The NamedShardings `places` for leaves with one more leading axis (runs or steps), which is not sharded."""
  return jax.tree.map(lambda place: NamedSharding(place.mesh, P(None, *place.spec)), places)


def global_batch(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh,
                 axes_in_front: int = 0) -> dict[str, jax.Array]:
  """Places host arrays on the mesh. `data` x `fsdp` shard the rows, and no other axis is sharded.

  Args:
    rows: {name: array [..., B, ...]}; every process has all B rows.
    axes_in_front: number of axes before B.
  """
  place = batch_sharding(mesh)
  for _ in range(axes_in_front):
    place = stacked(place)
  def put(values):  # each process copies only its devices' rows from the whole array
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])
  return {k: put(np.asarray(v)) for k, v in rows.items()}
