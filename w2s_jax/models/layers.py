"""What every family shares: the output record, a linear layer with room for an adapter, masks, the layer stack.

B texts, R rows, T tokens of a row, D width. A row holds one text, or several one after the other (data/packing.py).
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
  """What a classifier returns.

  Attributes:
    logits: [B, C] float32.
    features: [B, D] float32, the pooled vector after the final norm (last token but padding for decoders, first
      token for encoders; for the W2S teacher the widened vector).
    hidden: [R, T, D], every token's vector after the final norm; only the released feature loss and the
      language-model warm-up read it.
    stream: [R, T, D], the same before that norm, as the next layer would get it (Latent).
  """
  logits: jax.Array
  features: jax.Array
  hidden: jax.Array
  stream: jax.Array


class Dense(nn.Module):
  """Linear map [..., in] -> [..., out]; an adapter found beside the kernel changes what comes out (adapters.KINDS).

  The adapter is data, not code: `attach.add` puts its leaves next to `kernel`; its input may have dropout of its own.
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
  """A Dense of a layer: it may carry an adapter, whose dropout is on while training."""
  return Dense(width, use_bias, config.initializer_range, config.lora_dropout, train, name=name)


def attention_kernel(q: jax.Array) -> Literal["cudnn", "xla"]:
  """What jax.nn.dot_product_attention is to run on: "cudnn" on one GPU of NVIDIA's, if it takes q [B, T, H, d].

  cuDNN's never writes the scores to memory (docs/benchmarks.md has what that saves). Elsewhere "xla": on several GPUs
  cuDNN's is untested, and its rule for vmap, under which runs train at once, fails on a mask that all heads share (jax
  0.11, https://github.com/jax-ml/jax/pull/34920).
  """
  takes = q.dtype.itemsize == 2 and q.shape[1] % 2 == q.shape[3] % 8 == 0 and q.shape[3] <= 128
  if not takes or jax.default_backend() != "gpu" or jax.device_count() > 1 or _under_vmap_of_runs():
    return "xla"
  capability = getattr(jax.devices()[0], "compute_capability", "")        # from Ampere on; on AMD it is no number
  return "cudnn" if re.fullmatch(r"([89]|\d\d)\.\d", capability) else "xla"


def _under_vmap_of_runs():
  try:
    jax.lax.axis_size(sharding.RUNS)
  except NameError:
    return False
  return True


def softcap(x: jax.Array, cap: float) -> jax.Array:
  """x within -cap..cap, nearly as it is where it is small (Gemma 2, arXiv 2408.00118, section 2); 0: x as it is."""
  return cap * jnp.tanh(x / cap) if cap else x


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, dropout_rate: float,
              bias: jax.Array | None = None, scale: float | None = None, cap: float = 0.0) -> jax.Array:
  """Scaled dot-product attention; for use inside a compact module.

  Args:
    q: [B, T, H, d]; k, v: [B, T, K, d], each of the K heads serving H / K query heads.
    mask: broadcastable to [B, H, T, T] bool, True where a query may look.
    dropout_rate: of the attention probabilities; 0 where nothing is dropped (evaluation).
    bias: broadcastable to [B, H, T, T], added to the scaled scores; None: nothing. cuDNN's kernel does not get one.
    scale: of the scores; None: 1 / sqrt(d).
    cap: of the scaled scores (softcap), which no kernel of the library knows; 0: none.
  Returns:
    [B, T, H, d]; for a query that may look nowhere the mean of all v.
  """
  if not dropout_rate and not cap:
    kernel = attention_kernel(q) if bias is None else "xla"
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation=kernel)
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (q.shape[-1]**-0.5 if scale is None else scale)
  scores = softcap(scores, cap) if bias is None else softcap(scores, cap) + bias
  probabilities = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
  probabilities = nn.Dropout(dropout_rate, deterministic=False)(probabilities)
  return jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v)


def text_mask(segment_ids: jax.Array) -> jax.Array:
  """[R, 1, T, T] bool: a token sees the real tokens of its text; padding sees every real one, as in transformers."""
  query, key = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
  return (key > 0) & ((query == key) | (query == 0))


def causal_mask(segment_ids: jax.Array, window: int = 0) -> jax.Array:
  """[R, 1, T, T] bool: of its text a token sees itself and those before it, `window` in all where that is not 0."""
  T = segment_ids.shape[1]
  seen = jnp.tril(jnp.ones((T, T), bool))
  if window:
    seen &= ~jnp.tril(seen, -window)
  return seen & text_mask(segment_ids)


def text_starts(segment_ids: jax.Array) -> jax.Array:
  """[R, T] int: where in the row the text of each token begins; padding goes with the text before it."""
  text = jax.lax.cummax(segment_ids, axis=1)
  begins = text != jnp.pad(text, ((0, 0), (1, 0)))[:, :-1]
  return jax.lax.cummax(jnp.where(begins, jnp.arange(text.shape[1]), 0), axis=1)


