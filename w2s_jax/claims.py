"""The claim on a workdir: a run may continue it only with the config and the data that the workdir was made with."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError
from w2s_jax.models import base_of, read_json, resolve, sha256


def config_hash(config: ConfigDict) -> str:
  """12 hexadecimal digits that identify the values of all fields except the mesh.

  The mesh may change if a run is started again. Without dropout another mesh changes the results only by rounding. With
  dropout it changes the masks, because a mask depends on the row's place in the batch.
  """
  fields = {name: value for name, value in config.to_dict().items() if name != "mesh"}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def inputs(config: ConfigDict, rows: dict[str, list]) -> dict[str, Any]:
  """{name of an input: its sha256}. Inputs are the rows of each split, files of defenses and weights of checkpoints.

  Weights have {file name: sha256} instead of one sha256.
  """
  out = {f"{split} rows": hashlib.sha256(json.dumps(split_rows).encode()).hexdigest()
         for split, split_rows in rows.items()}
  c = config.student
  directories = {path: resolve(path, base) for path, base in ((c.path, c.base), (config.teacher.path, "")) if path}
  if c.base:
    directories[c.base] = base_of(c.path, c.base)
  files = {path: Path(os.path.expanduser(path)) for section in config.defense.values() if (path := section.get("path"))}
  out |= {f"file {path}": hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files.items()
          if file.is_file()}
  return out | {weights_of(path): sha256(directory, "*.safetensors") for path, directory in directories.items()}


def weights_of(path: str) -> str:
  """The name of a checkpoint's weights in the result of `inputs`."""
  return f"weights of {path}"


def check_inputs(workdir: Path, found: dict[str, Any]) -> None:
  """Raises InputError if an input has changed since the workdir was made, because a table would mix two data sets.

  found: the result of `inputs` for this start.
  """
  recorded = read_json(workdir / "inputs.json")
  if changed := [name for name, value in found.items() if recorded.get(name) != value]:
    raise InputError(f"{workdir} was made with other data (the {changed[0]} changed): give another --workdir")


def check_config(config: ConfigDict, workdir: Path) -> None:
  """Raises InputError if another config made the workdir; a change of the mesh is allowed."""
  file = workdir / "config.json"
  if file.exists() and (changes := changed_fields(config, read_json(file))):
    raise InputError(f"{workdir} was made by another config ({changes[0]}; {len(changes)} field(s) differ): give "
                     "another --workdir")


def changed_fields(config: ConfigDict, stored: dict) -> list[str]:
  """["FIELD was X, is Y"] for each field, except those of the mesh, in which a config differs from a stored one."""
  fields, other = flat(json.loads(json.dumps(config.to_dict()))), flat(stored)
  return [f"{name} was {other.get(name)!r}, is {fields.get(name)!r}" for name in sorted(fields.keys() | other.keys())
          if fields.get(name) != other.get(name) and not name.startswith("mesh.")]


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
  """{"a.b": value} of a nested dict {"a": {"b": value}}."""
  out = {}
  for k, v in tree.items():
    out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
  return out
