"""Flax modules and everything that knows Hugging Face's formats."""

from w2s_jax.models.files import check_links, read_json, resolve, sha256
from w2s_jax.models.layers import ClassifierOutput
from w2s_jax.models.load import load_pretrained
from w2s_jax.models.model import Model, config_from_hf
from w2s_jax.models.save import save_pretrained

__all__ = ["ClassifierOutput", "Model", "check_links", "config_from_hf", "load_pretrained", "read_json", "resolve",
           "save_pretrained", "sha256"]
