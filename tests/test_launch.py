"""Launch scripts, as far as one machine can check them, and runs of several processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli import CONFIG, ENV, ROOT, SHORT, before_the_defenses, lines_of, w2s, w2s_forked, wait_until

LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(script):
  shellcheck = Path(sys.executable).with_name("shellcheck")
  out = subprocess.run([shellcheck, "--shell=bash", LAUNCH / script], capture_output=True, text=True)
  assert out.returncode == 0, out.stdout


def test_every_script_says_what_to_edit():
  for script in LAUNCH.iterdir():
    assert re.search(r"^# .*([Ee]dit)", "\n".join(script.read_text().splitlines()[:12]), re.M), script.name


def test_the_hub_token_is_copied_to_a_pod_but_is_on_no_command_line(tmp_path):
  """A stand-in for gcloud writes down its arguments, and the contents of each small file that it is to copy."""
  gcloud = tmp_path / "gcloud"
  gcloud.write_text('#!/bin/bash\necho "$@" >> "$DIARY/arguments"\n'
                    '[ "$4" = scp ] && [ "$5" != /tmp/w2s_jax.tar.gz ] && cat "$5" > "$DIARY/copied"\nexit 0\n')
  gcloud.chmod(0o755)
  env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DIARY": str(tmp_path), "HF_TOKEN": "hf_secret",
                      "TMPDIR": str(tmp_path)}
  for verb in (["setup"], ["run", "--config=configs/llama_badnet.py"]):
    subprocess.run([LAUNCH / "tpu_pod.sh", *verb], env=env, check=True)
  arguments = (tmp_path / "arguments").read_text()
  assert (tmp_path / "copied").read_text() == "hf_secret"
  assert "w2s:.cache/huggingface/token" in arguments and "hf_secret" not in arguments
  assert "w2s_jax.main --distributed --config=configs/llama_badnet.py" in arguments
  assert not list(tmp_path.glob("tmp.*"))                        # the local copy is deleted


# The fields of Kubernetes's Job and of JobSet (jobset.x-k8s.io/v1alpha2) that our file has. It may have no others.
def _object(**properties):
  optional = {name.removesuffix("_") for name in properties if name.endswith("_")}
  properties = {name.removesuffix("_"): schema for name, schema in properties.items()}
  return {"type": "object", "properties": properties, "additionalProperties": False,
          "required": sorted(set(properties) - optional)}


NAME, TEXT, COUNT = {"type": "string", "pattern": "^[a-z0-9-]{1,63}$"}, {"type": "string"}, {"type": "integer"}
STRINGS = {"type": "object", "additionalProperties": TEXT}
POD = _object(
    restartPolicy={"enum": ["Never", "OnFailure"]}, terminationGracePeriodSeconds=COUNT, nodeSelector=STRINGS,
    containers={"type": "array", "minItems": 1, "items": _object(
        name=NAME, image=TEXT, command={"type": "array", "items": TEXT}, env={"type": "array", "items": _object(
            name=TEXT, valueFrom=_object(secretKeyRef=_object(name=NAME, key=TEXT)))},
        resources=_object(limits={"type": "object", "additionalProperties": COUNT}),
        volumeMounts={"type": "array", "items": _object(name=NAME, mountPath=TEXT)})},
    volumes={"type": "array", "items": _object(name=NAME, persistentVolumeClaim=_object(claimName=NAME))})
ON_EXIT = _object(action={"enum": ["FailJob", "Ignore", "Count"]}, onExitCodes=_object(
    containerName=NAME, operator={"enum": ["In", "NotIn"]}, values={"type": "array", "minItems": 1, "items": COUNT}))
JOB = _object(parallelism=COUNT, completions=COUNT, backoffLimit=COUNT, template=_object(spec=POD),
              podFailurePolicy=_object(rules={"type": "array", "items": ON_EXIT}))
RULE = _object(name=NAME, action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
               onJobFailureReasons={"type": "array", "items": {"enum": ["PodFailurePolicy", "BackoffLimitExceeded"]}})
JOBSET = _object(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"}, metadata=_object(name=NAME),
    spec=_object(failurePolicy=_object(maxRestarts=COUNT, rules={"type": "array", "items": RULE}),
                 replicatedJobs={"type": "array", "minItems": 1, "items": (
                     _object(name=NAME, replicas=COUNT, template=_object(spec=JOB)))}))


def test_the_jobset_is_one():
  jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  jsonschema.validate(jobset, JOBSET)
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in pod["containers"][0]["volumeMounts"]}
  command = pod["containers"][0]["command"]
  out = w2s(*(a for a in command[3:] if a.startswith("--config")), "--config.seed=-1")    # refused after it is read
  assert out.returncode == 2 and "seed is -1" in out.stderr


@pytest.mark.parametrize("args,message", [
    (["--num_processes=2"], "each of several processes also needs --coordinator_address, --process_id"),
    (["--process_id=0", "--coordinator_address=localhost:1"], "each of several processes also needs --num_processes")])
def test_half_of_what_several_processes_need_is_refused(args, message, tmp_path):
  out = w2s_forked(CONFIG, f"--workdir={tmp_path}", *args)
  assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics/w2s.jsonl").read_text().splitlines()]


DEFEND = ("--stage=defend", "--config.defenses=('w2s',)", "--config.defend.epochs=10", "--config.term_norms_every=0")


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_device(tiny_run, tmp_path):
  """Twenty steps through launch/local.sh have the losses of a single device, and compile one program."""
  flags = [*(f for f in SHORT if "defend.max_steps" not in f), *DEFEND]
  alone, together = (before_the_defenses(tiny_run, tmp_path / name) for name in ("alone", "together"))
  assert w2s(CONFIG, f"--workdir={alone}", *flags).returncode == 0
  compiled = tmp_path / "xla"
  out = subprocess.run(["launch/local.sh", "2", CONFIG, f"--workdir={together}", *flags, "--config.mesh.data=2",
                        "--config.mesh.fsdp=2", "--config.mesh.tensor=2"], cwd=ROOT, capture_output=True, text=True,
                       env=ENV | {"JAX_NUM_CPU_DEVICES": "4", "PYTHON": sys.executable,
                                  "JAX_COMPILATION_CACHE_DIR": str(compiled)})
  assert out.returncode == 0, out.stderr[-3000:]
  assert len(losses(alone)) == len(losses(together)) == 20
  for one, other in zip(losses(alone), losses(together)):
    assert other == pytest.approx(one, rel=1e-5)
  assert len([*compiled.glob("jit_steps-*-cache")]) == 1
  assert out.stdout.count("w2s: 20 steps") == 1                    # only one process prints
  assert {f.name for f in (together / "models/w2s").iterdir()} == {f.name for f in (alone / "models/w2s").iterdir()}


def start(workdir, *flags):
  """A process that trains until it is stopped; its output goes to workdir/stderr."""
  short = [*(f for f in SHORT if "defend.max_steps" not in f), *DEFEND[:2], "--config.defend.epochs=1000"]
  with open(workdir / "stderr", "a") as err:
    return subprocess.Popen([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={workdir}", *short, *flags],
                            cwd=ROOT, env=ENV, stderr=err, stdout=err)


def wait_for_steps(workdir, processes, steps=1):
  """Waits until the metrics have this number of steps. Fails if a process ends before."""
  wait_until(lambda: lines_of(workdir / "metrics/w2s.jsonl") >= steps, *processes, seconds=300,
             log=workdir / "stderr")


def start_two(workdir, port):
  """Starts one run in two processes, and returns them when they train."""
  both = [start(workdir, f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={i}")
          for i in range(2)]
  wait_for_steps(workdir, both)
  return both


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(tiny_run, tmp_path):
  """Both end with exit code 143 and save the same step. A single process can resume from there."""
  workdir = before_the_defenses(tiny_run, tmp_path / "preempted")
  both = start_two(workdir, 28171)
  both[1].send_signal(signal.SIGTERM)
  assert [process.wait(120) for process in both] == [143, 143], (workdir / "stderr").read_text()
  stops = re.findall(r"stopped by SIGTERM, saved at step (\d+) of", (workdir / "stderr").read_text())
  assert len(stops) == 2 and stops[0] == stops[1] and (workdir / "checkpoints/w2s" / stops[0]).is_dir()
  alone = start(workdir, "--config.mesh.data=1")                   # resumes in one process
  wait_for_steps(workdir, [alone], int(stops[0]) + 1)
  alone.send_signal(signal.SIGTERM)
  assert alone.wait(120) == 143
  done = [json.loads(line)["step"] for line in (workdir / "metrics/w2s.jsonl").read_text().splitlines()]
  assert done == list(range(1, len(done) + 1)) and len(done) > int(stops[0])


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_the_other_stops(tiny_run, tmp_path):
  """The other ends within a minute, with an exit code other than 0 and a line that says why."""
  workdir = before_the_defenses(tiny_run, tmp_path / "killed")
  both = start_two(workdir, 28173)
  both[1].send_signal(signal.SIGKILL)
  killed_at = time.monotonic()
  try:
    assert both[0].wait(60) != 0 and time.monotonic() - killed_at < 60
  finally:
    both[0].kill()
  assert re.search(r"lost another process|task.*(died|disconnect|heartbeat|unhealthy)|[Cc]onnection (closed|reset)",
                   (workdir / "stderr").read_text())


@pytest.mark.parametrize("args", [[], [CONFIG], ["0", CONFIG]], ids=["nothing", "no number", "none"])
def test_local_without_a_number_of_processes(args):
  out = subprocess.run(["launch/local.sh", *args], cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == 2 and out.stderr.startswith("usage: launch/local.sh N ") and not out.stdout


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
  """Two processes with different directories, as on two hosts' disks, end with one line, and do not wait for ever."""
  short = [*SHORT, "--coordinator_address=localhost:28175", "--num_processes=2"]
  both = []
  for i in range(2):
    (tmp_path / f"{i}").mkdir()
    both.append(subprocess.Popen([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={tmp_path / str(i) / 'w'}",
                                  *short, f"--process_id={i}"], cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True))
  for process in both:
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "is not the same directory in process 1 as in process 0" in err, err
