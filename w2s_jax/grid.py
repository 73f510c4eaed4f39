"""A grid: one run for each combination of the axes' values, and one table of all runs.

A config with a section `grid` is a grid. `grid` is {axis: {value: fields that this value changes}}. All other fields
are equal in all cells. A cell is one run, in workdir/cells/VALUE-VALUE. rows.jsonl, the store, has the rows of each
complete cell with the cell's config. A stored cell does not run again. If several cells would make the same student or
teacher, the first one makes it and the others copy it.
"""

import contextlib
import copy
import itertools
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from w2s_jax import InputError, checks, claims, compare, processes, results, stages, workers
from w2s_jax.report import overview

LOG = logging.getLogger(__name__)

STORE = "rows.jsonl"
FAILED_CODE = 1          # exit code if a cell failed

# models/NAME -> the sections of the config that the model depends on, besides the fields `seed` and `task`. A poisoned
# teacher depends on `attack`, too.
DEPENDS = {results.BASE: ("data", "student", "warmup"), results.CLEAN: ("data", "student", "warmup", "poison"),
           results.POISONED: ("data", "student", "warmup", "poison", "attack"),
           results.TEACHER: ("data", "student", "teacher", "teach")}


def over_seeds(config: ConfigDict, seeds: list[str]) -> ConfigDict:
  """The config as a grid with the axis `seed`. If it is a grid already, its other axes stay.

  Raises:
    InputError: the seeds are not different whole numbers, the grid's axes are wrong, or its axis `seed` changes more
      than the seed.
  """
  if not seeds or len(set(seeds)) < len(seeds) or not all(re.fullmatch("0|[1-9][0-9]*", seed) for seed in seeds):
    raise InputError(f"--seeds={','.join(seeds)}: want different whole numbers, such as --seeds=0,1,2")
  out = config.to_dict()
  axes = out.get("grid", {})
  if axes:
    _check_axes(axes)
  if any(set(changes) != {"seed"} for changes in axes.get("seed", {}).values()):
    raise InputError("--seeds: the axis `seed` of this grid changes other fields, too: leave out --seeds")
  axes["seed"] = {seed: {"seed": int(seed)} for seed in seeds}
  return ConfigDict(out | {"grid": axes}, allow_dotted_keys=True)


def cells(config: ConfigDict) -> dict[str, ConfigDict]:
  """{name of a cell: its config}. Axes and values are in alphabetical order, because ConfigDict sorts them.

  Raises:
    InputError: the grid has no axes, or an axis has no values; a value's name cannot be part of a directory's name; two
      axes change one field; a value changes the type of a field, or a field that the config lacks; or two cells have
      one name.
  """
  base = ConfigDict({name: value for name, value in config.to_dict().items() if name != "grid"})
  axes = config.grid.to_dict()
  _check_axes(axes)
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
    name = "-".join(value for value, _ in chosen)
    if name in out:
      raise InputError(f"two cells of the grid have the name {name!r}: give one of the values another name")
    out[name] = cell
  return out


def _check_axes(axes):
  if not axes:
    raise InputError("the grid has no axes: give common.grid at least one in the config file")
  owners = {}
  for axis, values in axes.items():
    if not isinstance(values, dict) or not all(isinstance(changes, dict) for changes in values.values()):
      raise InputError(f"grid axis {axis!r}: want {{value: {{field or section: new value}}}} in the config file")
    if not values:
      raise InputError(f"grid axis {axis!r} has no values: give it at least one in the config file")
    for value in values:
      if not isinstance(value, str) or not re.fullmatch(r"\w[\w.+=-]*", value):
        raise InputError(f"grid axis {axis!r}, value {value!r}: want a string of letters, digits and ._+=-, which is a "
                         "part of a directory's name")
    for field in {field for changes in values.values() for field in claims.flat(changes)}:
      if owners.setdefault(field, axis) != axis:
        raise InputError(f"grid axes {owners[field]!r} and {axis!r} both change {field!r}: leave it to one of them")


