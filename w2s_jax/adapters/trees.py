"""Labels of the leaves of a parameter tree: a leaf's label decides whether it trains, decays and is saved."""

import re
from collections.abc import Sequence

from flax import traverse_util
from jax.sharding import PartitionSpec as P

from w2s_jax import adapters, sharding

VOCABULARY = "(embed_tokens|embeddings/word_embeddings)"
# (path pattern, label) of the model's own leaves and of those beside its vocabulary. There is no catch-all, so that an
# unknown leaf fails.
MODEL_RULES = (
    (rf"{VOCABULARY}/soft", "soft"),                     # an adversary's soft tokens or a prompt (soft.py)
    (rf"{VOCABULARY}/p_tuning_[a-z_]+", "adapter"),      # leaves that make virtual tokens (p_tuning.py)
    (rf"{VOCABULARY}/virtual", "constant"),              # virtual tokens after training
    (r"(score|pooler|widen|classifier)/((dense|norm)/)?(kernel|scale|bias)", "head"),
    (r"(.*/)?(embed_tokens|lm_head|[a-z_]+_embeddings)/embedding", "embedding"),
    (r"(.*/)?([a-z_]*_)?norm/(scale|bias)", "vector"),
    (r"(layers/.*|lm_head|lm_head/dense|embeddings_project)/bias", "vector"),
    (r"(layers/.*|lm_head/dense|embeddings_project)/kernel", "matrix"),
)
LORA = ("adapter", "head")                                    # labels that train in every LoRA defense
FULL = ("embedding", "vector", "matrix", "head")              # labels that train in full fine-tuning


def label_rules() -> tuple[tuple[str, str], ...]:
  """((pattern, label), ...) for all leaves, first those of adapters; the first full match wins."""
  leaves = [(name, label) for kind in adapters.KINDS.values() for name, (label, _) in kind.leaves.items()]
  return (*((rf".*/{name}", label) for name, label in leaves), *MODEL_RULES)


def added_shardings() -> tuple[tuple[str, P], ...]:
  """((pattern, mesh axes), ...) for adapters, soft and virtual tokens; every model family shards them in the same way.

  The mesh axis `fsdp` shards the axes "in" and "out" of an adapter leaf, even if other mesh axes shard the kernel.
  """
  specs = {name: P(*("fsdp" if axis in ("in", "out") else None for axis in axes))
           for kind in adapters.KINDS.values() for name, (_, axes) in kind.leaves.items()}
  return (*((rf"layers/.*/{name}", spec) for name, spec in specs.items()), (r".*/(soft|virtual|p_tuning_[a-z_]+)", P()))


def label(path: str) -> str:
  """The label of the leaf at `path`, such as "layers/attn/q_proj/kernel".

  Raises:
    ValueError: the leaf matches no rule.
  """
  return sharding.match(path, label_rules())


def label_tree(params: dict) -> dict:
  """A tree like `params` with each leaf's label.

  Raises:
    ValueError: a leaf matches no rule.
  """
  rules = label_rules()
  return traverse_util.path_aware_map(lambda path, _: sharding.match("/".join(path), rules), params)


def beside_vocabulary(params: dict) -> tuple[str, dict]:
  """(path of the module that embeds the tokens, {leaf name: leaf}); ("", {}) if the tree lacks it."""
  flat = traverse_util.flatten_dict(params, sep="/")
  module = next((path.rsplit("/", 1)[0] for path in flat if re.fullmatch(f"{VOCABULARY}/embedding", path)), "")
  return module, {path.removeprefix(f"{module}/"): leaf for path, leaf in flat.items() if path.startswith(f"{module}/")}


def split(params: dict, labels: Sequence[str]) -> tuple[dict, dict]:
  """(trainable, frozen): the leaves whose label is in `labels`, and the other leaves."""
  flat = traverse_util.flatten_dict(params)
  flat_labels = traverse_util.flatten_dict(label_tree(params))
  chosen = {path: leaf for path, leaf in flat.items() if flat_labels[path] in labels}
  rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return traverse_util.unflatten_dict(chosen), traverse_util.unflatten_dict(rest)


def combine(trainable: dict, frozen: dict) -> dict:
  """The inverse of `split`."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trainable))
