"""Measures how large the inputs of the layers' kernels are. L layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from w2s_jax.models import layers
from w2s_jax.models.model import Model


def squares(model: Model, params: dict, input_ids: jax.Array, segment_ids: jax.Array,
            texts: jax.Array) -> dict[str, jax.Array]:
  """{path of a kernel in the layers: [L, in] float32}, the sum of squares of each input feature of the kernel.

  The sum is over the batch's real tokens. DeBERTa also applies kernels to embeddings of distances, which count too.

  Args:
    input_ids, segment_ids, texts: see Model.apply.
  """
  real = segment_ids > 0
  def watch(call, args, kwargs, context):
    if isinstance(context.module, layers.Dense):
      x = args[0].astype(jnp.float32)
      if x.shape[:-1] == real.shape:
        x = jnp.where(real[..., None], x, 0)
      context.module.sow("intermediates", "kernel", jnp.square(x).sum(range(x.ndim - 1)))
    return call(*args, **kwargs)
  with nn.intercept_methods(watch):
    _, sown = model.family.module(model.config).apply({"params": params}, input_ids, segment_ids, texts, None,
                                                      mutable=["intermediates"])
  flat = traverse_util.flatten_dict(sown["intermediates"], sep="/")
  return {path: sum(uses) for path, uses in flat.items() if path.startswith("layers/")}
