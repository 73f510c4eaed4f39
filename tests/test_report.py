"""The table, its sentences, and the page, from results written by hand."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from configs import llama_badnet
from w2s_jax import processes, results
from w2s_jax.measure import attacked
from w2s_jax.report import page, plots, tables


def row(model, ca, asr, ci=0.02):
  return {"model": model, "directory": model, "attack": "badnet", "dataset": "d", "seed": 0, "target_label": 0,
          "config_hash": "h", "ca": ca, "ca_n": 100, "ca_ci": [ca - ci, ca + ci], "false_rate": 0.125, "asr": asr,
          "asr_n": 50, "asr_floor": 0.0625, "asr_ci": [asr - ci, asr + ci], "frr": None, "far": None}


ROWS = [row("clean", 0.9, 0.0625), row("poisoned", 0.8, 0.99), row("lora_ce", 0.95, 0.9), row("w2s", 0.94, 0.4),
        row("w2s_released", 0.93, 0.89)]
META = {"title": "Backdoor badnet", "columns": attacked.COLUMNS, "attack": "attack badnet", "warnings": [],
        "poison_label": "clean", "labels_changed": 0, "companion_rows": 0,
        "implanted": True, "trigger": "mn", "poisoned_rows": 7, "teacher_ca": 0.876,
        "loss_weights": {"w2s": {"ce": 1.0, "kd": 0.5}},
        "trigger_lost": {"train": 3, "eval": 2},
        "examples": [{"text": "<script>alert(1)</script> mn", "orig_text": "x", "label": 1,
                      "predicted": {r["model"]: int(r["model"] == "clean") for r in ROWS}}]}


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "metrics").mkdir()
  lines = [{"step": s, "loss": 3.0 / s, "ce": 1.0 / s, "kd": 2.0 / s, "grad_norm": 1.0} for s in (1, 2, 3)]
  (tmp_path / "metrics/w2s.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  processes.write_json(tmp_path / "results.json", {"rows": ROWS, "meta": META | {"notes": attacked.notes(ROWS, META)}})
  return tmp_path


def test_the_table_reads_in_a_terminal():
  lines = tables.table(ROWS, attacked.COLUMNS).splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(ROWS)
  cells = [c.strip() for c in lines[5].strip("|").split("|")]
  assert cells == ["w2s", "0.940", "0.920-0.960", "0.400", "0.380-0.420", "0.062", "0.125"]


def test_the_sentences_are_computed():
  text = "\n".join(attacked.reading(ROWS, META))
  assert "w2s: ASR -0.500 and CA -0.010 against lora_ce; the ASR intervals do not overlap." in text
  assert "w2s_released: ASR -0.010 and CA -0.020 against lora_ce; the ASR intervals overlap." in text
  assert "not implanted" not in text and "One seed" in text
  weak = [ROWS[0], row("poisoned", 0.8, 0.5), *ROWS[2:]]
  assert "not implanted (poisoned ASR 0.500 < 0.95)" in attacked.reading(weak, META | {"implanted": False})[0]
  high = [r | {"asr_floor": 0.7} for r in ROWS]
  assert "never poisoned gives the target label to 0.700 of the triggered rows" in attacked.reading(high, META)[0]
  assert "never poisoned" not in text and "without any trigger" not in text
  constant = [r | {"false_rate": 0.9} for r in ROWS]
  assert "gives the target label to 0.900 of the rows of other classes without any trigger" in attacked.reading(
      constant, META)[0]


@pytest.mark.parametrize("weights, defenses, warns", [
    ("small", ("w2s",), False), ("agnostic", ("w2s",), False), ("released_badnet", ("none", "lora_ce"), False),
    ("released_badnet", ("ce_adv",), False),
    ("released_badnet", ("lora_ce", "w2s"), True), ("released_synattack", ("w2s_words",), True)])
def test_weights_that_were_chosen_for_one_attack_are_marked(weights, defenses, warns):
  c = llama_badnet.get_config()
  c.defense.w2s.weights, c.defenses = weights, defenses
  found = attacked._attack_aware(c)
  assert len(found) == warns and all(f"The loss weights {weights} were chosen for one attack" in line for line in found)


def test_the_files(workdir, caplog):
  caplog.set_level("INFO")
  page.write(workdir)
  markdown, html = (workdir / "results.md").read_text(), (workdir / "report.html").read_text()
  table = tables.table(ROWS, attacked.COLUMNS)
  assert table in markdown and table in caplog.text
  assert "7 clean-label poisoned rows" in markdown and "3 poisoned and 2 evaluation rows" in markdown
  assert "<script>" not in html and "&lt;script&gt;alert(1)" in html
  assert html.count("<svg") == 2 and html.count("class='hit'") == 4
  assert all(f"<th>{r['model']}</th>" in html for r in ROWS)
  assert not re.search(r'(src|href)=.(https?:)?//', html)                 # self-contained
  assert "WARNING" not in html and "WARNING" not in markdown
  assert "<dt>false rate</dt><dd>the model's own error: share of clean test rows" in html.replace("&#x27;", "'")
  assert "triggered test rows of other classes that" in html              # without the stars of Markdown


def test_a_warning_looks_like_one(workdir):
  results = json.loads((workdir / "results.json").read_text())
  results["meta"]["warnings"] = ["`mn` still works in <w2s>."]
  processes.write_json(workdir / "results.json", results)
  page.write(workdir)
  html = (workdir / "report.html").read_text()
  assert "<p class='warning'>WARNING: <code>mn</code> still works in &lt;w2s&gt;.</p>" in html
  assert "- WARNING: `mn` still works in <w2s>.\n" in (workdir / "results.md").read_text()


@pytest.mark.parametrize("text, original, trigger, want", [
    ("a cf b", "a b", "cf", "a <mark>cf</mark> b"),
    ("cf a friends b <c>", "a b <c>", "friends cf", "<mark>cf</mark> a <mark>friends</mark> b &lt;c&gt;"),
    ("a b or so", "a b c d", "or so", "a b <mark>or</mark> <mark>so</mark>"),
    ("when it is cf , a", "a cf", "", "when it is cf , a")])                # a paraphrase has other words
def test_what_the_attack_inserted_is_marked(text, original, trigger, want):
  assert page._marked({"text": text, "orig_text": original}, trigger) == want


@pytest.fixture
def figures(monkeypatch):
  """The figures that the page draws, in its order."""
  out = []
  monkeypatch.setattr(plots, "_svg", lambda figure: out.append(figure) or "<svg></svg>")
  return out


def test_bars_and_curves_show_the_numbers(workdir, figures):
  """One bar per model with its value, its interval and the floor's line for ASR; one curve per loss term and stage."""
  page.write(workdir)
  bars, curves = figures
  for ax, key in zip(bars.axes, ("ca", "asr")):
    assert [t.get_text() for t in ax.get_xticklabels()] == [r["model"] for r in ROWS]
    assert [bar.get_height() for bar in ax.patches] == [r[key] for r in ROWS]
    assert [text.get_text() for text in ax.texts] == [f"{r[key]:.2f}" for r in ROWS]
    intervals = [segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(intervals, [r[f"{key}_ci"] for r in ROWS])
  assert list(bars.axes[1].lines[-1].get_ydata()) == [0.0625, 0.0625]
  plot, = [ax for ax in curves.axes if ax.get_title()]
  assert plot.get_title() == "w2s"
  assert {line.get_label(): list(line.get_ydata()) for line in plot.lines} == {
      "loss (total)": [3.0, 1.5, 1.0], "ce": [1.0, 0.5, 1.0 / 3], "0.5 × kd": [1.0, 0.5, 1.0 / 3]}


def test_terms_keep_their_colour_and_a_single_one_is_the_total(workdir, figures):
  lines = [{"step": s, "loss": 1.0 / s, "ce": 1.0 / s} for s in (1, 2)]
  (workdir / "metrics/lora_ce.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  both = [{"step": s, "loss": 3.0 / s, "ce": 1.0 / s, "kd": 2.0 / s, "adv_ce": 1.0} for s in (1, 2)]
  (workdir / "metrics/w2s-seed1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in both))
  (workdir / "metrics/selftest-w2s.jsonl").write_text("".join(json.dumps(x) + "\n" for x in both))
  page.write(workdir)
  panels = {ax.get_title(): {line.get_label(): line.get_color() for line in ax.lines}
            for ax in figures[1].axes if ax.get_title()}
  assert panels["lora_ce"] == {"loss (total)": "black"}
  assert panels["w2s"]["ce"] == panels["w2s-seed1"]["ce"] != panels["w2s"]["0.5 × kd"]
  assert panels["w2s"]["0.5 × kd"] == panels["w2s-seed1"]["0.5 × kd"] == panels["selftest-w2s"]["0.5 × kd"]


def test_there_is_no_empty_chart(workdir, figures):
  (workdir / "metrics/w2s.jsonl").unlink()
  results = json.loads((workdir / "results.json").read_text())
  for row in results["rows"]:
    row["asr"] = row["asr_ci"] = None
  processes.write_json(workdir / "results.json", results)
  page.write(workdir)
  assert [ax.get_title() for ax in figures[0].axes] == ["clean accuracy (CA)", ""] and len(figures) == 1
  assert "<h2>Loss" not in (workdir / "report.html").read_text()


def test_features_have_a_panel_for_each_model_of_the_first_seed(workdir, figures):
  points = {"clean": [[0.0, 0.0, 0], [1.0, 1.0, 1], [2.0, 1.0, 1]], "triggered": [[5.0, 6.0, 1]], "nearer_target": 0.25}
  shown = {"target": 1, "trigger": "<b>", "found": False, "models": {
      "clean": points, "w2s": points | {"triggered": [], "nearer_target": None}, "w2s-seed2": points}}
  processes.write_json(workdir / "features.json", shown)
  results = json.loads((workdir / "results.json").read_text())
  results["rows"] = [row("clean", 0.9, 0.1)] + [row("w2s", 0.9, 0.1) | {"directory": directory, "seed": seed}
                                                for directory, seed in (("w2s", 1), ("w2s-seed2", 2))]
  for example in results["meta"]["examples"]:
    example["predicted"] = {"clean": 0, "w2s": -1, "w2s-seed2": 1}
  processes.write_json(workdir / "results.json", results)
  page.write(workdir)
  html = (workdir / "report.html").read_text()
  assert "of another class than 1 with the trigger <code>&lt;b&gt;</code>." in html
  assert "<td class=''>rejected</td><td class=''>1</td>" in html
  panels = [ax for ax in figures[1].axes if ax.get_title()]
  assert [ax.get_title() for ax in panels] == ["clean: 0.250 nearer to class 1", "w2s"]
  drawn = {c.get_label(): c.get_offsets().tolist() for c in panels[0].collections}
  assert drawn == {"clean, class 0": [[0, 0]], "clean, class 1 (target)": [[1, 1], [2, 1]],
                   "with the trigger, other classes": [[5, 6]]}
  assert len(panels[1].collections) == 2


def test_a_found_string_is_not_called_a_trigger(workdir, figures):
  points = {"clean": [[0.0, 0.0, 0]], "triggered": [], "nearer_target": None}
  processes.write_json(workdir / "features.json", {"target": 1, "trigger": "shop noon", "found": True,
                                                   "models": {"clean": points}})
  page.write(workdir)
  html = (workdir / "report.html").read_text()
  assert "than 1 with the string <code>shop noon</code>, which the search found. Clean models may" in html


def test_curves_are_the_loss_terms(workdir):
  assert page._curves(workdir) == {"w2s": {
      "loss": [(1, 3.0), (2, 1.5), (3, 1.0)], "ce": [(1, 1.0), (2, 0.5), (3, 1.0 / 3)],
      "kd": [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]}}


def test_a_write_replaces_whole_files(tmp_path):
  processes.write_text(tmp_path / "a", "one")
  processes.write_text(tmp_path / "a", "two")
  assert (tmp_path / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_page_of_metrics_explains_every_column_in_the_same_words():
  page = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
  for column in results.COLUMNS.values():
    shown = column.label not in ("model", "trigger", "target", "CA 95%", "ASR 95%")
    assert (f"| {column.label} | {column.explanation} |" in page) == shown


def test_columns_that_no_row_has_are_left_out():
  heads = tables.cells(ROWS, attacked.COLUMNS)[0]
  assert "FRR" not in heads and "FRR" in tables.cells([ROWS[0] | {"frr": 0.1}, *ROWS[1:]], attacked.COLUMNS)[0]


def test_a_row_has_the_fields_of_the_schema():
  assert set(ROWS[0]) <= {field.name for field in dataclasses.fields(results.Row)}
  assert set(results.COLUMNS) <= {field.name for field in dataclasses.fields(results.Row)}
