"""What a model file ends with, a Family, and what its config begins with, a SharedConfig."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import flax.linen as nn
from jax.sharding import PartitionSpec

from w2s_jax.models.hf.fields import Fields
from w2s_jax.models.hf.formats import Checkpoint


class Family(NamedTuple):
  """One architecture, all that the house knows of it: a file, and a line of models.model.FAMILIES.

  Attributes:
    config: a SharedConfig with the network's shape; its from_hf(fields, **runtime) and to_hf() are transformers'
      config.json.
    module: (config, train) -> a module that is called as Model.apply calls it. Its lm_logits(config, params, hidden)
      gives the language-model logits of every token, or raises InputError. Its layers are a `layers.layer_stack`.
      Leaves have the names that the rules in adapters/trees.py (what trains) and FLOAT32 in hf/load.py know.
    tensors: {model_type of config.json: how transformers writes it}.
    shardings: (parameter path pattern, mesh axes) of the family's own leaves. The first full match wins; there is no
      catch-all on purpose: a new parameter must be given its place. Adapters' and soft tokens' are in Model.shardings.
    vocabulary: path of the module that embeds the tokens (layers.Tokens).
  """
  config: type["SharedConfig"]
  module: type[nn.Module]
  tensors: dict[str, Checkpoint]
  shardings: Sequence[tuple[str, PartitionSpec]]
  vocabulary: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedConfig:
  """What the config of every family has beside the network's shape: its head, and how we run it."""
  is_decoder: ClassVar[bool] = True   # pools a text's last token but padding; False, an encoder: the row's first
  initializer_range: float = 0.02
  head: str = "classifier"            # or "lm": logits of the next token (decoders), of the token in a place (encoders)
  num_labels: int = 2
  labels: tuple = ()                  # names of the classes; (): LABEL_0...
  pad_token_id: int | None = None
  dtype: str = "float32"              # of the activations
  remat: str = "none"                 # layers.REMAT_POLICIES or "none"
  unroll: bool = False                # unroll the layer scan: same numbers, longer compile
  lora_dropout: float = 0.0           # on the adapter's input, while training
  layers: tuple[int, int] | None = None   # run layers first..end-1 alone, as models/latent.py does; None: all

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
  """What the config of every encoder has beside that: it can carry the W2S teacher's head."""
  is_decoder: ClassVar[bool] = False
  feature_width: int = 0              # > 0: the W2S head, Linear(D -> feature_width) -> ReLU = features -> classifier

  @property
  def feature_size(self) -> int:
    return self.feature_width or self.hidden_size


def shared_from_hf(fields: Fields) -> dict:
  """Fields of any config, from transformers' config.json."""
  return {"vocab_size": fields.integer("vocab_size"), "pad_token_id": fields.token("pad_token_id"),
          "initializer_range": fields.positive("initializer_range", 0.02)}


def decoder_from_hf(fields: Fields, tied: bool) -> dict:
  """As `shared_from_hf`, of a decoder; `tied`: whether its embeddings are where config.json does not say."""
  fields.only(is_causal=True)
  return shared_from_hf(fields) | {
      "tie_embeddings": fields.flag("tie_word_embeddings", tied), "bos_token_id": fields.token("bos_token_id"),
      "eos_token_id": fields.tokens("eos_token_id")}


def shared_to_hf(config: SharedConfig) -> dict:
  """transformers' names of what `shared_from_hf` reads."""
  return {name: getattr(config, name) for name in ("vocab_size", "initializer_range", "pad_token_id")}


def decoder_to_hf(config: SharedConfig) -> dict:
  """transformers' names of what `decoder_from_hf` reads."""
  return shared_to_hf(config) | {"tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_token_id,
                                 "eos_token_id": config.eos_token_id}