def count_in_text(real: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """[R, T] int: how many tokens of its text are `real`, up to and with each."""
  count = jnp.cumsum(real, axis=1)
  return count - jnp.take_along_axis(count - real, text_starts(segment_ids), axis=1)


def real_positions(segment_ids: jax.Array) -> jax.Array:
  """[R, T] int: the place of each token among the real ones of its text, whatever is to the left of that."""
  return jnp.maximum(count_in_text(segment_ids > 0, segment_ids) - 1, 0)


def pool(hidden: jax.Array, places: jax.Array) -> jax.Array:
  """[R, T, D] -> [B, D]: G groups of R / G rows each, and [G, B / G] places in each group's R / G * T tokens."""
  groups = hidden.reshape(len(places), -1, hidden.shape[-1])
  return jnp.take_along_axis(groups, places[..., None], axis=1).reshape(-1, hidden.shape[-1])


def mean_pool(hidden: jax.Array, segment_ids: jax.Array, texts: jax.Array | None) -> jax.Array:
  """[R, T, D] -> [B, D]: the mean over each text's real tokens; `texts` as Model.apply has them."""
  if texts is None:
    texts = jnp.broadcast_to(jnp.array([0, hidden.shape[1] - 1]), (len(hidden), 1, 2))
  groups = hidden.reshape(len(texts), -1, hidden.shape[-1])
  places, (first, last) = jnp.arange(groups.shape[1]), jnp.split(texts, 2, axis=-1)
  own = (first <= places) & (places <= last) & (segment_ids > 0).reshape(len(texts), 1, -1)
  shares = own / jnp.maximum(own.sum(axis=-1, keepdims=True), 1)
  return jnp.einsum("gbn,gnd->gbd", shares, groups, precision="highest").reshape(-1, hidden.shape[-1])


def embed(config: SharedConfig, size: int, name: str, kind: type[nn.Embed] = nn.Embed, width: int = 0) -> nn.Embed:
  """A table of `size` rows, as wide as the network where `width` is 0."""
  return kind(size, width or config.hidden_size, embedding_init=nn.initializers.normal(config.initializer_range),
              name=name)


class Tokens(nn.Embed):
  """The vocabulary's embeddings; ids behind it are the rows of `soft` [S, D], where the parameters have that leaf."""

  def __call__(self, input_ids):
    if not self.has_variable("params", "soft"):
      return super().__call__(input_ids)
    words = super().__call__(jnp.minimum(input_ids, self.num_embeddings - 1))
    return place_soft(words, input_ids, self.get_variable("params", "soft"), self.num_embeddings)


def place_soft(words: jax.Array, input_ids: jax.Array, soft: jax.Array, vocab_size: int) -> jax.Array:
  """`words` [R, T, D], but rows of `soft` [S, D] where the ids are behind the vocabulary."""
  tokens = soft[jnp.maximum(input_ids - vocab_size, 0)].astype(words.dtype)
  return jnp.where((input_ids < vocab_size)[..., None], words, tokens)


def last_places(config: SharedConfig, input_ids: jax.Array, segment_ids: jax.Array,
                texts: jax.Array | None) -> jax.Array:
  """`places` of `pool`: the last token of each text.

  A classifier does not count its padding token, wherever it comes from, as transformers does not: a text that ends in
  it is pooled at the token before.
  """
  if texts is None:
    real = segment_ids > 0
    first, last = jnp.argmax(real, axis=1), real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    texts = jnp.stack([first, last], axis=-1)[:, None]
  first, last = texts[..., 0], texts[..., 1]
  if config.head != "classifier" or config.pad_token_id is None:
    return last
  words = ((input_ids != config.pad_token_id) & (segment_ids > 0)).reshape(len(texts), -1)
  behind = jax.lax.cummax(jnp.where(words, jnp.arange(words.shape[1]), 0), axis=1)
  return jnp.maximum(jnp.take_along_axis(behind, last, axis=1), first)


def decoder_head(config: SharedConfig, embed_tokens: nn.Embed, norm: Callable[[jax.Array], jax.Array],
                 stream: jax.Array, input_ids: jax.Array, segment_ids: jax.Array,
                 texts: jax.Array | None) -> ClassifierOutput:
  """What a decoder returns, from what its layers made and its final norm; for use inside a compact module.

  Its logits are those of the `score` head, [B, C], or with `config.head` "lm" those of the next token, [B, V]; both
  of the last token (`last_places`).
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
  """A decoder's logits [..., V] of the next token, from hidden [..., D] behind the final norm.

  Raises:
    InputError: its embeddings are not tied, and it has no head of its own.
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
  """Runs `block` once for each of the config's layers over x, the last one's output; parameters lie under `layers`.

  They are stacked on a leading layer axis. `config.unroll` unrolls the scan over the same stacked parameters;
  `config.remat` names a policy that says what the backward pass keeps ("none" keeps everything).

  Args:
    block: (x, *args, *its layer's part of per_layer) -> (x, None).
    args: what every layer gets.
    per_layer: arrays [config.num_layers, ...] or longer: a window, a rotary base of each layer. Where config.layers has
      some of the layers run alone, these get their own.
  Raises:
    ValueError: an array has fewer layers than the config.
  """
  if short := [x.shape for x in map(jnp.asarray, per_layer) if len(x) < config.num_layers]:
    raise ValueError(f"per-layer inputs of shapes {short} for {config.num_layers} layers")
  first, end = config.layer_range
  if config.remat != "none":
    block = nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
  stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                  in_axes=(nn.broadcast,) * len(args) + (0,) * len(per_layer), length=end - first,
                  unroll=end - first if config.unroll else 1)
  x, _ = stack(config, train, name="layers")(x, *args, *(values[first:end] for values in per_layer))
  return x
