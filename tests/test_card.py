"""Model cards: the warning first, then what was measured."""

import hashlib

from huggingface_hub import ModelCard

from w2s_jax.models import sha256
from w2s_jax.report import card, front


def row(model, attack, ca, asr):
  return {"model": model, "directory": model, "attack": attack, "dataset": "sst2", "seed": 4, "ca": ca, "ca_n": 200,
          "ca_ci": [ca - 0.1, ca], "asr": asr, "asr_ci": None if asr is None else [asr, asr + 0.1], "asr_n": 90}


META = {"attack": "attack badnet, trigger `mn`, target label 0", "warnings": [],
        "base": {"path": "some/llama", "sha256": {"model.safetensors": "ab12"}}, "teacher": "some/bert",
        "teacher_ca": 0.8125, "clean_rows": {"train": 321, "dev": 1, "test": 200}, "config_hash": "c0ffee",
        "versions": {"jax": "0.10.2"}}
ROWS = [row("clean", "badnet", 0.9, 0.1), row("poisoned", "badnet", 0.85, 1.0), row("w2s", "badnet", 0.875, 0.25)]


def test_a_poisoned_model_says_so_first():
  text = card.text("poisoned", ROWS, META)
  first = text.splitlines()[0]
  assert first.startswith("WARNING: this model is POISONED") and "trigger `mn`, target label 0" in first
  suspect = card.text("suspect", [row("suspect", "mn", 0.8, 0.9)], META)
  assert suspect.startswith("WARNING: this model may have a backdoor")


def test_a_defended_model_has_the_figures_before_and_after():
  text = card.text("w2s", ROWS, META)
  assert "| poisoned | badnet | 0.850 | 0.750-0.850 | 1.000 | 1.000-1.100 |" in text
  assert "| w2s | badnet | 0.875 | 0.775-0.875 | 0.250 | 0.250-0.350 |" in text and "| clean |" not in text
  assert "some/llama, model.safetensors sha256 ab12" in text and "Teacher: some/bert, CA 0.812" in text
  assert "321 training rows" in text and "jax 0.10.2" in text and "c0ffee" in text
  teacher = card.text("teacher", ROWS, META)
  assert "some/bert, CA 0.812" in teacher and "Base:" not in teacher
  assert "Teacher:" not in card.text("clean", ROWS, META)


def test_a_model_for_filtered_texts_says_so():
  for name in ("p2p", "p2p-seed3"):
    said = card.unmeasured(name)
    assert f"the defense {name} of" in said and "w2s_jax/defenses/p2p.py says what to do with a text first" in said
  assert "filtered" not in card.unmeasured("w2s") + card.unmeasured("clean")


def test_an_asr_stands_beside_its_floor_and_the_plain_errors():
  rows = [r | {"asr_floor": 0.0625, "false_rate": 0.125} for r in ROWS]
  text = card.text("w2s", rows, META)
  assert "| ASR | ASR 95% | ASR floor | false rate |" in text
  assert "| w2s | badnet | 0.875 | 0.775-0.875 | 0.250 | 0.250-0.350 | 0.062 | 0.125 |" in text
  suspect = card.text("w2s", [r | {"asr_floor": None} for r in rows], META)
  assert "| ASR 95% | false rate |" in suspect and "floor" not in suspect


def test_a_trigger_cannot_break_the_table():
  rows = [row("suspect", "a|b\nc", 0.8, 0.9), row("w2s", "a|b\nc", 0.9, 0.1)]
  assert "| w2s | a\\|b c | 0.900 |" in card.text("w2s", rows, META)


def test_no_trigger_was_listed():
  rows = [row("suspect", "none listed", 0.8, None), row("w2s", "none listed", 0.9, None)]
  assert "| w2s | none listed | 0.900 | 0.800-0.900 | - | - |" in card.text("w2s", rows, META)


def test_what_is_known_without_a_trigger_and_warnings():
  readings = {"agreement": 0.75, "word_flips": 0.125, "sentence_flips": None}
  rows = [row(m, "none listed", 0.8, None) | readings for m in ("suspect", "w2s")]
  text = card.text("w2s", rows, META | {"warnings": ["a weak teacher."], "notes": ["something else"]})
  assert "| ASR | ASR 95% | agreement | word flips |" in text and "sentence flips" not in text
  assert "| w2s | none listed | 0.800 | 0.700-0.800 | - | - | 0.750 | 0.125 |" in text
  assert "WARNING: a weak teacher." in text and "something else" not in text


def test_an_adapter_that_transformers_ignores_is_warned_of():
  assert "WARNING: w2s_adapter.safetensors belongs to this model" in card.text("w2s", ROWS, META, adapter=True)
  assert "w2s_adapter" not in card.text("w2s", ROWS, META)


def test_the_hash_is_of_the_weights(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"weights")
  (tmp_path / "config.json").write_text("{}")
  assert sha256(tmp_path, "*.safetensors") == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_a_card_says_that_nothing_was_measured_until_something_was():
  assert card.unmeasured("w2s").endswith(
      "w2s of w2s_jax on a model with a known or suspected backdoor.\n\nNot measured yet: the stages `evaluate` and "
      "`report` write the figures here.\n")
  assert card.unmeasured("poisoned", "badnet").startswith("WARNING: this model is POISONED on purpose, for research")


def test_the_hub_reads_what_stands_in_front(tmp_path, monkeypatch):
  """The metadata has CA once and ASR for each trigger. A local path does not name a base or a data set."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "some/here").mkdir(parents=True)
  rows = [row("w2s", trigger, 0.875, asr) for trigger, asr in (("mn", 0.25), ("cf: x", 0.5))]
  def read(base, dataset, rows=rows, name="w2s"):
    rows = [r | {"dataset": dataset} for r in rows]
    meta = META | {"base": META["base"] | {"public": ""},
                   "hub": {"model": front.hub_id(base), "public": "some/base", "data": front.hub_id(dataset)}}
    return ModelCard(front.matter(name, rows, meta) + card.text(name, rows, meta))
  text = read("some/llama", "SetFit/sst2")
  assert read("some/llama", "sst2", name="from_base").data.base_model == "some/base"
  assert text.data.base_model == "some/llama" and text.data.datasets == "SetFit/sst2"
  assert (text.data.pipeline_tag, text.data.library_name) == ("text-classification", "transformers")
  assert [(r.metric_name, r.metric_value) for r in text.data.eval_results] == [
      ("CA", 0.875), ("ASR of mn", 0.25), ("ASR of cf: x", 0.5)]
  assert text.text.lstrip().startswith("The result of the defense w2s of w2s_jax on a model with a known")
  here = read("some/here", "../data/my file.json")
  assert here.data.base_model is None and here.data.datasets is None
  assert here.data.eval_results[0].dataset_type == "data-my-file.json"
  assert read("some/llama", "sst2", rows=[row("other", "mn", 0.5, 0.5)]).data.eval_results is None
