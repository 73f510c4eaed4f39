"""`Checkpoint`, the record of how transformers writes a model type, and functions on tensor names."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:              # models.model imports this file
  from w2s_jax.models.model import Model


class Checkpoint(NamedTuple):
  """How transformers writes one model type.

  Attributes:
    name: NAME in the classes NAME + "ForSequenceClassification", NAME + "ForCausalLM" and NAME + "Model".
    prefix: prefix of the backbone's tensors in models with a head. A file saved from the backbone class lacks it.
    weights: {our parameter path: tensor name}; {} in a name stands for the layer number.
    unused: pattern of tensors that are ignored unless the model has them (other heads, buffers of transformers 4).
    transposed: whether the file has the layers' kernels as [out, in] (torch.nn.Linear); False for GPT-2's Conv1D.
    language_model: suffix of the class with a language-model head.
    classifier: suffix of the class with a classifier.
    absent: pattern of tensors that no file has, because their layer does not use the leaf. The leaf is 1 there.
  """
  name: str
  prefix: str
  weights: dict
  unused: str
  transposed: bool = True
  language_model: str = "ForCausalLM"
  classifier: str = "ForSequenceClassification"
  absent: str = ""


HEAD = r"(score|pooler|widen|classifier)/.*"   # our paths; `load_pretrained` initialises those that a file lacks


def modules(pairs: Iterable[tuple[str, str]], kernel: str = "kernel", both: bool = True) -> dict[str, str]:
  """{our parameter path: tensor name} for (our module, transformers' module) pairs.

  Args:
    kernel: our name of transformers' leaf "weight".
    both: whether to include the bias.
  """
  return {f"{ours}/{leaf}": f"{theirs}.{tensor}" for ours, theirs in pairs
          for leaf, tensor in ((kernel, "weight"), ("bias", "bias"))[:2 if both else 1]}


ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"        # peft's file names
HEAD_FILE, HEAD_CONFIG = "w2s_head.safetensors", "w2s_head.json"               # the W2S teacher's head
W2S_HEAD = modules((("widen", "w2s.widen"), ("classifier", "classifier")))


def names_by_layer(model: "Model", name: str) -> dict[int | None, str]:
  """{layer: tensor name}, from a name with {} for the layer number. A name without {} gives {None: name}.

  Layers whose tensor no file has (Checkpoint.absent) are left out.
  """
  if "{}" not in name:
    return {None: name}
  tensors = {layer: name.format(layer) for layer in range(model.config.num_layers)}
  return {layer: tensor for layer, tensor in tensors.items() if not re.fullmatch(model.checkpoint.absent, tensor)}


def full_names(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
  """{name in the file: name in a model with a head}. A file saved from the backbone class lacks the prefix."""
  names = list(names)
  lacks_prefix = not any(name.startswith(checkpoint.prefix) for name in names)
  return {name: f"{checkpoint.prefix}{name}" if lacks_prefix else name for name in names}


def weight_names(model: "Model", paths: Iterable[str]) -> dict[str, str]:
  """{path: tensor name} of these parameter paths."""
  table = model.checkpoint.weights | (W2S_HEAD if getattr(model.config, "feature_width", 0) else {})
  return {path: table[path] for path in paths}


def is_transposed(model: "Model", path: str) -> bool:
  """Whether the file has this leaf with its last two axes swapped."""
  return path.endswith("kernel") and (model.checkpoint.transposed or not path.startswith("layers/"))
