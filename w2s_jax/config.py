"""Fields of the config (stub)."""
import dataclasses

from ml_collections import ConfigDict


def field(default, doc, *, low=None, high=None, among=None, unit="", source=""):
  return dataclasses.field(default=default, metadata=dict(doc=doc, low=low, high=high, among=among, unit=unit, source=source))
def section(cls, **values):
  return ConfigDict({f.name: f.default for f in dataclasses.fields(cls)} | values)
def check(cls, values, prefix):
  from w2s_jax import InputError
  for f in dataclasses.fields(cls):
    low, high = f.metadata["low"], f.metadata["high"]
    if (low is not None and values[f.name] < low) or (high is not None and values[f.name] > high):
      raise InputError(f"{prefix}.{f.name} is {values[f.name]}, wanted a number in {low:g}..{high:g}: set --config.{prefix}.{f.name}")
  return cls(**values.to_dict())
