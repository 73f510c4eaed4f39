"""The declarations of config fields, and what is made from them: sections, checks, --help."""

import dataclasses
import re
import runpy
import subprocess
import sys

import pytest
from cli import ENV, ROOT
from ml_collections import ConfigDict

from w2s_jax import InputError, checks, claims, command, config, quantized
from w2s_jax.config import check, field, section
from w2s_jax.data import poison
from w2s_jax.defenses import SETTINGS

CONFIGS = [("llama_badnet", None), ("llama_synattack", "data=D"), ("qwen_badnet", "scale=7b"),
           ("minilm_insent", "data=D"), ("clean_checkpoint", None)]


def make(name, arg):
  return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](arg)


def declared(c):
  """{path: (declaration, value)} of every declared field of the config."""
  own = {f"defense.{name}": (cls, c.defense[name]) for name, cls in SETTINGS.items()}
  return {f"{path}.{f.name}".lstrip("."): (f, values[f.name])
          for path, (cls, values) in (config.sections(c) | own).items() for f in dataclasses.fields(cls)}


@dataclasses.dataclass
class Settings:
  """Settings of a new defense."""
  rate: float = field(0.5, "of something", low=0.0, high=1.0)
  steps: int = field(3, "number of steps", low=1)
  gap: int = field(0, "below", high=9)
  kind: str = field("", "what is done", among=("", "this", "that"))


def test_a_section_has_the_defaults_and_what_is_given():
  assert section(Settings, steps=7).to_dict() == {"rate": 0.5, "steps": 7, "gap": 0, "kind": ""}
  with pytest.raises(ValueError, match="Settings has no field step"):
    section(Settings, step=7)


@pytest.mark.parametrize("values,message", [
    ({"rate": 1.5}, "defense.own.rate is 1.5, wanted a number in 0..1: set --config.defense.own.rate"),
    ({"rate": float("nan")}, "defense.own.rate is nan, wanted a number in 0..1"),
    ({"steps": 0}, "defense.own.steps is 0, wanted at least 1: set --config.defense.own.steps"),
    ({"gap": 10}, "defense.own.gap is 10, wanted at most 9: set --config.defense.own.gap"),
    ({"kind": "other"}, "defense.own.kind 'other': want one of this, that, or '' for none: set --config.def")])
def test_a_value_out_of_range_is_refused(values, message):
  check(Settings, section(Settings), "defense.own")
  with pytest.raises(InputError) as refused:
    check(Settings, section(Settings, **values), "defense.own")
  assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name,arg", CONFIGS)
def test_every_field_is_declared_once_and_its_value_is_of_its_type(name, arg):
  """The fields of `arch` are not declared, because they are transformers'. Every value passes the checks."""
  c = make(name, arg)
  fields = declared(c)
  leaves = {path for path in claims.flat(c.to_dict()) if ".arch." not in path}
  assert leaves == set(fields)
  for path, (f, value) in fields.items():
    assert f.metadata["doc"] and f.type in (int, float, str, bool, tuple), path
    assert type(value) is f.type and type(f.default) is f.type, path
  checks.check_fields(c)


def test_what_is_allowed_is_what_the_code_knows():
  names = {cls: {f.name: f.metadata["among"] for f in dataclasses.fields(cls)} for cls in (config.Attack, config.Lora)}
  assert names[config.Attack]["label"] == tuple(poison.LABELS)
  assert names[config.Lora]["quantize"] == ("", *quantized.BITS)


@pytest.mark.parametrize("name,arg", CONFIGS)
def test_help_has_every_field_on_lines_of_100_columns(name, arg):
  """Each field has its value, type, description and source, as declared."""
  c = make(name, arg)
  lines = list(command.describe(c, SETTINGS))
  assert max(map(len, lines)) <= 100
  text = " ".join(" ".join(lines).split())
  for path, (f, value) in declared(c).items():
    head = f"--config.{path}={value!r} ({f.type.__name__}"
    assert text.count(" ".join(head.split())) == 1, path
    assert " ".join(f.metadata["doc"].split()) in text and f.metadata["source"] in text, path
  if name == "llama_badnet":
    assert "--config.lora.rank=16 (int, 1 or more)" in text and "--config.attack.poison_count=1000 (int, rows)" in text
    assert "--config.defend.insert_words=0.0 (float, 0 to 1)" in text and "hidden_size=64," in text
    assert "(str, one of clean, dirty, mixed)" in text and "Source: released: 1,000 of 4,000." in text


@pytest.mark.parametrize("program", ["main", "plan"])
def test_help_of_the_programs_loads_no_transformers(program):
  """Help has the common flags, and the fields of the config that is named, or else of the first config."""
  code = f"""if True:
    import runpy, sys
    sys.argv = ["x", *sys.argv[1:]]
    try:
      runpy.run_module("w2s_jax.{program}", run_name="__main__", alter_sys=True)
    finally:
      print("loaded:", *sorted({{"transformers", "torch", "datasets"}} & set(sys.modules)))"""
  for args, has in ((["--config=configs/clean_checkpoint.py"], "--config.scan.steps=80"),
                    ([], "--config.attack.name='badnet'"), (["--config=nope.py"], "'nope.py' does not exist")):
    out = subprocess.run([sys.executable, "-c", code, *args, "--help"], cwd=ROOT, env=ENV, capture_output=True,
                         text=True)
    assert out.returncode == 0 and has in out.stdout, out.stderr
    assert re.search(r"^  --config: ", out.stdout, re.M) and re.search(r"^  --\[no\]debug: ", out.stdout, re.M)
    assert out.stdout.splitlines()[-1] == "loaded:"


def test_a_config_that_lacks_a_section_is_not_checked_for_it():
  c = make("clean_checkpoint", None)
  assert "attack" not in config.sections(c) and config.sections(c)["data"][0] is config.GivenData
  c.attack = ConfigDict(dict(poison_rate=2.0))
  with pytest.raises(InputError, match="attack.poison_rate is 2.0"):
    checks.check_fields(c)


@pytest.mark.parametrize("typed, read", [
    (["defenses=w2s"], ("w2s",)), (["defenses=w2s,lora_ce"], ("w2s", "lora_ce")),
    (["defenses=('w2s','none')"], ("w2s", "none")), (["defenses=['w2s']"], ("w2s",)), (["defenses=()"], ()),
    (["defenses=('w2s',)", "seed=3", "defenses=none"], ("none",))])
def test_a_list_is_read_as_it_is_meant(typed, read):
  """If a list is given twice, the last one counts, as with every other flag."""
  argv = ["main", *(f"--config.{one}" for one in typed)]
  config = make("clean_checkpoint", None)
  *rest, last = command.with_lists(argv, config)
  assert last == f"--config.defenses={read!r}" and rest == ["main", *(a for a in argv[1:] if "seed" in a)]


def test_lists_of_numbers_and_of_sentences():
  def read(field, text):
    arg, = command.with_lists([f"--config.{field}={text}"], make("clean_checkpoint", None))
    return arg.split("=", 1)[1]
  assert read("data.buckets", "16,32") == "(16, 32)" and read("data.buckets", "16") == "(16,)"
  assert read("probe.triggers", "hello, world") == "('hello, world',)"
  assert read("seed", "1,2") == "1,2"                                 # no list
  with pytest.raises(InputError, match=r"--config.data.buckets=\(16: this is not a list: write A,B or"):
    read("data.buckets", "(16")
  with pytest.raises(InputError, match="--config.data.buckets=abc: want numbers, e.g. 16,32,48,64"):
    read("data.buckets", "abc")
