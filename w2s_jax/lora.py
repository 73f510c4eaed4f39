"""LoRA as outside scripts call it."""

from w2s_jax.adapters.lora import add_lora, export_adapter, merge_lora

__all__ = ["add_lora", "export_adapter", "merge_lora"]
