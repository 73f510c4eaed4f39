"""`Family`, the record that each model file defines, and `SharedConfig`, the base class of its config."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import flax.linen as nn
from jax.sharding import PartitionSpec

from w2s_jax.models.hf.fields import Fields
from w2s_jax.models.hf.formats import Checkpoint


class Family(NamedTuple):
  """Everything that the package knows about one architecture. models.model.FAMILIES lists the families.

  Attributes:
    config: a subclass of SharedConfig with the network's shape. Its from_hf(fields, **runtime) reads transformers'
      config.json, and its to_hf() returns one.
    module: (config, train) -> the module that Model.apply calls. Its lm_logits(config, params, hidden) returns the
      language-model logits of every token, or raises InputError. It runs its layers with `layers.layer_stack`. The
      names of its leaves match the rules in adapters/trees.py (which leaves train) and FLOAT32 in hf/load.py (which
      leaves stay float32).
    tensors: {model_type of config.json: how transformers writes it}.
    shardings: (parameter path pattern, mesh axes) of the family's own leaves. The first full match wins. There is no
      catch-all on purpose: a new parameter needs a rule. Model.shardings adds rules for adapters and soft tokens.
    vocabulary: path of the module that embeds the tokens (layers.Tokens).
  """
  config: type["SharedConfig"]
  module: type[nn.Module]
  tensors: dict[str, Checkpoint]
  shardings: Sequence[tuple[str, PartitionSpec]]
  vocabulary: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig:
  """The fields of every family's config besides the network's shape: the head, and how the network runs."""
  is_decoder: ClassVar[bool] = True   # a decoder pools a text's last real token, an encoder usually its first token
  initializer_range: float = 0.02
  head: str = "classifier"            # or "lm": logits of the next token (decoder), of the same token (encoder)
  num_labels: int = 2
  labels: tuple = ()                  # names of the classes; (): LABEL_0, LABEL_1, ...
  pad_token_id: int | None = None
  dtype: str = "float32"              # of the activations
  remat: str = "none"                 # a key of layers.REMAT_POLICIES, or "none"
  unroll: bool = False                # unroll the scan over layers: same results, longer compilation
  lora_dropout: float = 0.0           # on the adapter's input, while training
  layers: tuple[int, int] | None = None   # (first, end): run only layers first..end-1 (models/latent.py); None: all

  @property
  def feature_size(self) -> int:
    """Width of ClassifierOutput.features."""
    return self.hidden_size

  @property
  def layer_range(self) -> tuple[int, int]:
    """(first, end) of the layers that run."""
    return self.layers or (0, self.num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderShared(SharedConfig):
  """The field that every encoder's config adds, for the W2S teacher's head."""
  is_decoder: ClassVar[bool] = False
  feature_width: int = 0              # W2S head: Linear to this width, ReLU (features), classifier; 0: no W2S head

  @property
  def feature_size(self) -> int:
    return self.feature_width or self.hidden_size


def shared_from_hf(fields: Fields) -> dict:
  """The fields that every family reads from transformers' config.json."""
  return {"vocab_size": fields.integer("vocab_size"), "pad_token_id": fields.token("pad_token_id"),
          "initializer_range": fields.positive("initializer_range", 0.02)}


def decoder_from_hf(fields: Fields, tied: bool) -> dict:
  """The fields that every decoder reads, with those of `shared_from_hf`.

  tied: whether embeddings are tied if config.json does not say.
  """
  fields.only(is_causal=True)
  return shared_from_hf(fields) | {
      "tie_embeddings": fields.flag("tie_word_embeddings", tied), "bos_token_id": fields.token("bos_token_id"),
      "eos_token_id": fields.tokens("eos_token_id")}


def shared_to_hf(config: SharedConfig) -> dict:
  """The inverse of `shared_from_hf`."""
  return {name: getattr(config, name) for name in ("vocab_size", "initializer_range", "pad_token_id")}


def decoder_to_hf(config: SharedConfig) -> dict:
  """The inverse of `decoder_from_hf`."""
  return shared_to_hf(config) | {"tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_token_id,
                                 "eos_token_id": config.eos_token_id}
