"""A grid of runs: its cells, what they share, and that nothing is done twice; most tests train nothing."""

import json
import random
import re
import runpy
import shutil

import pytest
from cli import CONFIG, ENV, ROOT, SHORT, w2s
from ml_collections import ConfigDict
from test_compare import row

from w2s_jax import InputError, checks, grid, results, stages

COLUMNS = ["directory", "ca", "ca_ci", "asr", "asr_ci", "asr_floor", "false_rate"]


def offline(argument="attacks=badnet+suffix,seeds=2"):
  return config_of("grid_offline", argument)


def config_of(name, argument=None):
  return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](argument)


def test_the_cells_are_all_combinations():
  cells = grid.cells(offline())
  assert list(cells) == ["badnet-0", "badnet-1", "suffix-0", "suffix-1"]
  assert [(c.attack.name, c.seed) for c in cells.values()] == [("badnet", 0), ("badnet", 1), ("suffix", 0),
                                                              ("suffix", 1)]
  alone = config_of("llama_badnet")
  alone.defenses = cells["badnet-0"].defenses
  assert cells["badnet-0"].to_dict() == alone.to_dict()                   # the config of a single run


def test_a_config_becomes_a_grid_over_seeds():
  cells = grid.cells(grid.over_seeds(config_of("llama_badnet"), ["3", "0"]))
  assert {name: cell.seed for name, cell in cells.items()} == {"0": 0, "3": 3}
  assert cells["0"].to_dict() == config_of("llama_badnet").to_dict()
  more = grid.cells(grid.over_seeds(offline("attacks=badnet+suffix,seeds=1"), ["7"]))
  assert {name: (cell.attack.name, cell.seed) for name, cell in more.items()} == {
      "badnet-7": ("badnet", 7), "suffix-7": ("suffix", 7)}
  for wrong in ("1-3", "0,0", "00", "-1", "\u0663", ""):
    with pytest.raises(InputError, match="want different whole numbers, such as --seeds=0,1,2"):
      grid.over_seeds(offline(), wrong.split(",") if wrong else [])
  with pytest.raises(InputError, match="grid axis 'seed': want"):
    grid.over_seeds(ConfigDict({"grid": {"seed": (0, 1)}}), ["7"])
  with pytest.raises(InputError, match="grid axes 'run' and 'seed' both change 'seed'"):
    grid.cells(grid.over_seeds(offline("attacks=badnet,seeds=2,triggers=random"), ["7"]))
  more = ConfigDict({"grid": {"seed": {"0": {"seed": 0, "attack": {"trigger": "mn"}}}}})
  with pytest.raises(InputError, match="the axis `seed` of this grid changes other fields, too"):
    grid.over_seeds(more, ["7"])


def test_random_triggers_are_of_the_attacks_kind_and_of_the_seed():
  argument = "attacks=badnet+insent+combination,seeds=6,triggers=random"
  cells = grid.cells(offline(argument))
  drawn = {attack: [cells[f"{attack}-{seed}"].attack.trigger for seed in range(6)]
           for attack in ("badnet", "insent", "combination")}
  assert [{len(t.split()) for t in triggers} for triggers in drawn.values()] == [{1}, {5}, {3}]
  assert all(len(set(triggers)) == 6 for triggers in drawn.values())
  assert {len(t) for t in drawn["badnet"]} <= {2, 3} and not set("aeiou") & set("".join(drawn["badnet"]))
  again = grid.cells(offline(argument))
  assert all(again[name].to_dict() == cell.to_dict() for name, cell in cells.items())
  assert (cells["insent-4"].attack.name, cells["insent-4"].seed) == ("insent", 4)
  for wrong in ("triggers=drawn", "attacks=suffix,triggers=random"):
    with pytest.raises(InputError, match=r"config argument triggers=\w+: want random, with attacks among badnet"):
      offline(wrong)


