"""Flax modules of the models, and the code that reads and writes Hugging Face's formats."""

from w2s_jax.models.hf.files import check_links, read_json, sha256
from w2s_jax.models.hf.load import load_pretrained
from w2s_jax.models.hf.places import base_of, resolve
from w2s_jax.models.hf.save import save_pretrained
from w2s_jax.models.layers import ClassifierOutput
from w2s_jax.models.model import Model, config_from_arch, config_from_hf

__all__ = ["ClassifierOutput", "Model", "base_of", "check_links", "config_from_arch", "config_from_hf",
           "load_pretrained", "read_json", "resolve", "save_pretrained", "sha256"]
