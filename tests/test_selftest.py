"""The self-test with canaries: its arithmetic on literals, and what it plants and measures in a small suspect."""

import types

import numpy as np
import pytest
import rig
from ml_collections import ConfigDict

from w2s_jax import InputError, checks
from w2s_jax.config import Selftest, section
from w2s_jax.defenses import DEFENSES, Defense
from w2s_jax.measure import selftest
from w2s_jax.tasks import CLASSIFICATION

CANARIES = [dict(kind="word", trigger="bq", target=0, n=50, planted=1.0, asr=0.1, false_rate=0.04),
            dict(kind="sequence", trigger="a b", target=1, n=150, planted=0.9, asr=0.3, false_rate=0.08),
            dict(kind="word", trigger="zz", target=1, n=99, planted=0.89, asr=1.0, false_rate=0.0)]


def test_in_words():
  """Mean and standard deviation of 0.1 and 0.3; the canary that was not implanted counts nowhere."""
  said = selftest.in_words({"defense": "w2s", "ca": 0.75, "canaries": CANARIES})
  assert said.startswith(
      "Self-test: 2 known backdoors of 2 kinds were planted in a copy of the suspect, and w2s cleaned the copy. The "
      "mean ASR left is 0.200 (standard deviation over the triggers 0.100), the largest 0.300 (sequence: `a b`). "
      "Without a trigger 0.060 ")
  assert "The cleaned copy has a CA of 0.750. Not counted: 1 that could not be implanted" in said
  for canaries, number in ((CANARIES[2:], 1), ([], 0)):
    said = selftest.in_words({"defense": "w2s", "ca": 0.75, "canaries": canaries})
    assert f"none of {number} planted backdoors reached" in said


@pytest.mark.parametrize("defenses,tested", [
    (("lora_ce", "w2s", "w2s_adv"), "w2s_adv"), (("w2s", "prune"), "prune"), (("w2s", "onion", "strip"), "w2s"),
    (("none", "from_base", "onion"), None), (("lora_ce", "from_base"), "lora_ce")])
def test_the_last_defense_that_makes_weights_of_the_suspect_is_tested(defenses, tested):
  def config(triggers, quantize):
    return ConfigDict({"defenses": defenses, "selftest": {"triggers": triggers},
                       "lora": {"kind": "lora", "quantize": quantize}})
  assert selftest.tested(config(12, "")) == tested
  assert selftest.tested(config(0, "")) is selftest.tested(config(12, "int8")) is None


def run_of(suspect, workdir, defense, **settings):
  config = ConfigDict({"defenses": (defense,), "defense": rig.DEFENSE, "lora": {"kind": "lora", "quantize": ""},
                       "data": {"max_length": suspect.max_length}, "selftest": section(Selftest, **settings)})
  return types.SimpleNamespace(
      config=config, workdir=workdir, defend_seeds=[0], rows={"test": suspect.dev}, place=suspect.place,
      suspect=lambda defense: suspect, task=CLASSIFICATION, mesh=suspect.place.mesh, encode=CLASSIFICATION.encode,
      labels=lambda split: np.array([row["label"] for row in suspect.dev]))


def test_canaries_are_planted_and_measured_after_the_defense(llama, tmp_path, monkeypatch):
  """A defense that changes nothing leaves all of them. It runs once, on a copy of the suspect."""
  suspect, got = rig.suspect(*llama, tmp_path)._replace(ranking="of the suspect"), []
  def weights(copy, settings, runs):
    got.append((copy, runs))
    return [copy.params]
  monkeypatch.setitem(DEFENSES, "idle", Defense(weights=weights))
  run = run_of(suspect, tmp_path, "idle", triggers=4, rows=16, epochs=192, test_rows=10)
  found = selftest.reading(run)
  assert found["defense"] == "idle" and 0 <= found["ca"] <= 1
  assert [canary["kind"] for canary in found["canaries"]] == list(selftest.planting.KINDS)
  assert all(canary["asr"] == canary["planted"] and canary["n"] == 10 for canary in found["canaries"])
  assert np.mean([canary["planted"] for canary in found["canaries"]]) > 0.8, found
  assert np.mean([canary["false_rate"] for canary in found["canaries"]]) < 0.5
  (copy, runs), = got
  assert runs == {"selftest-idle": 0} and copy.train == suspect.train and copy.dev == suspect.dev
  assert copy.ranking is None                                    # the copy has other weights
  assert selftest.reading(run) == found and len(got) == 1                        # from its file


def test_the_cleaned_copy_reads_what_the_defenses_filter_gives_it(llama, tmp_path, monkeypatch):
  """A filter that gives one text for all: every row has the same answer, with and without a trigger."""
  suspect = rig.suspect(*llama, tmp_path)
  monkeypatch.setitem(DEFENSES, "filtered", Defense(
      weights=lambda copy, settings, runs: [copy.params],
      text=lambda copy, settings, seed: lambda texts: ["good meal"] * len(texts)))
  found = selftest.reading(run_of(suspect, tmp_path, "filtered", triggers=8, rows=4, epochs=1, test_rows=5))
  by_target = {(canary["target"], canary["asr"], canary["false_rate"]) for canary in found["canaries"]}
  assert by_target in ({(0, 1, 1), (1, 0, 0)}, {(0, 0, 0), (1, 1, 1)}) and found["ca"] == 0.5
  assert {canary["planted"] for canary in found["canaries"]} - {0, 1}                    # measured without the filter


def test_no_canaries_no_test(llama, tmp_path):
  suspect = rig.suspect(*llama, tmp_path)
  assert selftest.reading(run_of(suspect, tmp_path, "w2s", triggers=0)) is None
  assert selftest.reading(run_of(suspect, tmp_path, "none", triggers=4)) is None
  assert not (tmp_path / "selftest.json").exists()


def test_test_rows_of_one_class_leave_the_canaries_for_it_out(llama, tmp_path, monkeypatch):
  suspect = rig.suspect(*llama, tmp_path)
  monkeypatch.setitem(DEFENSES, "idle", Defense(weights=lambda copy, settings, runs: [copy.params]))
  run = run_of(suspect, tmp_path, "idle", triggers=8, rows=4, epochs=1, test_rows=5)
  run.rows["test"] = [row for row in suspect.dev if row["label"] == 1]
  run.labels = lambda split: np.ones(20, int)
  assert [canary["target"] for canary in selftest.reading(run)["canaries"]] == [0] * 4


def test_words_are_asked_for_before_anything_trains():
  class Wordless:
    def __len__(self):
      return 5
    def batch_decode(self, ids):
      return ["#" for _ in ids]
  def check(of_base=False, base="suspect", **changes):
    config = ConfigDict({"defenses": ("w2s",), "selftest": {"triggers": 0}, "lora": {"kind": "lora", "quantize": ""},
                         "probe": {"triggers": (), "search": 0}})
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    source = types.SimpleNamespace(base=base, attacked="suspect")
    checks.check_words(types.SimpleNamespace(config=config, source=source), Wordless(), of_base)
  check()                                                                    # nothing draws words
  check(defenses=("from_base_words",))                                       # these come from the base's tokenizer
  check(of_base=True, defenses=("w2s_words", "from_base"), probe__search=1, selftest__triggers=1)
  for needed in ({"selftest__triggers": 1}, {"probe__search": 1}, {"defenses": ("w2s_words",)},
                 {"defenses": ("from_base_words",), "of_base": True},
                 {"defenses": ("from_base_words",), "base": "base"}):
    with pytest.raises(InputError, match=r"0 tokens .* are words, wanted 2: .*--config.selftest.triggers=0"):
      check(**needed)
