"""Model: a network's shape and the functions on its parameters, which are a plain nested dict."""

import dataclasses

import jax
from flax import traverse_util

from w2s_jax import InputError, sharding
from w2s_jax.models import encoder, gpt2, layers, llama
from w2s_jax.models.hf import formats
from w2s_jax.models.hf.fields import Fields

FAMILIES = {
    "llama": (llama.LlamaConfig, llama.LlamaClassifier),
    "gpt2": (gpt2.GPT2Config, gpt2.GPT2Classifier),
    "encoder": (encoder.EncoderConfig, encoder.EncoderClassifier),
}
MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gpt2": "gpt2",
               "bert": "encoder", "roberta": "encoder", "distilbert": "encoder"}
DTYPES = ("float32", "bfloat16", "float16")


def config_from_hf(hf, **runtime):
  """LlamaConfig, GPT2Config or EncoderConfig from a config.json dict; `runtime` sets what that file does not have.

  Raises:
    InputError: unknown `model_type`; a field that is missing, out of range, or asks for what is not implemented.
  """
  fields = Fields(hf)
  model_type = fields.string("model_type", None, MODEL_TYPES)
  config_class = FAMILIES[MODEL_TYPES[model_type]][0]
  if "auto_map" in fields:
    raise InputError("the model's config.json has auto_map, code of its own, which is never run: if it is a plain "
                     f"{model_type}, delete auto_map from config.json and tokenizer_config.json")
  if runtime.get("feature_width") and not hasattr(config_class, "feature_width"):
    raise InputError(f"a {model_type} cannot carry the W2S teacher's head: give an encoder as --config.teacher.path")
  if runtime.get("head", "classifier") not in ("classifier", "lm"):
    raise InputError(f"head {runtime['head']!r}: want 'classifier' or 'lm'")
  num_labels = fields.integer("num_labels", 2, 2, 10_000)
  config = config_class.from_hf(fields, num_labels=num_labels, labels=fields.labels(num_labels), **runtime)
  if config.hidden_size % config.num_heads and not (hasattr(config, "head_dim") and "head_dim" in fields):
    raise InputError(f"{config.num_heads} attention heads must divide hidden_size {config.hidden_size}: see the "
                     "model's config.json, --config.student.arch or .teacher.arch")
  if config.dtype not in DTYPES or config.remat not in ("none", *layers.REMAT_POLICIES):
    raise InputError(f"dtype {config.dtype!r}, remat {config.remat!r}: want dtype among {', '.join(DTYPES)} and remat "
                     f"among none, {', '.join(layers.REMAT_POLICIES)}: set --config.student.dtype, .remat")
  return config


@dataclasses.dataclass(frozen=True)
class Model:
  """`params` everywhere is a nested dict of arrays; adapters that lie in it are used, see lora.py."""
  config: llama.LlamaConfig | gpt2.GPT2Config | encoder.EncoderConfig

  def apply(self, params, input_ids, attention_mask, texts=None, *, dropout_key=None, stream=None):
    """Classifies a batch.

    Args:
      params: nested dict as `init` or `load_pretrained` gives it.
      input_ids: [R, T] int; without `texts` a row is a text.
      attention_mask: [R, T] int, 0 on padding, 1 on a text; the texts of a row have ascending numbers.
      texts: [G, B / G, 2] int, or None: first and last token of each text, counted through the R / G rows of its group.
      dropout_key: a JAX key turns dropout on; without one the output is deterministic.
      stream: [R, T, D], goes into the first layer instead of the embeddings of `input_ids`, which are then not read.
    Returns:
      ClassifierOutput.
    """
    module = FAMILIES[self.config.family][1](self.config, train=dropout_key is not None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return module.apply({"params": params}, input_ids, attention_mask, texts, stream, rngs=rngs)

  @property
  def vocabulary(self):
    """Path of the module that embeds the tokens (layers.Tokens)."""
    return ("embeddings", "word_embeddings") if self.config.family == "encoder" else ("embed_tokens",)

  def lm_logits(self, params, hidden):
    """Language-model logits [B, T, V] of every token, from `ClassifierOutput.hidden`.

    A decoder's are of the next token; an encoder's, with head="lm", of the token in this place.
    """
    if self.config.family == "encoder" and self.config.head == "lm":
      head = encoder.MaskedLMHead(self.config)
      return head.apply({"params": params["lm_head"]}, hidden, params["embeddings"]["word_embeddings"]["embedding"])
    if "lm_head" not in params and not getattr(self.config, "tie_embeddings", False):
      raise InputError("the language-model warm-up needs a decoder with tied embeddings: set "
                       "--config.student.arch.tie_word_embeddings=True or --config.warmup.epochs=0")
    table = params.get("lm_head", params.get("embed_tokens"))["embedding"]
    return hidden @ table.T.astype(hidden.dtype)

  def weight_names(self):
    """{our parameter path: transformers' tensor name, {} for the layer number} of every leaf."""
    return formats.weight_names(self.config, traverse_util.flatten_dict(self.abstract_params(), sep="/"))

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
    return FAMILIES[self.config.family][1](self.config).init(key, ids, ids)["params"]
