"""Adds adapters of any kind to a parameter tree, merges them, and finds leaves to save beside the model. L layers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax import InputError, adapters, processes, quantized
from w2s_jax.adapters import p_tuning, soft, trees

LARGEST = 1 << 16            # largest size of an adapter's own axis in a file; real adapters are smaller


def targets_of(params: dict) -> list[str]:
  """The names allowed in `targets`, sorted: the names of all modules with a kernel inside the layers."""
  return sorted({path.split("/")[-2] for path in _kernels(traverse_util.flatten_dict(params, sep="/"))})


def add(params: dict, kind: str, targets: Sequence[str], *, key: jax.Array,
        places: Callable[[dict], dict] | None = None, **settings: Any) -> dict:
  """A new tree with leaves of this kind beside the stacked kernels named in `targets`.

  Args:
    kind: a key of KINDS.
    targets: names of modules in the layers; ("all-linear",): every module with a kernel.
    key: random key; each kernel's leaves get a key folded from it.
    places: new leaves (abstract) -> their NamedShardings; each leaf is created under its sharding. None: on one device.
    **settings: keyword arguments of the kind's `add`.
  Raises:
    InputError: an unknown kind, a target that no layer has, or one that has an adapter of another kind.
  """
  if kind not in adapters.KINDS:
    raise InputError(f"adapter {kind!r}: want one of {', '.join(adapters.KINDS)}")
  flat = traverse_util.flatten_dict(params, sep="/")
  known = targets_of(params)
  if tuple(targets) == ("all-linear",):
    targets = known
  if unknown := sorted(set(targets) - set(known)):
    raise InputError(f"adapter {kind}: no layer has {', '.join(unknown)}: want targets among {', '.join(known)}, or "
                     "all-linear alone: set --config.lora.targets")
  chosen = [path for target in targets for path in _kernels(flat) if path.split("/")[-2] == target]
  beside = _beside_kernels(flat)
  for path in chosen:
    if (other := adapters.kind_of(beside[_module(path)])) not in (None, kind):
      raise InputError(f"{_module(path)} has an adapter of kind {other}, no {kind} can be added: merge it first")
  kernels = {path: flat[path] for path in chosen}
  def create(key, kernels):
    new = {}
    for i, path in enumerate(chosen):                         # the index, in the order of `targets`, selects the key
      leaves = adapters.KINDS[kind].add(kernels[path], jax.random.fold_in(key, i), **settings)
      new |= {f"{_module(path)}/{name}": leaf for name, leaf in leaves.items()}
    return traverse_util.unflatten_dict(new, sep="/")
  return trees.combine(_created(create, places, key, kernels), params)


def _created(create, places, *args):
  shardings = None if places is None else places(jax.eval_shape(create, *args))
  return jax.jit(create, out_shardings=shardings)(*args)


def add_virtual_tokens(params: dict, tokens: int, hidden: int, *, key: jax.Array,
                       places: Callable[[dict], dict] | None = None) -> dict:
  """A new tree with the vectors and the MLP that make virtual tokens (p_tuning.py), beside the vocabulary's embeddings.

  Args:
    tokens: number of virtual tokens.
    hidden: width of the MLP.
    key, places: see `add`.
  Raises:
    InputError: the tree has virtual tokens already.
  """
  module, leaves = trees.beside_vocabulary(params)
  if p_tuning.tokens_of(leaves) is not None:
    raise InputError("the model has virtual tokens already, which new ones would replace: set --config.lora.kind to "
                     "another kind")
  def create(key):
    new = p_tuning.new(key, tokens, leaves["embedding"].shape[1], hidden)
    return traverse_util.unflatten_dict({f"{module}/{name}": leaf for name, leaf in new.items()}, sep="/")
  return trees.combine(_created(create, places, key), params)


def add_configured(params: dict, section: Any, *, key: jax.Array,
                   places: Callable[[dict], dict] | None = None) -> dict:
  """Calls `add`, or `add_virtual_tokens`, with the settings of `section`, the section `lora` of a config."""
  if section.kind == p_tuning.KIND:
    return add_virtual_tokens(params, section.virtual_tokens, section.encoder_width, key=key, places=places)
  settings = {name: section[name] for name in adapters.KINDS[section.kind].settings}
  return add(params, section.kind, tuple(section.targets), key=key, places=places, **settings)


def has_virtual_tokens(params: dict) -> bool:
  """Whether the model has virtual tokens that `merge` made."""
  return p_tuning.LEAF in trees.beside_vocabulary(params)[1]


def has_adapters(params: dict) -> bool:
  """Whether there is an adapter beside a kernel, or an MLP that makes virtual tokens."""
  if p_tuning.VECTORS in trees.beside_vocabulary(params)[1]:
    return True
  return any(adapters.kind_of(names) for names in _beside_kernels(traverse_util.flatten_dict(params, sep="/")).values())


def merge(params: dict) -> dict:
  """A new tree in which every adapter that can be merged is merged into its kernel, which keeps its dtype.

  A merged kernel is computed in float32 and rounded once. Kernels of a quantized base become plain arrays on the host,
  because together they may exceed the device's memory. Soft tokens, adapters of a kind without `merge`, and virtual
  tokens stay. The MLP that made the virtual tokens does not.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  out = dict(flat)
  vocabulary, leaves = trees.beside_vocabulary(params)
  if p_tuning.VECTORS in leaves:
    out = {path: leaf for path, leaf in flat.items() if not path.startswith(f"{vocabulary}/{p_tuning.KIND}_")}
    out[f"{vocabulary}/{p_tuning.LEAF}"] = jax.jit(p_tuning.tokens_of)(leaves)
  for module, names in _beside_kernels(flat).items():
    path = f"{module}/kernel"
    kernel, kind = flat[path], adapters.KINDS.get(adapters.kind_of(names))
    if kind is not None and kind.merge is not None:
      leaves = {name: out.pop(f"{module}/{name}") for name in kind.leaves}
      out[path] = _merge(kind.merge, kernel, leaves)
    elif quantized.is_quantized(kernel):
      out[path] = jax.jit(quantized.dequantize)(kernel)
    if quantized.is_quantized(kernel):
      out[path] = processes.fetch(out[path])
  return traverse_util.unflatten_dict(out, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def _merge(merge, kernel, leaves):
  def layer(stacked):
    kernel, leaves = stacked
    return merge(quantized.dequantize(kernel.astype(jnp.float32)), leaves).astype(kernel.dtype)
  return jax.lax.map(layer, (kernel, leaves))


def unmergeable(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]], vocabulary: str,
                layers: int | None = None) -> dict[str, tuple[int | str, ...]]:
  """The axes that each unmergeable adapter leaf of a tree must have.

  Args:
    shapes: {path: shape} of the tree's leaves, or of the leaves that a file adds to the base.
    base: {path: shape} of the model's own leaves.
    vocabulary: path of the module that embeds the tokens; soft tokens are a leaf of it.
    layers: L of the tree if the base has fewer layers; None: the base's L.
  Returns:
    {path: axes}: an axis is an int if the base determines its size, and a name if the adapter does.
  """
  wanted: dict[str, tuple[int | str, ...]] = {}
  for leaf in {f"{vocabulary}/{name}" for name in (soft.LEAF, p_tuning.LEAF)} & shapes.keys():
    wanted[leaf] = ("tokens", base[f"{vocabulary}/embedding"][-1])
  for path in _kernels(base):
    sizes = dict(zip(("layers", "in", "out"), (layers or base[path][0], *base[path][1:])))
    names = {name for kind in adapters.KINDS.values() for name in kind.leaves if f"{_module(path)}/{name}" in shapes}
    kind = adapters.KINDS.get(adapters.kind_of(names))
    if kind is not None and kind.merge is None:
      wanted |= {f"{_module(path)}/{name}": tuple(sizes.get(axis, axis) for axis in axes)
                 for name, (_, axes) in kind.leaves.items()}
  return wanted


