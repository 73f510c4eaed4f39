"""The console command: its flags, its error messages, and that the installed command does what main does."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
from cli import ENV, ROOT
from test_readme import COMMANDS, MAIN

from w2s_jax import InputError, cli, command, results
from w2s_jax.data import grammar, tokenization
from w2s_jax.models import Model, config_from_hf, save_pretrained
from w2s_jax.models.padding import with_padding_token

CLEAN = f"--config={ROOT}/configs/clean_checkpoint.py"
BADNET = f"--config={ROOT}/configs/llama_badnet.py"


@pytest.mark.parametrize("typed, made", [
    ("clean d --data f", [CLEAN, "--config.student.path=d", "--config.data.train=f"]),
    ("clean d --data f --test t --teacher e --base b --triggers mn,cf --defense w2s,none --out o --seed 3 --debug "
     "--set lora.rank=4 scan.steps=0 --set data.text_column=a=b",
     [CLEAN, "--config.student.path=d", "--config.data.train=f", "--config.data.test=t", "--config.teacher.path=e",
      "--config.student.base=b", "--config.probe.triggers=mn,cf", "--config.defenses=w2s,none", "--workdir=o",
      "--config.seed=3", "--debug", "--config.lora.rank=4", "--config.scan.steps=0",
      "--config.data.text_column=a=b"]),
    ("scan d --data f --out o", [CLEAN, "--config.student.path=d", "--config.data.train=f", "--workdir=o",
                                 "--stage=scan"]),
    ("scan d --data f --base b", [CLEAN, "--config.student.path=d", "--config.data.train=f",
                                  "--config.student.base=b", "--stage=search"]),
    ("run llama_badnet", [BADNET]),
    ("run llama_badnet --seeds 0,1 --jobs 2", [BADNET, "--seeds=0,1", "--jobs=2"]),
    ("run llama_badnet:scale=8b,data=x:y lora.rank=4 --out o seed=1 --stage poison mesh.data=-1",
     [f"{BADNET}:scale=8b,data=x:y", "--workdir=o", "--stage=poison", "--config.lora.rank=4", "--config.seed=1",
      "--config.mesh.data=-1"]),
    ("plan llama_badnet:scale=8b --topology v5e:4x4 --mesh 1,16,1 --search --json lora.quantize=int8",
     [f"{BADNET}:scale=8b", "--topology=v5e:4x4", "--mesh=1,16,1", "--search", "--json",
      "--config.lora.quantize=int8"]),
    ("fields", [CLEAN]), ("fields llama_badnet", [BADNET])])
def test_the_flags_of_a_command(typed, made):
  name, file, argv = cli.flags(typed.split())
  assert name == typed.split()[0] and argv[0].startswith(f"--config={file}")
  assert argv[0] == made[0] and sorted(argv) == sorted(made) and len(set(argv)) == len(argv)


@pytest.mark.parametrize("typed, message", [
    ("clean", r"required: DIR, --data \(w2s-jax clean --help shows how\)"),
    ("clean d", "required: --data"),
    ("scan d --data", "argument --data: expected one argument"),
    ("clen d", "invalid choice: 'clen'"),
    ("--debug", "required: COMMAND"),
    ("clean d --data f more", "unexpected argument 'more': write a field as --set FIELD=VALUE"),
    ("clean d --data f lora.rank=4", "unexpected argument 'lora.rank=4': write a field as --set FIELD=VALUE"),
    ("clean d --data f --set lora.rank", "unexpected argument 'lora.rank': write a field as --set FIELD=VALUE"),
    ("clean d --data f --tri mn", "unexpected argument '--tri'"),
    ("clean d --data f --config.seed=1", "unexpected argument '--config.seed=1': write a field as --set FIELD=VALUE"),
    ("run llama_badnet --config.seed=1", "unexpected argument '--config.seed=1': write a field as FIELD=VALUE"),
    ("run llama_badnet seed", "unexpected argument 'seed': write a field as FIELD=VALUE"),
    ("plan llama_badnet --out o", "unexpected argument '--out'"),
    ("fields llama_badnet seed=1", "unexpected argument 'seed=1': w2s-jax fields --help"),
    ("run llama_badnte", "there is no config 'llama_badnte': did you mean llama_badnet or "),
    ("run configs/llama_badnt.py:scale=8b", "'configs/llama_badnt.py': did you mean llama_badnet or "),
    ("run common", "there is no config 'common': want FILE.py or one of clean_checkpoint, grid_ablation, "),
    ("run zzz.py", "there is no config 'zzz.py': want FILE.py or one of")])
def test_mistakes_in_the_arguments(typed, message):
  with pytest.raises(InputError, match=message) as e:
    cli.flags(typed.split())
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("given, command, said", [
    ("give one (--config.student.path=DIR, --config.teacher.path=DIR)", "clean", "give one (DIR, --teacher=DIR)"),
    ("set --config.student.path to another", "scan", "set DIR to another"),
    ("no rows: --config.data.train.", "clean", "no rows: --data."),
    ("give another --workdir", "clean", "give another --out"),
    ("--config.probe.triggers=mn,cf or --config.probe.triggers_n=1", "clean",
     "--triggers=mn,cf or --set probe.triggers_n=1"),
    ("set --config.lora.rank or --config.seed", "clean", "set lora.rank or --seed (with --set FIELD=VALUE)"),
    ("--config.seed=u: --config.lora.quantize=int8", "run", "seed=u: lora.quantize=int8"),
    ("give another --workdir, without --stage", "run", "give another --out, without --stage"),
    ("no field 'x': --help lists the fields", "plan", "no field 'x': `w2s-jax fields` lists them")])
def test_a_mistake_is_told_in_the_commands_own_words(given, command, said):
  assert cli.in_console_words(given, command) == said


def test_what_help_names_is_what_the_programs_have():
  from w2s_jax import plan  # noqa: F401  its flags are what is compared
  commands = cli.parser()._subparsers._group_actions[0].choices
  options = {name: {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
             for name, parser in commands.items()}
  own = {f"--{flag.name}" for flag in command.FLAGS.flags_by_module_dict()["w2s_jax.plan"]}
  assert options["plan"] == own | {"--debug"} and options["clean"] == options["scan"]
  text = " ".join(commands["run"].format_help().split())
  assert all(f"{stage}" in text.split("run this stage alone")[1] for stage in results.STAGES)
  given = runpy.run_path(str(ROOT / "configs/clean_checkpoint.py"))["get_config"]()
  command.check_fields(list(cli.FLAGS.values()), given)
  text = " ".join(commands["clean"].format_help().split())
  assert f"{','.join(given.defenses)} by default" in text and f"random stream; {given.seed} by default" in text


def test_a_name_is_ours_and_a_file_is_the_users(tmp_path, monkeypatch):
  """This holds whatever is in the current directory."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "llama_badnet").mkdir()
  (tmp_path / "llama_badnet.py").touch()
  assert cli.find_config("llama_badnet:a=1") == (ROOT / "configs/llama_badnet.py", ":a=1")
  file, argument = cli.find_config("llama_badnet.py")
  assert file.samefile(tmp_path / "llama_badnet.py") and argument == ""


