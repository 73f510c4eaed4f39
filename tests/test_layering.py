"""The order of the packages (docs/design.md), read off the import statements."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "w2s_jax"
# From top to bottom. A "room" is a package or module directly in w2s_jax. It imports only from rooms in lower layers,
# or to its right in its own layer.
LAYERS = (("main", "plan", "grid", "compare", "command", "stages"), ("run", "source", "checks", "claims", "planning"),
          ("measure", "report", "defenses"), ("training", "lora"),
          ("models", "adapters", "tasks", "data", "attacks"),
          ("quantized", "losses", "sharding", "workers", "processes", "results", "config", "arguments"))
CONSOLE = "cli"                                              # above all others, as it calls the three programs
ORDER = tuple(room for layer in LAYERS for room in layer)
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300                                              # of a file
MAX_FUNCTION_LINES, MAX_ARGUMENTS = 60, 9


def name_of(file):
  return str(file.relative_to(PACKAGE))


def room_of(file):
  return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source, package):
  """Every dotted name that is imported anywhere in the source, inside functions too; "a.b" for `from a import b`.

  Args:
    source: Python text.
    package: list of the names of the packages it lies in, for relative imports.
  """
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      above = package[:len(package) - node.level + 1] if node.level else []
      base = ".".join(above + ([node.module] if node.module else []))
      yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(file):
  return set(imports(file.read_text(), ["w2s_jax", *file.relative_to(PACKAGE).parts[:-1]]))


def rooms_imported(file):
  return {parts[1] for name in imports_of(file) if (parts := name.split("."))[0] == "w2s_jax" and len(parts) > 1
          and parts[1] != "InputError"}


def test_the_parser_sees_every_form():
  source = ("import optax, w2s_jax.train\nfrom w2s_jax import lora, InputError\ndef f():\n"
            "  from w2s_jax.data import grammar\n  from . import steps\n  from ..optim import linear_schedule\n")
  assert set(imports(source, ["w2s_jax", "models"])) == {
      "optax", "w2s_jax.train", "w2s_jax.lora", "w2s_jax.InputError", "w2s_jax.data.grammar", "w2s_jax.models.steps",
      "w2s_jax.optim.linear_schedule"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_only_from_rooms_below(file):
  room, used = room_of(file), rooms_imported(file)
  if room == "__init__":
    assert not used
    return
  if room == CONSOLE:
    assert used == {"main", "plan", "command", "compare", "arguments"}
    return
  assert room in ORDER, f"{room} has no place in the order"
  assert not used - set(ORDER), f"imports what has no place in the order: {sorted(used - set(ORDER))}"
  below = {room, *ORDER[ORDER.index(room) + 1:]}              # files of one room may see each other
  assert used <= below, f"{room} imports from above: {sorted(used - below)}"


@pytest.mark.parametrize("room", ["losses", "attacks"])
def test_losses_and_attacks_import_nothing_of_ours(room):
  for file in (f for f in FILES if room_of(f) == room):
    ours = {name for name in imports_of(file) if name.split(".")[0] == "w2s_jax"}
    assert not {name for name in ours if not name.startswith(f"w2s_jax.{room}")}, name_of(file)


def test_models_know_nothing_of_optax_and_only_they_of_flax_modules():
  for file in FILES:
    used = {name.split(".")[0] for name in imports_of(file)}
    assert not (room_of(file) == "models" and "optax" in used), name_of(file)
    linen = {name for name in imports_of(file) if name.startswith(("flax.linen", "flax.nnx"))}
    assert not linen or room_of(file) == "models" and not any("nnx" in name for name in linen), name_of(file)


def test_configs_are_not_imported():
  for file in FILES:
    assert not {name for name in imports_of(file) if name.split(".")[0] == "configs"}, name_of(file)


def test_flags_are_read_only_in_main_plan_and_command():
  flags = ("absl.flags", "absl.app", "ml_collections.config_flags")
  for file in FILES:
    used = {name for name in imports_of(file) if name.startswith(flags)}
    assert not used or room_of(file) in ("main", "plan", "command"), name_of(file)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short_and_named_for_what_they_hold(file):
  assert len(file.read_text().splitlines()) <= MAX_LINES
  assert not re.fullmatch(r"(utils?|helpers?|misc|common)\.py", file.name)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_short_and_take_few_arguments(file):
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
      assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
      assert len([name for name in names if name not in ("self", "cls")]) <= MAX_ARGUMENTS, node.name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_functions_and_methods_say_their_types(file):
  tree = ast.parse(file.read_text())
  owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
  for node in (node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)):
    args = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
    bare = [arg.arg for arg in args if arg and arg.arg not in ("self", "cls") and arg.annotation is None]
    assert node.name.startswith("_") or node.returns and not bare, f"{node.name}: {', '.join(bare) or 'its return'}"
