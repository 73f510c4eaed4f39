"""Finished runs side by side, from results written by hand."""

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from cli import ENV, ROOT

from w2s_jax import InputError, cli, compare
from w2s_jax.measure import metrics
from w2s_jax.report import overview, paired, tables


def row(model, seed, hits, asr_hits, n=200):
  return {"model": model, "directory": model, "attack": "bad_net", "dataset": "d", "seed": seed, "config_hash": "h",
          "target_label": 0, "ca": hits / n, "ca_n": n, "ca_ci": metrics.wilson(hits, n), "false_rate": 0.125,
          "asr": asr_hits / n, "asr_n": n, "asr_ci": metrics.wilson(asr_hits, n), "asr_floor": 0.0625}


def write(directory, rows, **config):
  directory.mkdir()
  meta = {"columns": ["directory", "ca", "ca_ci", "asr", "asr_ci", "asr_floor", "false_rate", "frr", "far"]}
  (directory / "results.json").write_text(json.dumps({"rows": rows, "meta": meta}))
  base = {"seed": rows[0]["seed"], "defend": {"seeds": [], "epochs": 3}, "student": {"path": ""}}
  (directory / "config.json").write_text(json.dumps(base | config))
  return directory


@pytest.fixture
def runs(tmp_path):
  """Two seeds of one config, and the first seed of another."""
  return [write(tmp_path / "a0", [row("lora_ce", 0, 180, 100), row("w2s", 0, 170, 40)]),
          write(tmp_path / "a1", [row("lora_ce", 1, 184, 120), row("w2s", 1, 176, 40)]),
          write(tmp_path / "b0", [row("lora_ce", 0, 180, 100), row("w2s", 0, 178, 30)],
                defend={"seeds": [], "epochs": 5})]


def test_runs_that_differ_in_seeds_alone_have_one_letter(runs):
  read = [compare.read(run) for run in runs]
  assert compare.letters(read) == ["A", "A", "B"]
  assert compare.legend(read) == [f"A = {runs[0]}, {runs[1]}", f"B = {runs[2]}: defend.epochs=5 (in A: 3)"]


def test_letters_do_not_end_at_z():
  many = [compare.Compared(str(i), 0, {"x": i}, [], ()) for i in range(28)]
  assert compare.letters(many)[24:] == ["Y", "Z", "A1", "B1"]


def test_every_row_is_in_the_first_table(runs):
  head, *lines = compare.all_rows([compare.read(run) for run in runs])
  assert head[:5] == ("run", "seed", "model", "trigger", "CA") and "FRR" not in head
  assert [line[:4] for line in lines] == [(letter, seed, model, "bad_net") for letter, seed in (("A", "0"), ("A", "1"),
                                          ("B", "0")) for model in ("lora_ce", "w2s")]
  assert lines[1][4:8] == ("0.850", "0.794-0.893", "0.200", "0.150-0.261")


def test_means_and_paired_differences_over_seeds(runs):
  """Differences of ASR are 0.2 - 0.5 and 0.2 - 0.6; the interval is Student's with one degree of freedom."""
  head, *lines = compare.means([compare.read(run) for run in runs])
  by_key = {line[:3]: dict(zip(head, line)) for line in lines}
  w2s = by_key["A", "bad_net", "w2s"]
  assert (w2s["seeds"], w2s["CA"], w2s["ASR"]) == ("2", "0.865 ± 0.021", "0.200 ± 0.000")
  low, high = scipy.stats.t.interval(0.95, 1, -0.35, np.std([-0.3, -0.4], ddof=1) / 2**0.5)
  assert w2s["ASR - lora_ce"] == f"-0.350 ({low:+.3f} to {high:+.3f})"
  assert by_key["A", "bad_net", "lora_ce"]["ASR - lora_ce"] == "-"
  assert by_key["B", "bad_net", "w2s"]["ASR"] == "0.150"                   # one seed has no deviation


def test_one_pair_has_newcombes_interval():
  """Newcombe's example: 56 of 70 and 48 of 80 differ by 0.2000, with an interval of 0.0524 to 0.3339 by method 10."""
  own, other = row("w2s", 0, 56, 56, 70), row("lora_ce", 0, 48, 48, 80)
  assert paired.difference([(own, other)], "asr") == "+0.200 (+0.052 to +0.334)"
  assert paired.difference([(own, other | {"asr": None})], "asr") == paired.difference([], "ca") == "-"