@pytest.mark.parametrize("folder, common", [("configs", "{folder}/common.py"), ("mine", f"{ROOT}/configs/common.py")])
def test_what_a_config_file_imports_from_configs(folder, common, tmp_path):
  """A file in a directory `configs` finds that directory first. Any other file finds the package's configs."""
  folder = tmp_path / folder
  folder.mkdir()
  (folder / "common.py").touch()
  code = ("import sys, pathlib, importlib.util; from w2s_jax import cli; cli.offer_configs(pathlib.Path(sys.argv[1]))\n"
          "for name in ('common', 'llama_insent'): print(importlib.util.find_spec(f'configs.{name}').origin)")
  out = subprocess.run([sys.executable, "-c", code, folder / "new.py"], cwd=tmp_path, text=True, check=True,
                       env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True)
  assert out.stdout.split() == [common.format(folder=folder), f"{ROOT}/configs/llama_insent.py"]


def test_readme_has_each_console_command_in_the_old_form_too():
  """Both give the same flags."""
  old = [sorted(shlex.split(line)[3:]) for line in MAIN]
  for line in (line for line in COMMANDS if line.startswith("w2s-jax ")):
    flags = cli.flags(shlex.split(line)[1:])[2]
    assert sorted(flag.replace(f"={ROOT}/", "=") for flag in flags) in old, line


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """(run, home): run(*args, module=None, cwd=home / "empty") -> CompletedProcess of the command as pip installs it.

  module: the module to run instead of the command. home: the directory of the installation, outside the checkout.
  """
  home = tmp_path_factory.mktemp("console")
  for name in ("w2s_jax", "configs"):
    shutil.copytree(ROOT / name, home / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, home / "source")
  subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
                  f"--target={home / 'site'}", "."], cwd=home / "source", env=ENV, check=True, capture_output=True)
  shutil.rmtree(home / "source")
  (home / "empty").mkdir()
  env = ENV | {"PYTHONPATH": str(home / "site")}
  def run(*args, module=None, cwd=home / "empty"):
    program = [sys.executable, "-m", module] if module else [home / "site/bin/w2s-jax"]
    return subprocess.run([*program, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=2400)
  return run, home


def test_an_installed_command_helps_without_jax(installed):
  run, home = installed
  for args, has in (((), "clean "), (("--help",), "clean "), (("clean", "--help"), "--data FILE"),
                    (("run", "--help"), "llama_badnet"), (("plan", "--help"), "--topology CHIP:SHAPE")):
    out = run(*args)
    assert (out.returncode, out.stderr) == (0, "") and out.stdout.startswith("usage: w2s-jax") and has in out.stdout
    assert max(map(len, out.stdout.splitlines())) <= 120
  code = ("import sys; from w2s_jax import cli\nsys.argv = ['w2s-jax', 'clean', '--help']\ntry: cli.main()\n"
          "finally: print('loaded:', *{'jax', 'absl', 'numpy'} & set(sys.modules))")
  out = subprocess.run([sys.executable, "-c", code], cwd=home, env=ENV | {"PYTHONPATH": str(home / "site")},
                       capture_output=True, text=True)
  assert out.stdout.splitlines()[-1] == "loaded:", out.stderr


def test_what_is_installed_is_the_package_and_its_configs(installed):
  """Every module and config of the checkout is installed, in one top-level package."""
  _, home = installed
  def modules(directory):
    return {str(file.relative_to(directory)) for file in directory.rglob("*.py")}
  assert modules(home / "site/w2s_jax") == modules(ROOT / "w2s_jax") | {
      f"configs/{name}" for name in modules(ROOT / "configs")}
  assert {name for name in os.listdir(home / "site") if not name.endswith(".dist-info")} == {"w2s_jax", "bin"}


@pytest.mark.parametrize("args, message", [
    (("clean", "suspect"), "error: the following arguments are required: --data"),
    (("run", "llama_badnet", "lora.rnk=4"), "error: config has no field 'lora.rnk': did you mean lora.rank"),
    (("clean", "d", "--data", "f", "--seed", "u"), "error: flag --seed=u: invalid literal for int"),
    (("clean", "d", "--data", "f", "--defense", "nope"), "set --defense"),
    (("fields", "minilm_badnet"), "error: this config needs real data")])
def test_an_installed_command_refuses_in_one_line(installed, args, message):
  run, home = installed
  out = run(*args)
  assert out.returncode == 2 and message in out.stderr and out.stderr.count("\n") == 1, out.stderr
  assert not os.listdir(home / "empty")


def test_an_installed_command_lists_fields(installed):
  run, _ = installed
  out = run("fields", "llama_badnet")
  assert out.returncode == 0 and "\n  lora.rank=16  (int, 1 or more)\n" in out.stdout and "--config" not in out.stdout


@pytest.mark.parametrize("code, args", [
    ("from w2s_jax import cli; cli.main()", ["fields", "llama_badnet"]),
    ("import runpy; runpy.run_module('w2s_jax.main', run_name='__main__')", ["--help"])])
def test_a_reader_that_closes_the_pipe_early_is_no_error(code, args):
  """As in `w2s-jax fields llama_badnet | head -3`: the command ends, and prints no traceback."""
  reading_end, writing_end = os.pipe()
  os.close(reading_end)
  out = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=ENV, stdout=writing_end,
                       stderr=subprocess.PIPE, text=True)
  os.close(writing_end)
  assert (out.returncode, out.stderr) == (1, "")


