"""What a workdir was begun with: it goes on with the same config and the same data alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError
from w2s_jax.models import base_of, read_json, resolve, sha256


def config_hash(config: ConfigDict) -> str:
  """Of every field but the mesh's, which may change from one start to the next.

  What comes out is the same up to rounding; where there is dropout, its masks are others (they go by place in a batch).
  """
  fields = {name: value for name, value in config.to_dict().items() if name != "mesh"}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def inputs(config: ConfigDict, rows: dict[str, list]) -> dict[str, Any]:
  """{what was read: its sha256}: the rows of each split, the weights of the given checkpoints."""
  out = {f"{split} rows": hashlib.sha256(json.dumps(chosen).encode()).hexdigest() for split, chosen in rows.items()}
  c = config.student
  found = {path: resolve(path, base) for path, base in ((c.path, c.base), (config.teacher.path, "")) if path}
  if c.base:
    found[c.base] = base_of(c.path, c.base)
  return out | {weights_of(path): sha256(directory, "*.safetensors") for path, directory in found.items()}


def weights_of(path: str) -> str:
  """The name of a checkpoint's weights among the inputs."""
  return f"weights of {path}"


def check_inputs(workdir: Path, found: dict[str, Any]) -> None:
  """Raises InputError where something else was read under the same name: two data sets would be mixed in a table."""
  before = read_json(workdir / "inputs.json")
  if changed := [name for name, value in found.items() if before.get(name) != value]:
    raise InputError(f"{workdir} was begun with other data: the {changed[0]} changed since: give another --workdir")


def check_config(config: ConfigDict, workdir: Path) -> None:
  """Raises InputError where the workdir was made by another config; the mesh may change."""
  file = workdir / "config.json"
  if file.exists():
    mine, other = flat(json.loads(json.dumps(config.to_dict()))), flat(read_json(file))
    differing = sorted(k for k in mine.keys() | other.keys()
                       if mine.get(k) != other.get(k) and not k.startswith("mesh."))
    if differing:
      k = differing[0]
      raise InputError(f"{workdir} was made by another config ({k} was {other.get(k)!r}, is {mine.get(k)!r}; "
                       f"{len(differing)} field(s) differ): give another --workdir")


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
  """{"a.b": value} of nested dicts."""
  out = {}
  for k, v in tree.items():
    out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
  return out
