"""Model: a network's config with functions on the network's parameters, which are a plain nested dict."""

import dataclasses
import functools
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, sharding
from w2s_jax.adapters import p_tuning, soft, trees
from w2s_jax.models import deberta, encoder, gemma, gpt2, layers, llama, modernbert
from w2s_jax.models.family import Family, SharedConfig
from w2s_jax.models.hf import formats
from w2s_jax.models.hf.fields import Fields, short

FAMILIES = {
    "llama": llama.FAMILY,
    "gemma": gemma.FAMILY,
    "gpt2": gpt2.FAMILY,
    "encoder": encoder.FAMILY,
    "deberta": deberta.FAMILY,
    "modernbert": modernbert.FAMILY,
}
_EXPERTS = ("which is no Llama: its layers have experts, attention in chunks and other rotary pairs, which are not "
            "implemented: give a dense model, such as a Llama 3 or a Qwen3")
NO_FAMILY = {"gemma3": f"which reads images too: {gemma.TEXT_ALONE}", "llama4": _EXPERTS, "llama4_text": _EXPERTS}
DTYPES = ("float32", "bfloat16", "float16")


def model_types() -> dict[str, Family]:
  """{model_type of config.json: Family}, for all families."""
  return {model_type: family for family in FAMILIES.values() for model_type in family.tensors}


def config_from_hf(hf: dict, **runtime: Any) -> SharedConfig:
  """The config of the family that a config.json names. `runtime` sets fields that config.json does not have.

  Raises:
    InputError: an unknown `model_type`; a field that is missing, is out of range, or asks for an unimplemented feature;
      a `runtime` value that is not allowed for this family.
  """
  fields = Fields(hf)
  families = model_types()
  named = fields.values.get("model_type")
  if isinstance(named, str) and named in NO_FAMILY:
    raise InputError(f"the model's config.json is that of a {named}, {NO_FAMILY[named]}")
  model_type = fields.string("model_type", None, families)
  config_class = families[model_type].config
  if "auto_map" in fields:
    raise InputError("the model's config.json has auto_map, code of its own, which is never run: if it is a plain "
                     f"{model_type}, delete auto_map from config.json and tokenizer_config.json")
  heads = r"\w+(ForSequenceClassification|ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|Model)"
  named = fields.values.get("architectures") or []
  for name in named if isinstance(named, list) else [named]:
    if not isinstance(name, str) or not re.fullmatch(heads, name):
      raise InputError(f"the model's config.json names the architecture {short(name)}: want a sequence classifier "
                       "(...ForSequenceClassification), or a backbone without a head")
  fields.only(problem_type="single_label_classification")
  if "transformers_weights" in fields:
    raise InputError("the model's config.json has transformers_weights, so transformers loads another file than "
                     "model.safetensors: call the right file model.safetensors, and delete the field")
  if runtime.get("feature_width") and not hasattr(config_class, "feature_width"):
    raise InputError(f"a {model_type} cannot carry the W2S teacher's head: give an encoder as --config.teacher.path")
  if runtime.get("head", "classifier") not in ("classifier", "lm"):
    raise InputError(f"head {runtime['head']!r}: want 'classifier' or 'lm'")
  num_labels = fields.integer("num_labels", 2, 2, 10_000)
  config = config_class.from_hf(fields, num_labels=num_labels, labels=fields.labels(num_labels), **runtime)
  if config.hidden_size % config.num_heads and not (hasattr(config, "head_dim") and "head_dim" in fields):
    raise InputError(f"{config.num_heads} attention heads must divide hidden_size {config.hidden_size}: see the "
                     "model's config.json")
  if config.dtype not in DTYPES or config.remat not in ("none", *layers.REMAT_POLICIES):
    raise InputError(f"dtype {config.dtype!r}, remat {config.remat!r}: want dtype among {', '.join(DTYPES)} and remat "
                     f"among none, {', '.join(layers.REMAT_POLICIES)}: set --config.student.dtype, .remat")
  return config


