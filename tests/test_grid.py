"""A grid of runs: its cells, what they share, and that nothing is done twice; most tests train nothing."""

import json
import random
import runpy

import pytest
from cli import ROOT, SHORT, w2s
from ml_collections import ConfigDict
from test_compare import row

from w2s_jax import InputError, grid, results, stages

COLUMNS = ["directory", "ca", "ca_ci", "asr", "asr_ci", "asr_floor", "false_rate"]


def offline(argument="attacks=badnet+suffix,seeds=2"):
  return runpy.run_path(str(ROOT / "configs/grid_offline.py"))["get_config"](argument)


def test_the_cells_are_all_combinations():
  cells = grid.cells(offline())
  assert list(cells) == ["badnet-0", "badnet-1", "suffix-0", "suffix-1"]
  assert [(c.attack.name, c.seed) for c in cells.values()] == [("badnet", 0), ("badnet", 1), ("suffix", 0),
                                                              ("suffix", 1)]
  alone = runpy.run_path(str(ROOT / "configs/llama_badnet.py"))["get_config"]()
  alone.defenses = cells["badnet-0"].defenses
  assert cells["badnet-0"].to_dict() == alone.to_dict()                   # the run that one would start alone


@pytest.mark.parametrize("axes, message", [
    ({"seed": {}}, "grid axis 'seed' has no values"),
    ({"rank": {"4": {"lora": {"rnk": 4}}}}, "grid axis 'rank', value '4': config has no field 'lora.rnk'"),
    ({"rank": {"4": {"lora": {"rank": "four"}}}}, "grid axis 'rank', value '4'")])
def test_mistakes_in_the_axes(axes, message):
  config = offline()
  config.grid = ConfigDict(axes)
  with pytest.raises(InputError, match=message):
    grid.cells(config)


def test_a_mistake_in_a_late_cell_stops_the_grid_before_the_first(tmp_path, monkeypatch):
  config = offline()
  config.grid.seed["1"] = {"defend": {"epochs": 0}}
  monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a cell ran"))
  with pytest.raises(InputError, match="defend.epochs is 0"):
    grid.run(config, tmp_path)


class Fake:
  """stages.run without training: makes the models that are missing, then the results; may be stopped at any step."""

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


def test_the_store_and_the_tables(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake())
  lines = [json.loads(line) for line in (tmp_path / grid.STORE).read_text().splitlines()]
  assert [(line["cell"], line["model"]) for line in lines] == [
      (cell, model) for cell in ("badnet-0", "badnet-1", "suffix-0", "suffix-1") for model in ("lora_ce", "w2s")]
  config = offline()
  assert lines[2]["config"] == json.loads(json.dumps(grid.cells(config)["badnet-1"].to_dict()))
  text = (tmp_path / "results.md").read_text()
  assert "- A = badnet-0, badnet-1\n- B = suffix-0, suffix-1: attack.name=suffix (in A: badnet)" in text
  assert "Mean ±" in text and (tmp_path / "table.tex").read_text().startswith("\\begin{tabular}")
  assert len((tmp_path / "rows.csv").read_text().splitlines()) == 9


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
    for name in (grid.STORE, "results.md", "rows.csv", "table.tex"):
      assert (workdir / name).read_text() == (tmp_path / "whole" / name).read_text()
  again = Fake()
  assert run(monkeypatch, workdir, again) == 0 and again.ran == []


def test_a_cell_that_diverges_does_not_cost_the_others(tmp_path, monkeypatch, caplog):
  fake = Fake()
  def diverges(config, workdir):
    if workdir.name == "suffix-0":
      raise FloatingPointError("the loss is not finite")
    return fake(config, workdir)
  caplog.set_level("INFO")
  assert run(monkeypatch, tmp_path, diverges) == grid.FAILED_CODE
  assert fake.ran == ["badnet-0", "badnet-1", "suffix-1"]
  assert "1 of 4 cells failed: suffix-0" in caplog.text
  assert run(monkeypatch, tmp_path, fake) == 0 and fake.ran[3:] == ["suffix-0"]


def test_another_grids_cells_are_not_mixed_in(tmp_path, monkeypatch):
  run(monkeypatch, tmp_path, Fake())
  config = offline()
  config.defend.epochs = 9
  with pytest.raises(InputError, match="was made by another config .defend.epochs was 4, is 9"):
    run(monkeypatch, tmp_path, Fake(), config)


def test_the_command(tmp_path):
  """A reduced grid through main: each cell is a run like any other, and a second start does nothing."""
  flags = ("--config=configs/grid_offline.py:attacks=badnet+suffix,seeds=1", "--config.defenses=none,lora_ce",
           f"--workdir={tmp_path / 'w'}", *SHORT)
  out = w2s(*flags)
  assert out.returncode == 0, out.stderr
  assert "grid of 2 cells, 0 of them complete" in out.stdout and "cell suffix-0: 1 cells left, about " in out.stdout
  lines = [json.loads(line) for line in (tmp_path / "w" / grid.STORE).read_text().splitlines()]
  assert [(x["cell"], x["model"]) for x in lines] == [(cell, model) for cell in ("badnet-0", "suffix-0")
                                                      for model in ("clean", "poisoned", "lora_ce")]
  assert (tmp_path / "w/cells/suffix-0/report.html").exists()
  again = w2s(*flags)
  assert again.returncode == 0 and "2 of them complete" in again.stdout and "steps in" not in again.stdout
  assert again.stdout.split("complete", 1)[1].strip().startswith("- A = badnet-0")
  wrong = w2s(*flags, "--stage=teach")
  assert wrong.returncode == 2 and "this config is a grid: leave out --stage" in wrong.stderr
