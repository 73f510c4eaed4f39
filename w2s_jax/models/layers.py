"""Parts that every family uses: the output record, a linear layer that may have an adapter, masks, the layer stack.

B texts, R rows, T tokens per row, D width. A row holds one text, or several texts in sequence (data/packing.py).
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from w2s_jax import InputError, adapters, quantized, sharding
from w2s_jax.models.family import SharedConfig

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class ClassifierOutput:
  """The output of a model.

  Attributes:
    logits: [B, C] float32; [B, V] from a language-model head.
    features: [B, D] float32, each text's pooled vector after the final norm. Decoders pool the last real token,
      encoders the first token or the mean of the real tokens. With the W2S head: [B, feature_width], the output of the
      widening layer.
    hidden: [R, T, D], every token's vector after the final norm, if there is one. Language-model logits and the feature
      loss of the paper's released code read it.
    stream: [R, T, D], every token's vector before the final norm, the input that a further layer would get.
    states: [L, R, T, D], the output of every layer, so the last one is `stream`; None unless Model.apply is asked for
      them.
  """
  logits: jax.Array
  features: jax.Array
  hidden: jax.Array
  stream: jax.Array
  states: jax.Array | None = None


class Dense(nn.Module):
  """Linear map [..., in] -> [..., out], with the effect of the adapter beside its kernel if there is one.

  An adapter is data, not code: `attach.add` puts its leaves beside `kernel`, and adapters.KINDS says how to apply them.
  `lora_dropout` is the rate of dropout on the adapter's input alone.
  """
  features: int
  use_bias: bool = False
  init_std: float = 0.02
  lora_dropout: float = 0.0
  train: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features))
    y = quantized.product(x, kernel)
    kind = adapters.kind_of(self.variables["params"])
    if kind is not None:
      leaves = {name: self.get_variable("params", name) for name in adapters.KINDS[kind].leaves}
      h = nn.Dropout(self.lora_dropout, deterministic=not self.train)(x)
      y = adapters.KINDS[kind].apply(leaves, kernel, h, y)
    if self.use_bias:
      y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
    return y


def linear(config: SharedConfig, train: bool, width: int, name: str, use_bias: bool = True) -> Dense:
  """A Dense inside a layer. It may have an adapter, whose dropout is on while training."""
  return Dense(width, use_bias, config.initializer_range, config.lora_dropout, train, name=name)


def attention_kernel(q: jax.Array) -> Literal["cudnn", "xla"]:
  """The implementation of jax.nn.dot_product_attention for q [R, T, H, d].

  It is "cudnn" on a single NVIDIA GPU if cuDNN supports q, else "xla". cuDNN's kernel does not write the scores to
  memory (docs/benchmarks.md has the savings). This kernel is untested on several GPUs. Runs that train together do not
  use it, because its vmap rule fails if all heads share one mask (jax 0.11, https://github.com/jax-ml/jax/pull/34920).
  """
  supported = q.dtype.itemsize == 2 and q.shape[1] % 2 == q.shape[3] % 8 == 0 and q.shape[3] <= 128
  if not supported or jax.default_backend() != "gpu" or jax.device_count() > 1 or _under_vmap_of_runs():
    return "xla"
  capability = getattr(jax.devices()[0], "compute_capability", "")        # 8.0 is Ampere; on AMD it is no number
  return "cudnn" if re.fullmatch(r"([89]|\d\d)\.\d", capability) else "xla"


def _under_vmap_of_runs():
  try:
    jax.lax.axis_size(sharding.RUNS)
  except NameError:
    return False
  return True


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """Squashes x into -cap..cap, with little effect on small values (Gemma 2, arXiv 2408.00118, section 2); 0: no cap."""
  return cap * jnp.tanh(x / cap) if cap else x


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, dropout_rate: float,
              bias: jax.Array | None = None, scale: float | None = None, cap: float = 0.0) -> jax.Array:
  """Scaled dot-product attention; for use inside a compact module.

  Args:
    q: [R, T, H, d] queries.
    k, v: [R, T, K, d]; each of the K key/value heads serves H / K query heads.
    mask: broadcastable to [R, H, T, T] bool, True where a query may attend to a key.
    dropout_rate: dropout rate of the attention probabilities; 0 in evaluation.
    bias: broadcastable to [R, H, T, T], added to the scaled scores; None: no bias. With a bias cuDNN is not used.
    scale: factor of the scores; None: 1 / sqrt(d).
    cap: soft cap of the scaled scores, applied before the bias (`softcap`); 0: no cap.
  Returns:
    [R, T, H, d]. A query that may attend to no key gets the mean of all v.
  """
  if not dropout_rate and not cap:    # jax.nn.dot_product_attention has neither
    kernel = attention_kernel(q) if bias is None else "xla"
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation=kernel)
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (q.shape[-1]**-0.5 if scale is None else scale)
  scores = softcap(scores, cap) if bias is None else softcap(scores, cap) + bias
  probabilities = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
  probabilities = nn.Dropout(dropout_rate, deterministic=False)(probabilities)
  return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v)


def text_mask(segment_ids: jax.Array) -> jax.Array:
  """[R, 1, T, T] bool: a token attends to its own text, padding to all real tokens of its row, like in transformers."""
  query, key = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
  return (key > 0) & ((query == key) | (query == 0))


def causal_mask(segment_ids: jax.Array, window: int = 0) -> jax.Array:
  """[R, 1, T, T] bool: a token attends to itself and to the tokens before it in its text.

  window: number of tokens that a token attends to, itself included; 0: no limit.
  """
  T = segment_ids.shape[1]
  mask = jnp.tril(jnp.ones((T, T), bool))
  if window:
    mask &= ~jnp.tril(mask, -window)
  return mask & text_mask(segment_ids)


def text_starts(segment_ids: jax.Array) -> jax.Array:
  """[R, T] int, the position in the row at which each token's text starts. Padding belongs to the text before it."""
  text = jax.lax.cummax(segment_ids, axis=1)
  begins = text != jnp.pad(text, ((0, 0), (1, 0)))[:, :-1]
  return jax.lax.cummax(jnp.where(begins, jnp.arange(text.shape[1]), 0), axis=1)


def count_in_text(real: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """[R, T] int, for each token the number of `real` ([R, T] bool) tokens of its text up to and including itself."""
  count = jnp.cumsum(real, axis=1)
  return count - jnp.take_along_axis(count - real, text_starts(segment_ids), axis=1)


def real_positions(segment_ids: jax.Array) -> jax.Array:
  """[R, T] int, the position of each token among the real tokens of its text. Padding on the left does not count."""
  return jnp.maximum(count_in_text(segment_ids > 0, segment_ids) - 1, 0)


def pool(hidden: jax.Array, places: jax.Array) -> jax.Array:
  """[R, T, D] -> [B, D], the vectors at `places`.

  places: [G, B / G] int. Each of G groups has R / G rows; a place is an index into the R / G * T tokens of its group.
  """
  groups = hidden.reshape(len(places), -1, hidden.shape[-1])
  return jnp.take_along_axis(groups, places[..., None], axis=1).reshape(-1, hidden.shape[-1])


def mean_pool(hidden: jax.Array, segment_ids: jax.Array, texts: jax.Array | None) -> jax.Array:
  """[R, T, D] -> [B, D], the mean over each text's real tokens; texts: see Model.apply."""
  if texts is None:
    texts = jnp.broadcast_to(jnp.array([0, hidden.shape[1] - 1]), (len(hidden), 1, 2))
  groups = hidden.reshape(len(texts), -1, hidden.shape[-1])
  places, (first, last) = jnp.arange(groups.shape[1]), jnp.split(texts, 2, axis=-1)
  members = (first <= places) & (places <= last) & (segment_ids > 0).reshape(len(texts), 1, -1)
  shares = members / jnp.maximum(members.sum(axis=-1, keepdims=True), 1)
  return jnp.einsum("gbn,gnd->gbd", shares, groups, precision="highest").reshape(-1, hidden.shape[-1])


def embed(config: SharedConfig, size: int, name: str, kind: type[nn.Embed] = nn.Embed, width: int = 0) -> nn.Embed:
  """An embedding table of `size` rows; width 0 means the network's width."""
  return kind(size, width or config.hidden_size, embedding_init=nn.initializers.normal(config.initializer_range),
              name=name)


class Tokens(nn.Embed):
  """Embeddings of the vocabulary. If the parameters have `soft` [S, D], ids beyond the vocabulary select its rows."""

  def __call__(self, input_ids):
    if not self.has_variable("params", "soft"):
      return super().__call__(input_ids)
    words = super().__call__(jnp.minimum(input_ids, self.num_embeddings - 1))
    return place_soft(words, input_ids, self.get_variable("params", "soft"), self.num_embeddings)


def place_soft(words: jax.Array, input_ids: jax.Array, soft: jax.Array, vocab_size: int) -> jax.Array:
  """`words` [R, T, D] with rows of `soft` [S, D] at the ids beyond the vocabulary."""
  tokens = soft[jnp.maximum(input_ids - vocab_size, 0)].astype(words.dtype)
  return jnp.where((input_ids < vocab_size)[..., None], words, tokens)


def last_places(config: SharedConfig, input_ids: jax.Array, segment_ids: jax.Array,
                texts: jax.Array | None) -> jax.Array:
  """[G, B / G] int, the `places` at which `pool` finds each text's last token.

  If a text itself ends in padding tokens, a classifier pools the last token before them, like transformers.
  """
  if texts is None:
    real = segment_ids > 0
    first, last = jnp.argmax(real, axis=1), real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    texts = jnp.stack([first, last], axis=-1)[:, None]
  first, last = texts[..., 0], texts[..., 1]
  if config.head != "classifier" or config.pad_token_id is None:
    return last
  words = ((input_ids != config.pad_token_id) & (segment_ids > 0)).reshape(len(texts), -1)
  last_word = jax.lax.cummax(jnp.where(words, jnp.arange(words.shape[1]), 0), axis=1)
  return jnp.maximum(jnp.take_along_axis(last_word, last, axis=1), first)


def decoder_head(config: SharedConfig, embed_tokens: nn.Embed, norm: Callable[[jax.Array], jax.Array],
                 stream: jax.Array, input_ids: jax.Array, segment_ids: jax.Array,
                 texts: jax.Array | None) -> ClassifierOutput:
  """The output of a decoder from its layers' output `stream` and its final norm; for use inside a compact module.

  The logits are [B, C] from the `score` head, or, if `config.head` is "lm", [B, V] for the next token. Both are read at
  each text's last token (`last_places`).
  """
  hidden = norm(stream)
  features = pool(hidden, last_places(config, input_ids, segment_ids, texts))
  if config.head == "classifier":
    logits = Dense(config.num_labels, False, config.initializer_range, name="score")(features)
  else:
    table = embed_tokens if config.tie_embeddings else embed(config, config.vocab_size, "lm_head")
    logits = table.attend(features)
  return ClassifierOutput(logits, features, hidden, stream)


NO_LANGUAGE_MODEL = ("the language-model warm-up needs a decoder with tied embeddings: set "
                     "--config.student.arch.tie_word_embeddings=True or --config.warmup.epochs=0")


def next_token_logits(config: SharedConfig, params: dict, hidden: jax.Array) -> jax.Array:
  """A decoder's logits [..., V] of the next token, from hidden [..., D] after the final norm.

  Raises:
    InputError: the embeddings are not tied, and the model has no language-model head.
  """
  if "lm_head" not in params and not config.tie_embeddings:
    raise InputError(NO_LANGUAGE_MODEL)
  table = params.get("lm_head", params.get("embed_tokens"))["embedding"]
  return hidden @ table.T.astype(hidden.dtype)


def dropout(rate: float, train: bool) -> nn.Dropout:
  """A Dropout that is on while training; for use inside a compact module."""
  return nn.Dropout(rate, deterministic=not train)


def layer_norm(eps: float, name: str, use_bias: bool = True) -> nn.LayerNorm:
  return nn.LayerNorm(eps, dtype=jnp.float32, use_bias=use_bias, use_fast_variance=False, name=name)


def layer_stack(block: type[nn.Module], config: SharedConfig, train: bool, x: jax.Array, *args: jax.Array,
                per_layer: Sequence[jax.Array] = ()) -> jax.Array:
  """Applies the config's layers to x, one after the other, as a scan over `block`.

  The parameters lie under `layers`, stacked on a leading layer axis, even if `config.unroll` unrolls the scan. The
  outputs that Model.apply may capture are stacked in the same way.
  `config.remat` names the policy that chooses the values to keep for the backward pass ("none" keeps all).

  Args:
    block: class of a layer. block(config, train) maps (x, *args, *this layer's entries of per_layer) to (x, None).
    args: arguments that all layers share.
    per_layer: arrays [config.num_layers or more, ...] with one entry per layer, such as the index of its kind. If
      `config.layers` selects layers, these get their own entries.
  Raises:
    ValueError: an array has fewer entries than the config has layers.
  """
  if shapes := [x.shape for x in map(jnp.asarray, per_layer) if len(x) < config.num_layers]:
    raise ValueError(f"per-layer inputs of shapes {shapes} for {config.num_layers} layers")
  first, end = config.layer_range
  if config.remat != "none":
    block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
  stack = nn.scan(block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True, "dropout": True},
                  in_axes=(nn.broadcast,) * len(args) + (0,) * len(per_layer), length=end - first,
                  unroll=end - first if config.unroll else 1)
  x, _ = stack(config, train, name="layers")(x, *args, *(values[first:end] for values in per_layer))
  return x
