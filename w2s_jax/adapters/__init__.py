"""Adapters: one file per kind, which holds its algebra; a dict names them. And which leaves of a tree train.

An adapter is data, not code: its leaves lie beside the kernel they adapt. `models.layers.Dense` asks KINDS what the
leaves beside its kernel do, labels come from `leaves`, `attach` adds and merges, `models.hf.peft` exports.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from w2s_jax.adapters import lora


class Adapter(NamedTuple):
  """One kind. L layers; a kernel is [L, in, out], Dense sees one layer of it.

  Attributes:
    leaves: {leaf name: (label, axes)}. Label: "adapter" trains, "constant" travels along. Axes: "layers" first, then
      the kernel's "in" and "out" or names of the kind's own; a name has one size in all leaves beside a kernel.
    add: (stacked kernel, key, **settings) -> {leaf name: float32 array}.
    apply: (leaves of one layer, kernel, x, y) -> new y [..., out]: x [..., in] after the adapter's dropout, y = x W
      before the bias and without dropout; kernel [in, out], which may be quantized.
    merge: (kernel [in, out] float32, leaves of one layer) -> the kernel that does the same without them; None where
      there is none, and then `save_pretrained` writes the leaves beside the model.
    export: (leaves on the host, dropout) -> ({peft's tensor name below the module: [L, ...]}, {field of
      adapter_config.json: value}); None where peft has no such kind.
  """
  leaves: dict[str, tuple[str, tuple[str, ...]]]
  add: Callable[..., dict[str, Any]]
  apply: Callable
  merge: Callable | None = None
  export: Callable | None = None


KINDS = {
    "lora": Adapter(lora.LEAVES, lora.add, lora.apply, lora.merge, lora.export),
}


def kind_of(leaf_names: Iterable[str]) -> str | None:
  """The kind (a key of KINDS) that has leaves among these, which lie beside one kernel; None where there is none."""
  for name, kind in KINDS.items():
    if not kind.leaves.keys().isdisjoint(leaf_names):
      return name
  return None