def run(config: ConfigDict, workdir: Path, jobs: int = 1) -> int:
  """Runs the cells that are not in the store, and writes the store and the tables.

  Args:
    jobs: number of cells that run at the same time. If it is above 1, each cell runs in its own process, with an equal
      share of the CPU cores, and writes its output to log.txt in its directory.
  Returns:
    The exit code: 0, or FAILED_CODE if a cell failed. A failed cell does not stop the other cells.
  Raises:
    InputError: the workdir is that of a single run, a field of a cell's config is wrong (both checked before any cell
      runs), or the store has a cell with another config. If no cell is complete at the end, the error of the first
      cell that failed is raised.
  """
  if (workdir / "config.json").exists():
    raise InputError(f"{workdir} is the workdir of a single run: give another --workdir")
  grid = cells(config)
  directories = {name: workdir / "cells" / name for name in grid}
  for cell in grid.values():
    checks.check_fields(cell)
  complete, failed, began, seconds, shared = _complete(workdir, grid, directories), {}, {}, [], {}
  for name in complete:
    shared |= _models(grid[name], directories[name])
  waiting = [name for name in grid if name not in complete]
  LOG.info(f"grid of {len(grid)} cells, {len(complete)} of them complete")

  def next_task(running):
    if name := _next_cell(grid, waiting, running, shared):
      left = len(waiting) + len(running)
      about = f", about {sum(seconds) / len(seconds) * left / jobs / 60:.0f} minutes left" if seconds else ""
      LOG.info(f"cell {name}: {left} cells left{about}")
      _take_over(grid[name], directories[name], shared)
      waiting.remove(name)
      began[name] = time.monotonic()
      return name, grid[name], directories[name]

  with contextlib.closing(workers.outcomes(next_task, stages.run, jobs)) as outcomes:   # closing it ends its processes
    for name, error in outcomes:
      if error:                                        # for example the weak teacher of one seed
        LOG.error(f"cell {name} failed: {error}")
        failed[name] = error
        continue
      seconds.append(time.monotonic() - began[name])
      complete.add(name)
      _store(workdir, grid, directories, name)
      shared |= _models(grid[name], directories[name])
  if not complete:
    raise next(iter(failed.values()))
  _write_tables(workdir, directories, [name for name in grid if name in complete])
  if failed:
    LOG.error(f"{len(failed)} of {len(grid)} cells failed: {', '.join(failed)}. The same command tries them again")
  return FAILED_CODE if failed else 0


def _next_cell(grid, waiting, running, shared):
  """The first waiting cell that needs no model that a running cell is about to make; None if there is no such cell."""
  making = {_key(grid[name], model) for name in running for model in DEPENDS} - shared.keys()
  return next((name for name in waiting if making.isdisjoint(_key(grid[name], model) for model in DEPENDS)), None)


def _models(cell, directory):
  """{key of a model: its directory} of the models in a cell's directory that other cells may copy."""
  return {_key(cell, model): directory / "models" / model for model in DEPENDS
          if (directory / "models" / model).exists()}


def _complete(workdir, grid, directories):
  """Names of the cells that the store has and whose results exist.

  Raises:
    InputError: the store has one of these cells with another config.
  """
  out = set()
  for name, lines in _stored(workdir).items():
    if name in grid and (directories[name] / "results.json").exists():
      if changes := claims.changed_fields(grid[name], lines[0]["config"]):
        raise InputError(f"{workdir} has the cell {name} of another config ({changes[0]}): give another --workdir")
      out.add(name)
  return out


def _key(cell, model):
  """(model's name, JSON of the fields that it depends on). If two cells have equal keys, their models are equal."""
  names = ("seed", "task", *DEPENDS[model])
  if model == results.TEACHER and cell.teach.poison_rate:
    names += ("attack",)
  fields = {name: value for name, value in cell.to_dict().items() if name in names}
  return model, json.dumps(fields, sort_keys=True)


def _take_over(cell, directory, shared):
  """Copies into the cell's directory the models that an earlier cell has made with the same fields.

  shared: {key of a model: its directory} of the models in complete cells.
  """
  for model in DEPENDS:
    source, target = shared.get(_key(cell, model)), directory / "models" / model
    if source and processes.writes() and not target.exists():
      processes.copy_whole(source, target)
  processes.wait(f"models of {directory}")


def _stored(workdir) -> dict[str, list[dict[str, Any]]]:
  """{name of a cell: its lines of the store}."""
  file, out = workdir / STORE, {}
  if file.exists():
    for line in map(json.loads, file.read_text().splitlines()):
      out.setdefault(line["cell"], []).append(line)
  return out


def _store(workdir, grid, directories, new):
  """Rewrites the store with the rows of the cell `new`. This grid's cells come first, then cells of earlier grids."""
  lines = _stored(workdir)
  lines[new] = [{"cell": new, **row, "config": grid[new].to_dict()}
                for row in json.loads((directories[new] / "results.json").read_text())["rows"]]
  ordered = [name for name in (*grid, *(name for name in lines if name not in grid)) if name in lines]
  processes.write_text(workdir / STORE, "".join(json.dumps(line) + "\n" for name in ordered for line in lines[name]))


def _write_tables(workdir, directories, names):
  """Writes and logs the comparison of the complete cells."""
  runs = [compare.read(directories[name])._replace(name=name) for name in names]
  text, links = compare.text(runs), {name: f"cells/{name}/report.html" for name in names}
  page = overview.page_of(f"Grid of {len(names)} runs", compare.legend(runs), compare.groups(runs),
                          compare.sections(runs), links)
  for file, content in (("results.md", text + "\n"), ("rows.csv", compare.to_csv(runs)),
                        ("table.tex", compare.to_latex(runs)), ("report.html", page)):
    processes.write_text(workdir / file, content)
  LOG.info(f"\n{text}\n\n{workdir / 'report.html'}, results.md, rows.csv, table.tex; reports of cells are in "
           f"{workdir / 'cells'}")
