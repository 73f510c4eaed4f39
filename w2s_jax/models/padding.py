"""Makes config and tokenizer agree on the padding token, by which a decoder finds a text's last token."""

import dataclasses
from typing import Any

from w2s_jax import InputError
from w2s_jax.models.encoder import ROBERTAS
from w2s_jax.models.model import Model


def with_padding_token(model: Model, tokenizer: Any) -> Model:
  """The model with the tokenizer's padding token in its config, where transformers reads it to pool a decoder's text.

  Raises:
    InputError: a decoder's config names another padding token, or names none while texts end in the tokenizer's padding
      token. Or a RoBERTa's config, whose positions start after the padding token, names another one.
  """
  c, pad = model.config, tokenizer.pad_token_id
  if c.model_type in ROBERTAS and c.pad_token_id != pad:
    raise InputError(f"the {c.model_type}'s positions start behind padding token {c.pad_token_id}, its tokenizer pads "
                     f"with {pad}: give the model its own tokenizer")
  if c.is_decoder and c.pad_token_id not in (None, pad):
    raise InputError(f"the model's config.json has pad_token_id {c.pad_token_id}, its tokenizer pads with {pad}: "
                     "transformers' answers in batches would differ from those to single texts. Set pad_token_id in "
                     f"config.json to {pad}, or pad_token in tokenizer_config.json")
  if c.is_decoder and c.pad_token_id is None and tokenizer("a")["input_ids"][-1] == pad:
    raise InputError(f"the model's config.json has no pad_token_id, and texts end in the token {pad} that its "
                     "tokenizer pads with: nothing says which token of a text it classifies by. Set pad_token_id in "
                     "config.json")
  return Model(dataclasses.replace(c, pad_token_id=pad))
