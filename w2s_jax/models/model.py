"""Model: a network's shape and the functions on its parameters, which are a plain nested dict."""

import dataclasses

import jax
from flax import traverse_util

from w2s_jax import InputError, sharding
from w2s_jax.models import bert, layers, llama

MODULES = {"llama": llama, "bert": bert}          # family -> module with WEIGHT_MAP etc.
CLASSIFIERS = {"llama": llama.LlamaClassifier, "bert": bert.BertClassifier}
DTYPES = ("float32", "bfloat16", "float16")
CONFIGS = dict.fromkeys(llama.ARCHITECTURES, llama.LlamaConfig) | {"bert": bert.BertConfig}


def config_from_hf(hf, **runtime):
  """LlamaConfig or BertConfig from a config.json dict; `runtime` sets fields that file does not have.

  Raises:
    InputError: unknown `model_type`, or a missing field.
  """
  model_type = hf.get("model_type")
  if model_type not in CONFIGS:
    raise InputError(f"model_type {model_type!r} is not supported (want one of {', '.join(CONFIGS)})")
  if runtime.get("feature_width") and not hasattr(CONFIGS[model_type], "feature_width"):
    raise InputError(f"model_type {model_type!r} cannot carry the W2S teacher's head: give an encoder as "
                     "--config.teacher.path")
  try:
    config = CONFIGS[model_type].from_hf(hf, **runtime)
  except KeyError as e:
    raise InputError(f"the model's config.json ({model_type}) has no field {e}") from None
  uneven = config.hidden_size % config.num_heads and not hf.get("head_dim")
  if uneven or config.num_heads % getattr(config, "num_kv_heads", 1):
    raise InputError(f"{config.num_heads} attention heads must divide hidden_size {config.hidden_size} and be divided "
                     "by num_key_value_heads: see the model's config.json, --config.student.arch or .teacher.arch")
  if config.dtype not in DTYPES or config.remat not in ("none", *layers.REMAT_POLICIES):
    raise InputError(f"dtype {config.dtype!r}, remat {config.remat!r}: want dtype among {', '.join(DTYPES)} and remat "
                     f"among none, {', '.join(layers.REMAT_POLICIES)}: set --config.student.dtype, .remat")
  return config


@dataclasses.dataclass(frozen=True)
class Model:
  """`params` everywhere is a nested dict of arrays; adapters that lie in it are used, see lora.py."""
  config: llama.LlamaConfig | bert.BertConfig

  def apply(self, params, input_ids, attention_mask, *, dropout_key=None):
    """Classifies a batch.

    Args:
      params: nested dict as `init` or `load_pretrained` gives it.
      input_ids: [B, T] int.
      attention_mask: [B, T] int, 1 on real tokens; every row needs at least one.
      dropout_key: a JAX key turns dropout on; without one the output is deterministic.
    Returns:
      ClassifierOutput.
    """
    module = CLASSIFIERS[self.config.family](self.config, train=dropout_key is not None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return module.apply({"params": params}, input_ids, attention_mask, rngs=rngs)

  def lm_logits(self, params, hidden):
    """Next-token logits [B, T, V] float32 from `ClassifierOutput.hidden`, by the tied embedding."""
    if not getattr(self.config, "tie_embeddings", False):
      raise InputError("the language-model warm-up needs a decoder with tied embeddings: set "
                       "--config.student.arch.tie_word_embeddings=True or --config.warmup.epochs=0")
    return hidden @ params["embed_tokens"]["embedding"].T.astype(hidden.dtype)

  def abstract_params(self):
    """The parameter tree as ShapeDtypeStructs; allocates nothing."""
    return jax.eval_shape(self._init, jax.random.key(0))

  def init(self, key, mesh=None, only=None):
    """Random parameters, created on the mesh's devices already sharded where a mesh is given.

    Args:
      only: paths ("score/kernel") of the leaves to make; the others take no memory. None: all.
    """
    def make(key):
      flat = traverse_util.flatten_dict(self._init(key), sep="/")
      return traverse_util.unflatten_dict({p: x for p, x in flat.items() if only is None or p in only}, sep="/")
    places = None
    if mesh is not None:
      places = sharding.param_shardings(jax.eval_shape(make, key), self.config.family, mesh)
    return jax.jit(make, out_shardings=places)(key)

  def _init(self, key):
    ids = jax.numpy.ones((1, 2), jax.numpy.int32)
    return CLASSIFIERS[self.config.family](self.config).init(key, ids, ids)["params"]
