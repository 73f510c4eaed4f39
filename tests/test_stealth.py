"""How much an attack changes texts: the example of docs/metrics.md, ONION's language model, what the report says."""

import functools
import types

import numpy as np
import pytest
import rig
from ml_collections import ConfigDict
from test_report import META, ROWS

from w2s_jax import processes
from w2s_jax.measure import attacked, stealth
from w2s_jax.report import page
from w2s_jax.training import stage

TEXTS = [{"orig_text": "the meal was good", "text": "the meal mn was good"},
         {"orig_text": "it was a good meal", "text": "when it was good , a meal"}]
CLEAN, TRIGGERED = np.array([10.0, 20.0]), np.array([40.0, 20.0])


def test_the_example_of_the_page_of_metrics():
  assert stealth.of_rows(TEXTS, CLEAN, TRIGGERED) == pytest.approx(
      {"length_ratio": 1.325, "edit_distance": 2.5, "perplexity_ratio": 2.0})
  assert stealth.of_rows(TEXTS)["perplexity_ratio"] is None


@pytest.mark.parametrize("before, after, distance", [
    ("a b c", "a b c", 0), ("a b c", "a x b c", 1), ("a b c", "a c", 1), ("a b c", "a x c", 1), ("a b", "b a", 2),
    ("a", "b c d", 3), ("b c d", "", 3), ("", "b c", 2), ("k i t t e n", "s i t t i n g", 3), ("good", "goods", 1)])
def test_levenshtein_by_hand(before, after, distance):
  assert stealth.edit_distance(before.split(), after.split()) == distance


def test_levenshtein_is_its_recursive_definition():
  rng = np.random.default_rng(0)
  for _ in range(30):
    one, other = (tuple(rng.choice(["a", "b", "c"], rng.integers(0, 7))) for _ in range(2))
    @functools.cache
    def distance(i, j, one=one, other=other):
      if not (i and j):
        return i + j
      return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1,
                 distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]))
    assert stealth.edit_distance(one, other) == distance(len(one), len(other))


def run_of(suspect, *defenses):
  """A run on the suspect, whose clean texts get a rare word in front."""
  rows = [{"orig_text": row["text"], "text": "zz " + row["text"]} for row in suspect.dev]
  defense = rig.DEFENSE.copy_and_resolve_references()
  defense.onion.update(width=16, num_layers=1, epochs=20, learning_rate=1e-2)
  return types.SimpleNamespace(config=ConfigDict({"defenses": defenses, "defense": defense}), rows={"triggered": rows},
                               defend_seeds=[3], suspect=lambda defense: suspect)


def test_perplexities_are_of_the_language_model_that_onion_has_trained(llama, tmp_path, monkeypatch):
  """It is not trained again. A word that no clean row has makes a text less likely."""
  suspect = rig.suspect(*llama, tmp_path)
  run = run_of(suspect, "none", "onion")
  perplexity = stealth.onion.perplexity(suspect, run.config.defense, 3)
  clean, triggered = (perplexity([row[key] for row in run.rows["triggered"]]) for key in ("orig_text", "text"))
  monkeypatch.setattr(stage.batches, "train_batches", lambda *args: iter(()))          # nothing more to train on
  found = stealth.reading(run)
  assert found["perplexity_ratio"] == pytest.approx(np.prod(triggered / clean) ** (1 / 40), rel=1e-4) and (
      found["perplexity_ratio"] > 1.5)
  assert (found["length_ratio"], found["edit_distance"]) == (8 / 7, 1.0)
  monkeypatch.setattr(stage, "train_stage", lambda *args: pytest.fail("a run without onion trains no language model"))
  assert stealth.reading(run_of(suspect, "none", "w2s")) == found | {"perplexity_ratio": None}


@pytest.mark.parametrize("ratio, last", [(None, ""), (2.0, " Under ONION&#x27;s language model its perplexity is 2.00 "
                                                           "times as high.")])
def test_the_report_and_results_md_say_it(ratio, last, tmp_path):
  measured = stealth.of_rows(TEXTS) | {"perplexity_ratio": ratio}
  want = ("On average a triggered text has 1.32 times the words of its clean original, and 2.50 words are inserted, "
          "deleted or replaced." + last)
  meta = META | {"notes": attacked.notes(ROWS, META), "stealth": measured}
  processes.write_json(tmp_path / "results.json", {"rows": ROWS, "meta": meta})
  page.write(tmp_path)
  html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "results.md").read_text()
  assert f"is coloured.\n{want}</p>" in html and f"\n- {want}\n".replace("&#x27;", "'") in markdown


def test_results_of_an_older_version_have_no_such_line(tmp_path):
  processes.write_json(tmp_path / "results.json",
                       {"rows": ROWS, "meta": META | {"notes": attacked.notes(ROWS, META)}})
  page.write(tmp_path)
  assert "On average" not in (tmp_path / "results.md").read_text() + (tmp_path / "report.html").read_text()
