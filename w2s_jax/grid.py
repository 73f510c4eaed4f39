"""A grid: a run for each combination of the values of its axes, and one table of all of them.

A config with a section `grid` is a grid. `grid` has {axis: {value: fields that this value changes}}. The other fields
are those of every cell. A cell is a run in workdir/cells/VALUE-VALUE. rows.jsonl has the rows of every complete cell,
each with the cell's config. A cell that it has is not run again. Cells share the models that they would make equally.
"""

import copy
import hashlib
import itertools
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError, checks, claims, compare, processes, results, stages
from w2s_jax.report import tables

LOG = logging.getLogger(__name__)

STORE = "rows.jsonl"
FAILED_CODE = 1          # exit code if a cell failed

# models/NAME -> the sections of the config that it depends on, beside the fields `seed` and `task`.
DEPENDS = {results.BASE: ("data", "student", "warmup"), results.CLEAN: ("data", "student", "warmup", "poison"),
           results.POISONED: ("data", "student", "warmup", "poison", "attack"),
           results.TEACHER: ("data", "student", "teacher", "teach")}


def cells(config: ConfigDict) -> dict[str, ConfigDict]:
  """{name of a cell: its config}; axes and values are in alphabetical order, as ConfigDict keeps them.

  Raises:
    InputError: an axis without values, or a value that changes a field that the config lacks, or its type.
  """
  base = ConfigDict({name: value for name, value in config.to_dict().items() if name != "grid"})
  axes = config.grid.to_dict()
  if empty := [axis for axis, values in axes.items() if not values]:
    raise InputError(f"grid axis {empty[0]!r} has no values: give it at least one in the config file")
  out = {}
  for chosen in itertools.product(*(values.items() for values in axes.values())):
    cell = copy.deepcopy(base).lock()
    for axis, (value, changes) in zip(axes, chosen):
      if unknown := claims.flat(changes).keys() - claims.flat(cell.to_dict()).keys():
        raise InputError(f"grid axis {axis!r}, value {value!r}: config has no field {min(unknown)!r}: change a field "
                         "that it has")
      try:
        cell.update(changes)
      except TypeError as e:
        raise InputError(f"grid axis {axis!r}, value {value!r}: {e}: give a value of the field's type") from None
    out["-".join(value for value, _ in chosen)] = cell
  return out


def run(config: ConfigDict, workdir: Path) -> int:
  """Runs the cells that are not in the store, and writes the store and the tables.

  Returns:
    The exit code: 0, or FAILED_CODE if the training of some cell diverged; the other cells are run all the same.
  Raises:
    InputError: a mistake in some cell's config, before any cell runs; or another grid's cells are in the workdir.
  """
  grid = cells(config)
  directories = {name: workdir / "cells" / name for name in grid}
  for name, cell in grid.items():
    checks.check_fields(cell)
    claims.check_config(cell, directories[name])
  complete = {name for name in _stored(workdir) if name in grid}
  left, seconds, failed, made = [name for name in grid if name not in complete], [], [], {}
  LOG.info(f"grid of {len(grid)} cells, {len(complete)} of them complete")
  for name in grid:
    if name in left:
      remaining = len(left) - len(seconds) - len(failed)
      about = f", about {sum(seconds) / len(seconds) * remaining / 60:.0f} minutes left" if seconds else ""
      LOG.info(f"cell {name}: {remaining} cells left{about}")
      began = time.monotonic()
      _take_over(grid[name], directories[name], made)
      try:
        stages.run(grid[name], directories[name])
      except FloatingPointError as e:
        LOG.error(f"cell {name} failed: {e}")
        failed.append(name)
        continue
      seconds.append(time.monotonic() - began)
      complete.add(name)
      _store(workdir, grid, directories, complete)
    for model in DEPENDS:
      if (directories[name] / "models" / model).exists():
        made.setdefault(_key(grid[name], model), directories[name] / "models" / model)
  _write_tables(workdir, directories, [name for name in grid if name in complete])
  if failed:
    LOG.error(f"{len(failed)} of {len(grid)} cells failed: {', '.join(failed)}. The same command tries them again")
  return FAILED_CODE if failed else 0


def _key(cell, model):
  """Hash of every field that models/MODEL of the cell depends on."""
  fields = {name: value for name, value in cell.to_dict().items() if name in ("seed", "task", *DEPENDS[model])}
  return model, hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _take_over(cell, directory, made):
  """Copies the models that an earlier cell has made in the same way."""
  for model in DEPENDS:
    source, target = made.get(_key(cell, model)), directory / "models" / model
    if source and processes.writes() and not target.exists():
      part = target.with_name(f"{model}.part")
      shutil.rmtree(part, ignore_errors=True)
      shutil.copytree(source, part)
      part.rename(target)
  processes.wait(f"models of {directory}")


def _stored(workdir) -> dict[str, list[dict[str, Any]]]:
  """{cell: its lines of the store}."""
  file, out = workdir / STORE, {}
  if file.exists():
    for line in file.read_text().splitlines():
      out.setdefault(json.loads(line)["cell"], []).append(json.loads(line))
  return out


def _store(workdir, grid, directories, complete):
  """Writes the store again, with the rows of every complete cell in the grid's order."""
  lines = [json.dumps({"cell": name, **row, "config": grid[name].to_dict()}) for name in grid if name in complete
           for row in json.loads((directories[name] / "results.json").read_text())["rows"]]
  processes.write_text(workdir / STORE, "".join(line + "\n" for line in lines))


def _write_tables(workdir, directories, names):
  """Writes and logs the comparison of the complete cells."""
  if not names:
    return
  runs = [compare.read(directories[name])._replace(name=name) for name in names]
  text = compare.text(runs)
  for file, content in (("results.md", text + "\n"), ("rows.csv", compare.to_csv(runs)),
                        ("table.tex", tables.latex(compare.means(runs)))):
    processes.write_text(workdir / file, content)
  LOG.info(f"\n{text}\n\n{workdir / 'results.md'}, rows.csv, table.tex; reports are in {workdir / 'cells'}")