def test_the_cells_of_an_ablation_share_their_poisoned_students():
  cells = grid.cells(config_of("grid_ablation", "seeds=1"))
  for cell in cells.values():
    checks.check_fields(cell)
  of_badnet = {name: cell for name, cell in cells.items() if name.startswith("badnet-0-")}
  assert len(cells) == 2 * len(of_badnet) == 18
  assert len({grid._key(cell, "poisoned") for cell in of_badnet.values()}) == 1
  teachers = {name.removeprefix("badnet-0-"): grid._key(cell, "teacher") for name, cell in of_badnet.items()}
  assert {name for name, key in teachers.items() if key != teachers["main"]} == {
      "teacher_weaker", "teacher_as_large", "teacher_stronger"}
  assert of_badnet["badnet-0-fa_x10"].defense.w2s.weights == "1,1,0.1"
  assert "ce_adv" in of_badnet["badnet-0-main"].defenses


def test_the_grid_on_real_data():
  """With all rows the cells are the configs of a single attack. There may be four classes, but no unknown attack."""
  cells = grid.cells(config_of("grid_minilm", "data=d,rows=0,seeds=1"))
  for attack, name in (("badnet", "badnet"), ("insent", "insent"), ("syntactic", "synattack")):
    alone = config_of(f"minilm_{name}", "data=d")
    alone.defenses = cells[f"{attack}-0"].defenses
    assert cells[f"{attack}-0"].to_dict() == alone.to_dict()
  sentence = cells["sentence-0"].attack
  assert (sentence.label, sentence.trigger, sentence.poison_rate) == ("dirty", "my sister called me around noon", 0.05)
  four = config_of("grid_minilm", "data=d,attack=ag,defend=ag,labels=4,attacks=badnet,seeds=2")
  for cell in grid.cells(four).values():
    checks.check_fields(cell)
    assert (cell.data.attack_source, cell.data.num_labels, cell.data.max_length) == ("d/ag", 4, 64)
    assert (cell.data.attack_rows.train, cell.attack.poison_count) == (2000, 200)
  with pytest.raises(InputError, match=r"attacks: got 'nope', want names among badnet\+insent\+syntactic\+sentence"):
    config_of("grid_minilm", "data=d,attacks=badnet+nope")


@pytest.mark.parametrize("device", ["", ",device=cpu"])
def test_the_grid_of_smollm2(device):
  """The cells are the configs of a single attack, on either device. An unknown attack is refused."""
  cells = grid.cells(config_of("grid_smollm", f"data=d,seeds=1{device}"))
  for attack, name in (("badnet", "badnet"), ("insent", "insent"), ("syntactic", "synattack")):
    alone = config_of(f"smollm_{name}", f"data=d{device}")
    alone.defenses = cells[f"{attack}-0"].defenses
    assert cells[f"{attack}-0"].to_dict() == alone.to_dict()
    checks.check_fields(alone)
  with pytest.raises(InputError, match=r"attacks: got 'nope', want names among badnet\+insent\+syntactic"):
    config_of("grid_smollm", "data=d,attacks=nope")


@pytest.mark.parametrize("axes, message", [
    ({"seed": {}}, "grid axis 'seed' has no values"),
    ({"rank": {"4": {"lora": {"rnk": 4}}}}, "grid axis 'rank', value '4': config has no field 'lora.rnk'"),
    ({"rank": {"4": {"lora": {"rank": "four"}}}}, "grid axis 'rank', value '4'"),
    ({}, "the grid has no axes"), ({"rank": {"4": 4}}, "grid axis 'rank': want {value: {field"),
    ({"rank": (4, 64)}, "grid axis 'rank': want {value: {field"), ({"rank": {"": {}}}, "value '': want a string of"),
    ({"rank": {"/tmp/x": {}}}, "value '/tmp/x': want a string of"),
    ({"rank": {"..": {}}}, "value '..': want a string of"),
    ({"one": {"1": {"seed": 1}}, "two": {"2": {"seed": 2}}}, "grid axes 'one' and 'two' both change 'seed'"),
    ({"one": {"x": {}, "x-y": {}}, "two": {"y-z": {}, "z": {}}}, "two cells of the grid have the name 'x-y-z'")])
def test_mistakes_in_the_axes(axes, message):
  config = offline()
  config.grid = ConfigDict(axes, allow_dotted_keys=True)
  with pytest.raises(InputError, match=message):
    grid.cells(config)


