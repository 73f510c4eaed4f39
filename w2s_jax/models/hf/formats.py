"""How transformers writes a model type: the record of its tensors' names, which each family's file has."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:              # models.model imports this file
  from w2s_jax.models.model import Model


class Checkpoint(NamedTuple):
  """How transformers writes one model type.

  Attributes:
    name: of its classes: NAME + "ForSequenceClassification", "ForCausalLM", "Model".
    prefix: of the backbone's tensors inside those; a file saved from the backbone class alone lacks it.
    weights: {our parameter path: tensor name}, in which {} is the layer number.
    unused: pattern of tensors that nobody reads here (other heads, buffers of transformers 4).
    transposed: layers' kernels are [out, in] in the file (torch.nn.Linear); False for GPT-2's Conv1D.
    language_model: what follows the name of its class with a language-model head.
    classifier: what follows the name of its class with a classifier's head.
    absent: pattern of tensors that no file has, of a leaf that only some layers read; its rows of the others are 1.
  """
  name: str
  prefix: str
  weights: dict
  unused: str
  transposed: bool = True
  language_model: str = "ForCausalLM"
  classifier: str = "ForSequenceClassification"
  absent: str = ""


HEAD = r"(score|pooler|widen|classifier)/.*"   # our paths that a checkpoint may lack: initialised afresh, which is said


def modules(pairs: Iterable[tuple[str, str]], kernel: str = "kernel", both: bool = True) -> dict[str, str]:
  """{path: tensor name} of (our module, their module) pairs: kernel (or scale) and bias."""
  return {f"{ours}/{leaf}": f"{theirs}.{tensor}" for ours, theirs in pairs
          for leaf, tensor in ((kernel, "weight"), ("bias", "bias"))[:2 if both else 1]}


ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"        # peft's names
HEAD_FILE, HEAD_CONFIG = "w2s_head.safetensors", "w2s_head.json"               # the W2S teacher's, beside its backbone
W2S_HEAD = modules((("widen", "w2s.widen"), ("classifier", "classifier")))


def names_by_layer(model: "Model", name: str) -> dict[int | None, str]:
  """{layer: tensor} in the file of a name with {} for the layer's number; {None: name} of one without."""
  if "{}" not in name:
    return {None: name}
  every = {layer: name.format(layer) for layer in range(model.config.num_layers)}
  return {layer: tensor for layer, tensor in every.items() if not re.fullmatch(model.checkpoint.absent, tensor)}


def full_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
  """{name in the file: name in the whole model}; a file saved from the backbone class alone lacks the prefix."""
  names = list(names)
  bare = not any(name.startswith(checkpoint.prefix) for name in names)
  return {name: f"{checkpoint.prefix}{name}" if bare else name for name in names}


def weight_names(model: "Model", paths: Iterable[str]) -> dict[str, str]:
  """{path: tensor name} of these parameter paths."""
  table = model.checkpoint.weights | (W2S_HEAD if getattr(model.config, "feature_width", 0) else {})
  return {path: table[path] for path in paths}


def is_transposed(model: "Model", path: str) -> bool:
  """Whether the file has this leaf with its last two axes swapped."""
  return path.endswith("kernel") and (model.checkpoint.transposed or not path.startswith("layers/"))
