"""Rotary positions (Su et al., arXiv 2104.09864) and the ways to scale them that config.json can name.

R rows, T tokens, H heads, d head width, P rotated pairs of features (d / 2 unless the rotation is partial).
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from w2s_jax import InputError
from w2s_jax.models.hf.fields import Fields

ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
ROPE_FIELDS = {"default": (), "linear": ("factor",), "dynamic": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
               "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", ORIGINAL),
               "longrope": ("short_factor", "long_factor", "attention_factor", ORIGINAL)}
PHI3_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # as in transformers


@dataclasses.dataclass(frozen=True)
class Rope:
  """The parameters of the pairs' rotation frequencies, under transformers' names."""
  rope_type: str = "default"          # a key of ROPE_FIELDS
  rope_theta: float = 10000.0
  factor: float = 1.0
  # llama3 divides a pair's frequency by factor if the pair turns less than low_freq_factor times within the original
  # length, keeps it if the pair turns more than high_freq_factor times, and interpolates between the two.
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  # yarn (arXiv 2309.00071) keeps the frequency of a pair that turns more than beta_fast times within the original
  # length, divides it by factor if the pair turns less than beta_slow times, and interpolates between the two.
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True               # yarn: round the interpolation's ends outward to whole pairs
  attention_factor: float | None = None   # factor of cos and sin; None: see `gain`
  # longrope (arXiv 2402.13753) divides each pair's frequency by its short_factor in texts of at most the original
  # length, and by its long_factor in longer texts.
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  original_max_position_embeddings: int = 8192
  partial_rotary_factor: float = 1.0  # fraction of a head's features that are rotated: the first ones

  @classmethod
  def from_hf(cls, fields: Fields, theta: float = 10000.0) -> Self:
    """Reads `rope_parameters` (transformers 5), or `rope_scaling` and a top-level `rope_theta` (transformers 4).

    Args:
      theta: rope_theta if the file has none.
    Raises:
      InputError: an unknown type, a parameter that is missing or out of range, or fields that contradict each other.
    """
    sections = [fields.section(name) for name in ("rope_parameters", "rope_scaling")]
    new, old = ({"rope_type" if name == "type" else name: value for name, value in section.values.items()
                 if name != "rope_theta"} for section in sections)
    if old and old != new and "rope_parameters" in fields:
      raise InputError(f"the model's {fields.where} has rope_parameters and a rope_scaling that differ: keep one")
    thetas = [section.values["rope_theta"] for section in (fields, *sections) if "rope_theta" in section]
    if any(value != thetas[0] for value in thetas):
      raise InputError(f"the model's {fields.where} has several values of rope_theta: keep one")
    rope = fields.section("rope_parameters", "rope_scaling")
    types, part = dict(zip(ROPE_FIELDS, ROPE_FIELDS)), 1.0
    if fields.values.get("model_type") == "phi3":
      types = PHI3_TYPES
      part = _place(PARTIAL, fields, rope).number(PARTIAL, 1.0, 1e-30, 1.0)
    else:
      for place in (fields, rope):
        place.only(partial_rotary_factor=1)
    rope_type = types[rope.string("rope_type" if "rope_type" in rope else "type", "default", types)]
    theta = (rope if "rope_theta" in rope else fields).positive("rope_theta", theta)
    if rope_type == "yarn" and theta <= 1:
      raise InputError(f"the model's {rope.where}: rope_theta {theta} must be more than 1 for yarn")
    return cls(rope_type, theta, partial_rotary_factor=part, **_parameters(rope_type, fields, rope))

  def to_hf(self) -> dict:
    """The fields of config.json, those of transformers 5 and of transformers 4."""
    fields = {name: getattr(self, name) for name in ("rope_type", *ROPE_FIELDS[self.rope_type])}
    fields = {name: value for name, value in fields.items() if value is not None}
    scaling = {} if self.rope_type == "default" else {"rope_scaling": fields}
    return {"rope_theta": self.rope_theta, "rope_parameters": fields | {"rope_theta": self.rope_theta}} | scaling

  def to_phi3(self) -> dict:
    """The fields of a Phi-3's config.json that transformers 5 and 4 both read.

    transformers 4 accepts only `type`, `short_factor` and `long_factor` in rope_scaling, so it refuses a file with an
    attention_factor.
    """
    fields = {"rope_theta": self.rope_theta, PARTIAL: self.partial_rotary_factor, "rope_scaling": None}
    if self.rope_type == "longrope":
      scaling = {"type": "longrope", "short_factor": self.short_factor, "long_factor": self.long_factor}
      if self.attention_factor is not None:
        scaling["attention_factor"] = self.attention_factor
      fields |= {"rope_scaling": scaling, ORIGINAL: self.original_max_position_embeddings}
    return fields

  def turning_width(self, head_dim: int) -> int:
    """Number of a head's features that are rotated, 2 P."""
    return int(head_dim * self.partial_rotary_factor)

  def inverse_frequencies(self, head_dim: int, max_positions: int, length: int | jax.Array) -> jax.Array:
    """[P] float32, each pair's angle per position. `length`, in tokens, matters only to "dynamic" and "longrope"."""
    theta: float | jax.Array = self.rope_theta
    width = self.turning_width(head_dim)
    if self.rope_type == "dynamic":
      stretch = self.factor * jnp.maximum(length, max_positions) / max_positions - (self.factor - 1)
      theta *= stretch ** (width / (width - 2))
    inverse = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if self.rope_type == "linear":
      return inverse / self.factor
    if self.rope_type == "longrope":
      return inverse / jnp.where(length > self.original_max_position_embeddings, jnp.asarray(self.long_factor),
                                 jnp.asarray(self.short_factor))
    if self.rope_type in ("llama3", "yarn"):
      share = self._kept_by_llama3(inverse) if self.rope_type == "llama3" else self._kept_by_yarn(width)
      return inverse * (share + (1 - share) / self.factor)
    return inverse

  def cos_sin(self, positions: jax.Array, head_dim: int, max_positions: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [R, T, 1, P] float32 of positions [R, T].

    "dynamic" and "longrope" use the length of the batch's longest text, like transformers.
    """
    inverse = self.inverse_frequencies(head_dim, max_positions, positions.max() + 1)
    angles = (positions[..., None].astype(jnp.float32) * inverse)[:, :, None]
    return self.gain(max_positions) * jnp.cos(angles), self.gain(max_positions) * jnp.sin(angles)

  def _kept_by_llama3(self, inverse):
    """[P], the share of each pair's frequency that is not divided by `factor`."""
    turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
    return jnp.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)

  def _kept_by_yarn(self, width):
    def pair(turns):                  # index of the pair that makes `turns` turns within the original length
      length = self.original_max_position_embeddings / (2 * math.pi * turns)
      return width * math.log(length) / (2 * math.log(self.rope_theta))
    first, last = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = float(max(first, 0)), float(min(last, width - 1))
    ramp = last - first or 0.001      # as in transformers
    return 1 - jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - first) / ramp, 0, 1)

  def gain(self, max_positions: int) -> float:
    """The factor of cos and sin, by which yarn and longrope increase the attention scores; 1 in the other types."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.rope_type == "yarn":
      return _yarn_gain(self.factor)
    if self.rope_type == "longrope":
      return _longrope_gain(max_positions / self.original_max_position_embeddings,
                            self.original_max_position_embeddings)
    return 1.0


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the first 2 P features of x [R, T, H, d]; features i and i + P are a pair, like in transformers."""
  width = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
  return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)


