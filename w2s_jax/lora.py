"""The LoRA functions for scripts outside this package."""

from collections.abc import Callable, Sequence

import jax

from w2s_jax import InputError
from w2s_jax.adapters import attach
from w2s_jax.adapters.attach import merge as merge_lora
from w2s_jax.models.hf.peft import ADAPTER_WARNING, export_adapter

__all__ = ["ADAPTER_WARNING", "add_lora", "export_adapter", "merge_lora"]


def add_lora(params: dict, rank: int, alpha: float, targets: Sequence[str] = ("q_proj", "v_proj"), *, key: jax.Array,
             places: Callable[[dict], dict] | None = None) -> dict:
  """A new tree with LoRA leaves beside the stacked kernels named in `targets` (adapters/lora.py).

  `lora_a` [L, in, R] is random and `lora_b` [L, R, out] is zero, so the network's outputs do not change. `lora_alpha`
  [L] holds alpha. All are float32. L layers, R rank.

  Args:
    alpha: numerator of the scale alpha / R of the update.
    targets: names of modules in the layers; ("all-linear",): every module with a kernel.
    key: random key of `lora_a`.
    places: function from the new leaves (abstract) to their NamedShardings, under which the leaves are created. None:
      the leaves are created on one device.
  Raises:
    InputError: a target that no layer has or that has an adapter of another kind, or a rank below 1.
  """
  known = attach.targets_of(params)
  if rank < 1 or tuple(targets) != ("all-linear",) and set(targets) - set(known):
    raise InputError(f"LoRA rank {rank}, targets {tuple(targets)}: rank must be at least 1 and targets among "
                     f"{', '.join(known)}, or all-linear alone: set --config.lora.rank, --config.lora.targets")
  return attach.add(params, "lora", targets, key=key, places=places, rank=rank, alpha=alpha)
