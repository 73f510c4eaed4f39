"""Adapters. Each kind has its own file, and `KINDS` maps names to kinds.

An adapter is data, not code: its leaves lie beside the kernel that they adapt. `models.layers.Dense` looks up in KINDS
what the leaves beside its kernel do. `trees` labels the leaves, `attach` adds and merges adapters, and `models.hf.peft`
exports them.

Virtual tokens (p_tuning.py) lie beside no kernel, so they are not in KINDS. `attach` and `Model.apply` handle them.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from w2s_jax.adapters import dora, fourierft, lora


class Adapter(NamedTuple):
  """One kind of adapter. L layers; a stacked kernel is [L, in, out], and Dense sees one layer of it.

  Attributes:
    leaves: {leaf name: (label, axes)}. A leaf with the label "adapter" trains. A leaf with the label "constant" only
      gets saved with the adapter. The first axis is "layers". Every other axis is the kernel's "in" or "out", or one
      that the kind names itself. Axes of one name have the same size in all leaves beside a kernel.
    add: (stacked kernel, key, **settings) -> {leaf name: array}.
    apply: (leaves of one layer, kernel, x, y) -> new y [..., out]. x [..., in] is the layer's input after the adapter's
      dropout. y is the input without dropout times the kernel, before the bias. kernel [in, out] may be quantized.
    merge: (kernel [in, out] float32, leaves of one layer) -> a kernel with the same effect as kernel and leaves. None:
      no such kernel exists, and `save_pretrained` writes the leaves beside the model.
    export: (leaves on the host, dropout) -> ({peft's tensor name below the module: [L, ...]}, {field of
      adapter_config.json: value}); None: peft has no such kind.
    settings: names of the fields of config.lora that are the keyword arguments of `add`.
  """
  leaves: dict[str, tuple[str, tuple[str, ...]]]
  add: Callable[..., dict[str, Any]]
  apply: Callable
  merge: Callable | None = None
  export: Callable | None = None
  settings: tuple[str, ...] = ()


KINDS = {
    "lora": Adapter(lora.LEAVES, lora.add, lora.apply, lora.merge, lora.export, ("rank", "alpha")),
    "dora": Adapter(dora.LEAVES, dora.add, dora.apply, dora.merge, dora.export, ("rank", "alpha")),
    "fourierft": Adapter(fourierft.LEAVES, fourierft.add, fourierft.apply, fourierft.merge, fourierft.export,
                         ("frequencies", "scaling")),
}


def kind_of(leaf_names: Iterable[str]) -> str | None:
  """The kind (a key of KINDS) of the adapter among the leaves beside one kernel; None if there is no adapter."""
  for name, kind in KINDS.items():
    if not kind.leaves.keys().isdisjoint(leaf_names):
      return name
  return None