def misfits(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int | str, ...]]) -> list[str]:
  """Messages about the shapes that do not fit the axes from `unmergeable`.

  A named axis must have the same size, from 1 to LARGEST, in all leaves of a module.
  """
  out, sizes = [], {}
  for path in sorted(shapes.keys() & wanted.keys()):
    shape, axes = shapes[path], wanted[path]
    fits = len(shape) == len(axes)
    for size, axis in zip(shape, axes):
      own = isinstance(axis, str)
      fits &= size == (sizes.setdefault((_module(path), axis), size) if own else axis)
      fits &= not own or 1 <= size <= LARGEST
    if not fits:
      text = ", ".join(f"{axis} in 1..{LARGEST}" if isinstance(axis, str) else str(axis) for axis in axes)
      out.append(f"{path} {shape}, wanted ({text})")
  return out


def _kernels(paths):
  return [path for path in sorted(paths) if path.startswith("layers/") and path.endswith("/kernel")]


def _module(path):
  return path.rsplit("/", 1)[0]


def _beside_kernels(flat):
  """{module: names of its leaves} of all modules with a kernel, including the heads."""
  out = {_module(path): set() for path in flat if path.endswith("/kernel")}
  for path in flat:
    if _module(path) in out:
      out[_module(path)].add(path.rsplit("/", 1)[-1])
  return out