def test_the_file_of_the_page_of_experiments(tmp_path):
  text, = re.findall(r'```text\n(""".*?)```', (ROOT / "docs/experiments.md").read_text(), re.S)
  (tmp_path / "grid_rank.py").write_text(text)
  cells = grid.cells(runpy.run_path(str(tmp_path / "grid_rank.py"))["get_config"]())
  assert [(c.lora.rank, c.lora.alpha, c.seed) for c in cells.values()] == [
      (rank, rank, seed) for rank in (4, 64) for seed in range(5)]
  assert len({grid._key(cell, results.POISONED) for cell in cells.values()}) == 5


def test_a_value_may_be_named_after_a_rate():
  config = offline()
  common = runpy.run_path(str(ROOT / "configs/common.py"))
  config.grid = common["grid"](rate={"0.05": {"attack": {"poison_rate": 0.05}}})
  assert {name: cell.attack.poison_rate for name, cell in grid.cells(config).items()} == {"0.05": 0.05}


def test_a_mistake_in_a_late_cell_stops_the_grid_before_the_first(tmp_path, monkeypatch):
  config = offline()
  config.grid.seed["1"] = {"defend": {"epochs": 0}}
  monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a cell ran"))
  with pytest.raises(InputError, match="defend.epochs is 0"):
    grid.run(config, tmp_path)


class Fake:
  """stages.run without training. Makes the missing models, then the results. `stop` runs before each and at the end."""

  def __init__(self, stop=lambda: None, implanted=True):
    self.ran, self.made, self.stop, self.implanted = [], [], stop, implanted

  def __call__(self, config, workdir):
    self.ran.append(workdir.name)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    for name in (results.BASE, results.CLEAN, results.POISONED, results.TEACHER):
      self.stop()
      if not (workdir / "models" / name).exists():
        (workdir / "models" / name).mkdir(parents=True)
        (workdir / "models" / name / "made").write_text(workdir.name)
        self.made.append((workdir.name, name))
    self.stop()
    hits = 10 * config.seed + len(config.attack.name)
    rows = [row(model, config.seed, 180, hits) | {"attack": config.attack.name} for model in ("lora_ce", "w2s")]
    (workdir / "results.json").write_text(json.dumps({"rows": rows, "meta": {"columns": COLUMNS,
                                                                             "implanted": self.implanted}}))
    self.stop()
    return 0


def run(monkeypatch, workdir, fake, config=None):
  monkeypatch.setattr(stages, "run", fake)
  return grid.run(config or offline(), workdir)


def test_cells_share_what_they_would_make_equally(tmp_path, monkeypatch):
  """The clean models of a seed do not depend on the attack; the poisoned one does."""
  fake = Fake()
  assert run(monkeypatch, tmp_path, fake) == 0
  whole = [results.BASE, results.CLEAN, results.POISONED, results.TEACHER]
  assert fake.made == [*((cell, name) for cell in ("badnet-0", "badnet-1") for name in whole),
                       ("suffix-0", results.POISONED), ("suffix-1", results.POISONED)]
  assert (tmp_path / "cells/suffix-1/models/clean/made").read_text() == "badnet-1"


def test_an_axis_of_the_defense_shares_the_poisoned_student(tmp_path, monkeypatch):
  config, fake = offline(), Fake()
  config.grid = ConfigDict({"rank": {"4": {"lora": {"rank": 4}}, "8": {"lora": {"rank": 8}}},
                            "teach": {"short": {"teach": {"epochs": 1}}, "long": {}}})
  run(monkeypatch, tmp_path, fake, config)
  assert [made for made in fake.made if made[0] != "4-long"] == [("4-short", results.TEACHER)]


def test_a_cell_waits_for_the_models_that_another_is_making():
  cells = grid.cells(offline())
  made = {grid._key(cells["badnet-0"], name): None for name in grid.DEPENDS}
  def following(running, made):
    return grid._next_cell(cells, [name for name in cells if name not in running], running, made)
  assert following([], {}) == "badnet-0" and following(["badnet-0"], {}) == "badnet-1"
  assert following(["badnet-0", "badnet-1"], {}) is None and following(["badnet-1"], made) == "badnet-0"
  assert following(["badnet-0", "badnet-1"], made) == "suffix-0"          # only its poisoned student is its own