@pytest.fixture(scope="module")
def suspect(installed):
  """(arguments of clean and scan, arguments of main) of a short run on 80 rows with an untrained checkpoint."""
  _, home = installed
  rows = grammar.rows("phrases", "train", 80)
  tokenizer = tokenization.train([row["text"] for row in rows], "decoder", 300)
  model = with_padding_token(Model(config_from_hf(dict(
      model_type="llama", vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
      num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
      tie_word_embeddings=True, initializer_range=0.2, num_labels=2))), tokenizer)
  save_pretrained(home / "suspect", model, model.init(jax.random.key(0)), tokenizer)
  (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  fields = ["teach.max_steps=2", "defend.max_steps=2", "data.max_length=32", "data.buckets=32", "probe.words=2",
            "probe.sentences=2", "probe.search=0", "probe.rows=8", "data.eval_batch_size=32", "scan.steps=2",
            "selftest.triggers=0"]
  new = [str(home / "suspect"), "--data", str(home / "rows.jsonl"), "--triggers", "mn", "--defense", "lora_ce",
         "--set", *fields]
  old = [f"--config={ROOT}/configs/clean_checkpoint.py", f"--config.student.path={home / 'suspect'}",
         f"--config.data.train={home / 'rows.jsonl'}", "--config.probe.triggers=mn", "--config.defenses=lora_ce",
         *(f"--config.{field}" for field in fields)]
  return new, old


def without_times(workdir):
  found = json.loads((workdir / "results.json").read_text())
  del found["meta"]["seconds"]
  return found


@pytest.mark.slow
def test_scan_and_clean_are_one_code_path_with_the_old_command(installed, suspect):
  """Verdict, config and every number are those of main, and the current directory stays empty."""
  run, home = installed
  new, old = suspect
  scanned = run("scan", *new, "--out", str(home / "new"))
  verdict = json.loads((home / "new/scan/suspect.json").read_text())
  assert scanned.returncode == {"no sign": 0, "suspicious": 1, "no verdict": 3}[verdict["outcome"]], scanned.stderr
  assert "\nScan of suspect: " in scanned.stdout and not (home / "new/models/teacher").exists()
  cleaned = run("clean", *new, "--out", str(home / "new"))
  assert cleaned.returncode == 0, cleaned.stderr
  assert json.loads((home / "new/scan/suspect.json").read_text()) == verdict
  before = run(*old, f"--workdir={home / 'old'}", module="w2s_jax.main", cwd=ROOT)
  assert before.returncode == 0, before.stderr
  assert json.loads((home / "old/scan/suspect.json").read_text()) == verdict
  found = without_times(home / "new")
  assert [row["model"] for row in found["rows"]] == ["suspect", "lora_ce"] and found == without_times(home / "old")
  assert (home / "new/config.json").read_text() == (home / "old/config.json").read_text()
  assert (home / "new/models/lora_ce/model.safetensors").read_bytes() == (
      home / "old/models/lora_ce/model.safetensors").read_bytes()
  assert not os.listdir(home / "empty")
  refused = run("clean", *new, "data.max_length=16", "--out", str(home / "new"))
  assert refused.returncode == 2 and "give another --out" in refused.stderr and "--workdir" not in refused.stderr


@pytest.mark.slow
def test_a_run_by_name(installed):
  """It writes to runs/NAME in the current directory. Its warm-up weights are those of main."""
  run, home = installed
  fields = ["warmup.max_steps=2", "attack.poison_count=20", "data.attack_rows.train=80", "data.defend_rows.train=64"]
  (home / "other").mkdir()
  out = run("run", "llama_badnet", *fields, "--stage", "warmup", cwd=home / "other")
  assert out.returncode == 0 and "warmup: 2 steps" in out.stdout, out.stderr
  before = run("--config=configs/llama_badnet.py", *(f"--config.{field}" for field in fields), "--stage=warmup",
               f"--workdir={home / 'old_run'}", module="w2s_jax.main", cwd=ROOT)
  assert before.returncode == 0, before.stderr
  weights = [d / "models/base/model.safetensors" for d in (home / "other/runs/llama_badnet", home / "old_run")]
  assert weights[0].read_bytes() == weights[1].read_bytes()
