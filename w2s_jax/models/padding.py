"""Which token is a decoder text's last one: what the model's config and its tokenizer say of padding must agree."""

import dataclasses
from typing import Any

from w2s_jax import InputError
from w2s_jax.models.encoder import ROBERTAS
from w2s_jax.models.model import Model


def with_padding_token(model: Model, tokenizer: Any) -> Model:
  """The model with the tokenizer's padding token in its config, by which transformers pools a decoder's text.

  Raises:
    InputError: a decoder's config names another one, and answers in batches are not those to single texts; or it
      names none, and the tokenizer's is a token that texts end in; or a RoBERTa has another, behind which its positions
      start.
  """
  c, pad = model.config, tokenizer.pad_token_id
  if c.model_type in ROBERTAS and c.pad_token_id != pad:
    raise InputError(f"the {c.model_type}'s positions start behind padding token {c.pad_token_id}, its tokenizer pads "
                     f"with {pad}: give the model its own tokenizer")
  if c.pools_last and c.pad_token_id not in (None, pad):
    raise InputError(f"the model's config.json has pad_token_id {c.pad_token_id}, its tokenizer pads with {pad}: "
                     "transformers would answer otherwise in batches than to a text alone. Set pad_token_id in "
                     f"config.json to {pad}, or pad_token in tokenizer_config.json")
  if c.pools_last and c.pad_token_id is None and tokenizer("a")["input_ids"][-1] == pad:
    raise InputError(f"the model's config.json has no pad_token_id, and texts end in the token {pad} that its "
                     "tokenizer pads with: nothing says which token of a text it classifies by. Set pad_token_id in "
                     "config.json")
  return Model(dataclasses.replace(c, pad_token_id=pad))