def test_the_store_and_the_tables(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake())
  lines = [json.loads(line) for line in (tmp_path / grid.STORE).read_text().splitlines()]
  assert [(line["cell"], line["model"]) for line in lines] == [
      (cell, model) for cell in ("badnet-0", "badnet-1", "suffix-0", "suffix-1") for model in ("lora_ce", "w2s")]
  config = offline()
  assert lines[2]["config"] == json.loads(json.dumps(grid.cells(config)["badnet-1"].to_dict()))
  text = (tmp_path / "results.md").read_text()
  assert "- A = badnet-0, badnet-1\n- B = suffix-0, suffix-1: attack.name=suffix (in A: badnet)" in text
  assert "Mean ±" in text and (tmp_path / "table.tex").read_text().startswith("% A = badnet-0, badnet-1")
  assert len((tmp_path / "rows.csv").read_text().splitlines()) == 9
  page = (tmp_path / "report.html").read_text()
  assert "<h1>Grid of 4 runs</h1>" in page and "href='cells/suffix-1/report.html'" in page


def test_a_backdoor_that_was_not_implanted_is_in_no_mean(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake(implanted=False))
  text = (tmp_path / "results.md").read_text()
  assert "A = badnet-0 (not implanted), badnet-1 (not implanted)" in text and "Mean ±" not in text


def test_stopped_at_any_moment_it_goes_on_and_ends_the_same(tmp_path, monkeypatch):
  """Twenty random moments: no complete cell runs again, and the files are those of an uninterrupted grid."""
  run(monkeypatch, tmp_path / "whole", Fake())
  for moment in random.Random(0).sample(range(1, 24), 20):
    steps, workdir = iter(range(moment)), tmp_path / str(moment)
    def stop(steps=steps):
      if next(steps, None) is None:
        raise KeyboardInterrupt
    first = Fake(stop)
    with pytest.raises(KeyboardInterrupt):
      run(monkeypatch, workdir, first)
    complete = {line["cell"] for line in map(json.loads, (workdir / grid.STORE).read_text().splitlines())} if (
        workdir / grid.STORE).exists() else set()
    assert complete == set(first.ran[:-1])
    second = Fake()
    assert run(monkeypatch, workdir, second) == 0
    assert not complete & set(second.ran) and len(complete) + len(second.ran) == 4
    for name in (grid.STORE, "results.md", "rows.csv", "table.tex", "report.html"):
      assert (workdir / name).read_text() == (tmp_path / "whole" / name).read_text()
  again = Fake()
  assert run(monkeypatch, workdir, again) == 0 and again.ran == []


@pytest.mark.parametrize("error", [FloatingPointError("the loss is not finite"), InputError("the teacher is weak")])
def test_a_cell_that_fails_does_not_cost_the_others(error, tmp_path, monkeypatch, caplog):
  fake = Fake()
  def diverges(config, workdir):
    if workdir.name == "suffix-0":
      raise error
    return fake(config, workdir)
  caplog.set_level("INFO")
  assert run(monkeypatch, tmp_path, diverges) == grid.FAILED_CODE
  assert fake.ran == ["badnet-0", "badnet-1", "suffix-1"]
  assert "1 of 4 cells failed: suffix-0" in caplog.text
  assert run(monkeypatch, tmp_path, fake) == 0 and fake.ran[3:] == ["suffix-0"]


def test_a_mistake_in_every_cell_is_told_as_one(tmp_path, monkeypatch):
  def refuses(config, workdir):
    raise InputError(f"no data for {workdir.name}")
  with pytest.raises(InputError, match="no data for badnet-0"):
    run(monkeypatch, tmp_path, refuses)


def test_another_grids_cells_are_not_mixed_in(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake())
  config = offline()
  config.defend.epochs = 9
  with pytest.raises(InputError, match="has the cell badnet-0 of another config .defend.epochs was 4, is 9"):
    run(monkeypatch, tmp_path, Fake(), config)