def test_differences_to_the_first_letter_pair_the_seeds(runs):
  read = [compare.read(run) for run in runs]
  _, *lines = compare.differences(read)
  assert [line[:4] for line in lines] == [("B", "bad_net", "lora_ce", "1"), ("B", "bad_net", "w2s", "1")]
  assert lines[0][5].startswith("+0.000 (-0.0") and lines[1][5].startswith("-0.050 (-0.1")
  assert compare.differences(read[:2]) == compare.differences(read[:1])    # the head alone


def test_a_text_has_the_tables_that_say_something(runs):
  read = [compare.read(run) for run in runs]
  assert "Mean ±" in compare.text(read) and "Differences to A" in compare.text(read)
  assert "Mean ±" not in compare.text(read[:1]) and "Differences to A" not in compare.text(read[:2])
  assert "Mean ±" not in compare.text([read[0], read[2]])


def test_a_suspects_triggers_have_rows_of_their_own(tmp_path):
  rows = [row("suspect", 0, 180, 190) | {"attack": t} for t in ("mn", "x | y")]
  head, *lines = compare.all_rows([compare.read(write(tmp_path / "s", rows))])
  assert [line[head.index("trigger")] for line in lines] == ["mn", "x \\| y"]


def test_the_csv_has_every_field(runs):
  lines = list(csv.DictReader(io.StringIO(compare.to_csv([compare.read(run) for run in runs]))))
  assert len(lines) == 6 and lines[1]["run"] == "A" and lines[1]["workdir"] == str(runs[0])
  assert (float(lines[1]["asr"]), lines[1]["frr"]) == (0.2, "")
  assert [float(x) for x in lines[1]["asr_ci"].split()] == pytest.approx(metrics.wilson(40, 200))


def test_copies_of_a_defense_in_one_run_count_as_one_seed(tmp_path):
  """Copies share the student, so two runs with two copies each count as two seeds, each with the mean of its copies."""
  both = [write(tmp_path / f"s{seed}", [row("lora_ce", seed, 180, 100)] + [
      row("w2s", copy, 180, hits) for copy, hits in zip((0, 1), all_hits)], seed=seed,
      defend={"seeds": [0, 1], "epochs": 3}, mesh={"data": seed - 1, "fsdp": 1, "tensor": 1})
      for seed, all_hits in ((0, (20, 40)), (1, (60, 80)))]
  read = [compare.read(run) for run in both]
  compare.check_different(read)
  assert compare.letters(read) == ["A", "A"]                               # the mesh changes no result
  head, *lines = compare.means(read)
  w2s = dict(zip(head, lines[1]))
  assert (w2s["seeds"], w2s["ASR"]) == ("2", "0.250 ± 0.141")
  other = write(tmp_path / "other", [row("w2s", copy, 180, 10) for copy in (0, 1)], seed=0, lora={"kind": "dora"},
                defend={"seeds": [0, 1], "epochs": 3})
  _, line = compare.differences([*read, compare.read(other)])
  assert line[3:] == ("1", "+0.000", "-0.100")             # seed 0 alone has a partner; means have no interval
  head, *lines = compare.means(read[:1])
  assert dict(zip(head, lines[1]))["ASR"] == "0.150 ± 0.071"               # in one run each copy is a seed


def test_a_field_that_an_older_run_lacks(tmp_path):
  old = write(tmp_path / "old", [row("w2s", 0, 180, 40)])
  new = write(tmp_path / "new", [row("w2s", 0, 180, 40)], lora={"kind": "lora"}, student={"path": "x"})
  lines = compare.legend([compare.read(run) for run in (old, new)])
  assert lines[1].endswith(": lora.kind=lora, student.path=x (in A: not set, empty)")


def test_a_trigger_with_a_bar_is_escaped_for_each_format(tmp_path):
  read = [compare.read(write(tmp_path / "s", [row("suspect", 0, 180, 190) | {"attack": "x |\n y"}]))]
  assert compare.means(read)[1][1] == "x | y" and "x $|$ y" in tables.latex(compare.means(read))
  assert "| x \\| y " in compare.text(read)


def test_a_setting_that_was_not_implanted_is_no_reference(runs):
  read = [compare.read(run) for run in runs]
  read = [read[0]._replace(implanted=False), read[1]._replace(implanted=False), read[2],
          read[2]._replace(fields={"x": 1}, name="c0")]
  assert compare.letters(read) == ["A", "A", "B", "C"]
  head, *lines = compare.differences(read)
  assert head[-1] == "ASR - ASR in B" and [line[0] for line in lines] == ["C", "C"]
  assert "Differences to B, with" in compare.text(read)
  lines = list(csv.DictReader(io.StringIO(compare.to_csv(read))))
  assert [line["implanted"] for line in lines[::2]] == ["False", "False", "True", "True"]