def _yarn_gain(factor, scale=1.0):
  """`gain` of yarn, as in `_compute_yarn_parameters` of transformers/modeling_rope_utils.py."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope_gain(factor, original):
  """`gain` of longrope, as in `_compute_longrope_parameters` of transformers/modeling_rope_utils.py."""
  return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _parameters(rope_type: str, fields: Fields, rope: Fields) -> dict[str, Any]:
  """{field of Rope: value} for the parameters that a rope_type has besides rope_theta."""
  if rope_type == "default":
    return {}
  if rope_type == "longrope":
    numbers = {name: tuple(entry.positive(name) for entry in rope.entries(name))
               for name in ("short_factor", "long_factor")}
  else:
    numbers = {"factor": rope.positive("factor")}
  if rope_type in ("llama3", "yarn", "longrope"):
    positions = fields.integer("max_position_embeddings", 2048)
    numbers[ORIGINAL] = _place(ORIGINAL, fields, rope).integer(ORIGINAL, positions, low=2)
  if rope_type == "llama3":
    numbers |= {name: rope.positive(name) for name in ("low_freq_factor", "high_freq_factor")}
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
      raise InputError(f"the model's {rope.where}: low_freq_factor {numbers['low_freq_factor']} must be less than "
                       f"high_freq_factor {numbers['high_freq_factor']}")
  if rope_type == "yarn":
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
      numbers[name] = rope.positive(name) if rope.values.get(name) else default  # transformers reads 0 as the default
    numbers["truncate"] = rope.flag("truncate", "truncate" not in rope.values)   # transformers reads null as false
  if rope_type in ("yarn", "longrope"):
    numbers["attention_factor"] = _attention_factor(rope_type, rope, numbers[ORIGINAL])
  return numbers


def _place(name, fields, rope):
  """`rope` if it has the field `name`, else `fields`.

  Raises:
    InputError: both have the field, with different values.
  """
  if name in fields and name in rope and fields.values[name] != rope.values[name]:
    raise InputError(f"the model's {fields.where} has several values of {name}: keep one")
  return rope if name in rope else fields


def _attention_factor(rope_type, rope, original):
  """The file's attention_factor, or one computed from fields that Rope does not keep; None: `gain` computes it."""
  if "attention_factor" in rope:
    return rope.positive("attention_factor")
  if rope_type == "longrope":
    return _longrope_gain(rope.positive("factor"), original) if "factor" in rope else None
  factor, scale, scale_all = rope.positive("factor"), rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
  return _yarn_gain(factor, scale) / _yarn_gain(factor, scale_all) if scale and scale_all else None