def test_fields_that_a_run_chooses_itself_do_not_make_another_config(tmp_path, monkeypatch):
  """A run writes its config with the learning rates that it chose; the grid's own has 0 there."""
  config = offline()
  config.defend.learning_rate = 0.0
  fake = Fake()
  def chooses(cell, workdir):
    return fake(ConfigDict(cell.to_dict() | {"defend": cell.defend.to_dict() | {"learning_rate": 2e-3}}), workdir)
  assert run(monkeypatch, tmp_path, chooses, config) == 0
  again = Fake()
  assert run(monkeypatch, tmp_path, again, config) == 0 and again.ran == []


def test_more_seeds_later_and_a_cell_whose_directory_is_gone(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake(), offline("attacks=badnet+suffix,seeds=1"))
  shutil.rmtree(tmp_path / "cells/suffix-0")
  fake = Fake()
  run(monkeypatch, tmp_path, fake, offline("attacks=suffix,seeds=2"))
  assert fake.ran == ["suffix-0", "suffix-1"]
  cells = [json.loads(line)["cell"] for line in (tmp_path / grid.STORE).read_text().splitlines()]
  assert list(dict.fromkeys(cells)) == ["suffix-0", "suffix-1", "badnet-0"]


def test_the_command(tmp_path):
  """A reduced grid over --seeds through main: each cell is a run like any other, and a second start does nothing."""
  flags = ("--config=configs/grid_offline.py:attacks=badnet+suffix,seeds=1", "--config.defenses=none,lora_ce",
           "--seeds=3", "--jobs=2", f"--workdir={tmp_path / 'w'}", *SHORT)
  out = w2s(*flags)
  assert out.returncode == 0, out.stderr
  assert "grid of 2 cells, 0 of them complete" in out.stdout and "cell suffix-3: 1 cells left, about " in out.stdout
  lines = [json.loads(line) for line in (tmp_path / "w" / grid.STORE).read_text().splitlines()]
  assert [(x["cell"], x["model"]) for x in lines] == [(cell, model) for cell in ("badnet-3", "suffix-3")
                                                      for model in ("clean", "poisoned", "lora_ce")]
  assert (tmp_path / "w/cells/suffix-3/report.html").exists()
  logs = [(tmp_path / "w/cells" / name / "log.txt").read_text() for name in ("badnet-3", "suffix-3")]
  trained = [re.findall(r"^(\w+): \d+ steps in", log, re.MULTILINE) for log in logs]
  assert trained == [["warmup", "clean", "poison", "teacher", "lora_ce"], ["poison", "lora_ce"]]
  again = w2s(*flags)
  assert again.returncode == 0 and "2 of them complete" in again.stdout and "steps in" not in again.stdout
  assert again.stdout.split("complete", 1)[1].strip().startswith("- A = badnet-3")
  wrong = w2s(*flags, "--stage=teach")
  assert wrong.returncode == 2 and "this is a grid: leave out --stage" in wrong.stderr
  no_number = w2s(CONFIG, "--seeds=0,x", f"--workdir={tmp_path / 'x'}")
  assert no_number.returncode == 2 and "--seeds=0,x: want" in no_number.stderr and not (tmp_path / "x").exists()
  single = w2s(CONFIG, "--seeds=0", f"--workdir={tmp_path / 'w/cells/badnet-3'}")
  assert single.returncode == 2 and "is the workdir of a single run" in single.stderr
  alone = w2s(CONFIG, "--jobs=2", f"--workdir={tmp_path / 'alone'}")
  assert alone.returncode == 2 and "--jobs=2 is for a grid, and this config is one run" in alone.stderr


@pytest.mark.slow
def test_seeds_of_one_config(tmp_path):
  """--seeds makes a grid of a config that is a single run, by default in a workdir of its own."""
  out = w2s(CONFIG.replace("=", f"={ROOT}/"), "--seeds=0,1", "--config.defenses=none", *SHORT, cwd=tmp_path,
            env=ENV | {"PYTHONPATH": str(ROOT)})
  assert out.returncode == 0, out.stderr
  workdir = tmp_path / "runs/llama_badnet-seeds"
  seeds = [json.loads((workdir / f"cells/{seed}/config.json").read_text())["seed"] for seed in (0, 1)]
  rows = re.findall(r"^\| A +\| (\d) +\| (\w+)", (workdir / "results.md").read_text(), re.MULTILINE)
  assert seeds == [0, 1] and rows == [(seed, model) for seed in "01" for model in ("clean", "poisoned")]