def test_latex_escapes_what_has_a_meaning_there():
  text = tables.latex([("model", "a_b"), ("50% & $x$", r"\cf{} ~^ 1 ± 2")])
  assert text.splitlines() == [
      r"\begin{tabular}{ll}", r"\toprule", r"model & a\_b \\", r"\midrule",
      r"50\% \& \$x\$ & \textbackslash{}cf\{\} \textasciitilde{}\textasciicircum{} 1 $\pm$ 2 \\", r"\bottomrule",
      r"\end{tabular}"]


@pytest.mark.parametrize("spoil, message", [
    (lambda run: (run / "results.json").unlink(), "has no results.json: give the --workdir of a finished run"),
    (lambda run: (run / "results.json").write_text("{"), "has no readable results of a run"),
    (lambda run: (run / "results.json").write_text("[]"), "has no readable results of a run"),
    (lambda run: (run / "config.json").write_text("3"), "has no readable results of a run")])
def test_what_is_not_a_finished_run(runs, spoil, message):
  spoil(runs[0])
  with pytest.raises(InputError, match=message) as e:
    compare.read(runs[0])
  assert "\n" not in str(e.value)


def test_one_run_twice_is_refused(runs):
  with pytest.raises(InputError, match="a0 and .*a0 have the same config and seed: leave one of them out"):
    compare.check_different([compare.read(run) for run in (runs[0], runs[1], runs[0])])


def test_both_commands_print_the_same_and_write_the_files(runs, tmp_path):
  files = [f"--csv={tmp_path / 'rows.csv'}", f"--latex={tmp_path / 'table.tex'}"]
  both = [subprocess.run([sys.executable, *program, *runs, *files], capture_output=True, text=True, cwd=tmp_path,
                         env=ENV | {"PYTHONPATH": str(ROOT)}, check=True).stdout
          for program in (("-m", "w2s_jax.compare"), ("-c", "from w2s_jax import cli; cli.main()", "compare"))]
  read = [compare.read(run) for run in runs]
  assert both[0] == both[1] == compare.text(read) + "\n"
  assert (tmp_path / "rows.csv").read_text() == compare.to_csv(read)
  latex = (tmp_path / "table.tex").read_text()
  assert latex == compare.to_latex(read) and latex.startswith(f"% A = {runs[0]}, {runs[1]}\n% B = {runs[2]}: defend")
  assert latex.count(r"\begin{tabular}") == 2 and "ASR - ASR in A" in latex


@pytest.mark.parametrize("arguments, message", [
    ([], "error: the following arguments are required: RUN (python -m w2s_jax.compare --help shows how)\n"),
    (["nowhere"], "error: nowhere has no results.json: give the --workdir of a finished run\n")])
def test_a_mistake_is_one_line(arguments, message, tmp_path):
  done = subprocess.run([sys.executable, "-m", "w2s_jax.compare", *arguments], capture_output=True, text=True,
                        cwd=tmp_path, env=ENV | {"PYTHONPATH": str(ROOT)})
  assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_the_console_command_explains_it():
  text = cli.parser()._subparsers._group_actions[0].choices["compare"].format_help()
  assert "w2s-jax compare runs/llama_badnet runs/three_shapes" in text and "--latex FILE" in text


def test_the_page_of_many_runs(runs):
  """Means by hand: ASR of w2s in A is (0.2 + 0.2) / 2, in B 0.15; CA in A is (0.85 + 0.88) / 2."""
  read = [compare.read(run) for run in runs]
  groups = compare.groups(read)
  del groups["B", "bad_net", "lora_ce"]
  text = overview.page_of("<grid>", compare.legend(read), groups, compare.sections(read),
                          {"a0": "cells/a0/report.html"})
  matrix, other = re.findall(r"mean over seeds</h2>.*?</table>", text, re.DOTALL)
  lines = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in re.findall("<tr>(.*?)</tr>", matrix)]
  assert lines == [["model", "A: bad_net", "B: bad_net"], ["lora_ce", "0.550", "-"], ["w2s", "0.200", "0.150"]]
  assert "rgb(224 122 95 / 0.55)'>0.550" in matrix and "<td>0.865</td>" in other and "rgb" not in other
  assert "&lt;grid&gt;" in text and "<grid>" not in text and "<a href='cells/a0/report.html'>a0</a>" in text
  for heading, lines in compare.sections(read).items():
    assert f"<h2>{heading}</h2>" in text and all(f"<td>{cell}</td>" in text for line in lines[1:] for cell in line)


def test_the_page_without_an_implanted_backdoor():
  assert "No backdoor was implanted" in overview.page_of("grid", [], {}, {}, {})