def config_from_arch(arch: dict, knob: str, **runtime: Any) -> SharedConfig:
  """Like `config_from_hf`, for a new network. An error names the flag `knob` instead of a config.json."""
  try:
    return config_from_hf(arch, **runtime)
  except InputError as e:
    problem = str(e)              # raised below, outside `except`, because command.run prints the innermost error
  raise InputError(problem.replace("the model's config.json", knob))


def _is_a_layer(module, method):
  """A filter for capture_intermediates: whether this is the call of a layer that layers.layer_stack scans."""
  return (module.name, method) == ("layers", "__call__")


@dataclasses.dataclass(frozen=True)
class Model:
  """A network's config with functions on its parameters.

  `params` is a nested dict of arrays in all methods. It may contain adapters (adapters/); they then take effect.
  """
  config: SharedConfig

  @property
  def family(self) -> Family:
    """The Family of this model's type."""
    return model_types()[self.config.model_type]

  @property
  def checkpoint(self) -> formats.Checkpoint:
    """How transformers writes this model."""
    return self.family.tensors[self.config.model_type]

  @property
  def shardings(self) -> tuple[tuple[str, P], ...]:
    """(parameter path pattern, mesh axes) of every leaf that the model may have, for sharding.py."""
    return (*self.family.shardings, *trees.added_shardings())

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Path of the module that embeds the tokens (layers.Tokens)."""
    return self.family.vocabulary

  def apply(self, params: dict, input_ids: jax.Array, attention_mask: jax.Array | None = None,
            texts: jax.Array | None = None, *, segment_ids: jax.Array | None = None,
            dropout_key: jax.Array | None = None, stream: jax.Array | None = None,
            states: bool = False) -> layers.ClassifierOutput:
    """Runs the model on a batch. `attention_mask` or `segment_ids` marks the padding.

    Args:
      params: the parameters from `init` or `load_pretrained`.
      input_ids: [R, T] int; without `texts` a row is a text.
      attention_mask: [R, T] int, 0 on padding, 1 on the row's text.
      segment_ids: [R, T] int, for rows that may hold several texts: 0 on padding, elsewhere the number of the token's
        text. These numbers ascend along a row.
      texts: [G, B / G, 2] int, for G groups of R / G rows and B / G texts (data/packing.py). It has the indices of each
        text's first and last token among the R / G * T tokens of its group. None: a row is a text.
      dropout_key: a JAX key turns dropout on; without one the output is deterministic.
      stream: [R, T, D], input of the first layer instead of the embeddings of `input_ids`; None: the embeddings.
      states: whether to return the output of every layer, too (ClassifierOutput.states).
    Raises:
      ValueError: neither `attention_mask` nor `segment_ids` is given, or both are.
      InputError: outside jit, a token is not in the vocabulary, or a text is longer than the learned positions
        (inside jit the logits of such a text are NaN). Or `params` have virtual tokens, and `stream` is given.
    """
    if (attention_mask is None) == (segment_ids is None):
      raise ValueError("give Model.apply either attention_mask, for one text per row, or segment_ids")
    if segment_ids is None:
      segment_ids = attention_mask
    leaves = trees.beside_vocabulary(params)[1]
    virtual = p_tuning.tokens_of(leaves)
    if stream is None and not any(isinstance(x, jax.core.Tracer) for x in (input_ids, segment_ids)):
      self._check_tokens(params, np.asarray(input_ids), np.asarray(segment_ids), texts,
                         0 if virtual is None else len(virtual))
    if virtual is None:
      return self._run(params, input_ids, segment_ids, texts, stream, dropout_key, states)
    if stream is not None:
      raise InputError("a model with virtual tokens (p_tuning) cannot start from given hidden states: set "
                       "--config.lora.kind to another kind, or choose other defenses (--config.defenses)")
    return self._run_behind(virtual, params, input_ids, segment_ids, texts, dropout_key, states)

  def _run_behind(self, virtual, params, input_ids, segment_ids, texts, dropout_key, states):
    """The output on the texts with virtual tokens [S, E] in front, whose ids come after the ids of soft tokens."""
    leaves, config = trees.beside_vocabulary(params)[1], self.config
    virtual = virtual / getattr(config, "embedding_scale", 1.0)
    table = jnp.concatenate([leaves[soft.LEAF], virtual]) if soft.LEAF in leaves else virtual
    first_id = config.vocab_size + len(table) - len(virtual)
    ids, segments = p_tuning.in_front(len(virtual), first_id, input_ids, segment_ids, texts, config.pad_token_id or 0)
    if config.is_decoder:                             # a decoder would skip padding tokens at a text's end
      config = dataclasses.replace(config, pad_token_id=None)
    out = Model(config)._run(soft.put(self, params, table), ids, segments, None, None, dropout_key, states)
    def behind(hidden):
      return p_tuning.behind(len(virtual), hidden, input_ids.shape, texts)
    return out.replace(hidden=behind(out.hidden), stream=behind(out.stream),
                       states=jax.vmap(behind)(out.states) if states else None)

  def _run(self, params, input_ids, segment_ids, texts, stream, dropout_key, states):
    module = self.family.module(self.config, train=dropout_key is not None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    run = functools.partial(module.apply, {"params": params}, input_ids, segment_ids, texts, stream, rngs=rngs)
    if not states:
      return run()
    out, captured = run(capture_intermediates=_is_a_layer, mutable="intermediates")
    (of_layers, _), = captured["intermediates"]["layers"]["__call__"]
    return out.replace(states=of_layers)

  def _check_tokens(self, params, input_ids, segment_ids, texts, virtual):
    leaves = traverse_util.flatten_dict(params)
    soft_tokens = leaves.get((*self.vocabulary, soft.LEAF), ())
    num_ids = self.config.vocab_size + len(soft_tokens)
    if input_ids.size and not 0 <= input_ids.min() <= input_ids.max() < num_ids:    # padding too: its NaN would spread
      raise InputError(f"token ids are {input_ids.min()} to {input_ids.max()}, the model knows 0 to {num_ids - 1}: use "
                       "its own tokenizer")
    if not any("position_embeddings" in path for path in leaves):
      return
    padding_counts = not self.config.is_decoder and self.config.model_type not in encoder.ROBERTAS
    if texts is not None:
      longest = np.max(texts[..., 1] - texts[..., 0]) + 1
    else:
      longest = input_ids.shape[1] if padding_counts else (segment_ids > 0).sum(axis=1).max()
    room = self.config.max_positions - virtual
    if longest > room:
      raise InputError(f"a text has {longest} tokens, the model {room} positions: cut it (truncation=True, "
                       f"max_length={room})")

  def lm_logits(self, params: dict, hidden: jax.Array) -> jax.Array:
    """Language-model logits [R, T, V] of every token, from `ClassifierOutput.hidden` [R, T, D].

    A decoder predicts the next token. An encoder with head="lm" predicts the token at the same position.

    Raises:
      InputError: the model has no language-model head.
    """
    return self.family.module.lm_logits(self.config, params, hidden)

  def weight_names(self) -> dict[str, str]:
    """{our parameter path: transformers' tensor name} of every leaf; {} in a name stands for the layer number."""
    return formats.weight_names(self, traverse_util.flatten_dict(self.abstract_params(), sep="/"))

  def abstract_params(self) -> dict:
    """The parameter tree as ShapeDtypeStructs; allocates nothing."""
    return jax.eval_shape(self._init, jax.random.key(0))

  def init(self, key: jax.Array, mesh: jax.sharding.Mesh | None = None, only: Collection[str] | None = None) -> dict:
    """Random parameters.

    Args:
      mesh: devices on which the parameters are created, sharded from the start; None: the default device.
      only: paths ("score/kernel") of the leaves to create; the others take no memory. None: all.
    """
    def make(key):
      flat = traverse_util.flatten_dict(self._init(key), sep="/")
      return traverse_util.unflatten_dict({p: x for p, x in flat.items() if only is None or p in only}, sep="/")
    places = None
    if mesh is not None:
      places = sharding.param_shardings(jax.eval_shape(make, key), self.shardings, mesh)
    return jax.jit(make, out_shardings=places)(key)

  def _init(self, key):
    ids = jax.numpy.ones((1, 2), jax.numpy.int32)
    return self.family.module(self.config).init(key, ids, ids)["params"]
