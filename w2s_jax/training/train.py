"""`fit`, the only training loop in the repository."""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from w2s_jax import processes, sharding
from w2s_jax.models import Model
from w2s_jax.models.latent import Latent
from w2s_jax.tasks import Task
from w2s_jax.training import checkpoint, inference
from w2s_jax.training.steps import Program, TrainState

LOG = logging.getLogger(__name__)


class Feed(NamedTuple):
  """The data of a stage.

  Attributes:
    steps: number of steps of the whole stage.
    batches: start step -> iterator of host batches [runs, ...]. The step alone determines the batch, so a resumed run
      sees the same batches as an uninterrupted one.
    stack: list of host batches -> one batch with a new first axis.
    keys: [runs] dropout key of each run. A step folds its number into the key.
  """
  steps: int
  batches: Callable[[int], Iterator[dict]]
  stack: Callable[[list], dict]
  keys: Any


class Workplace(NamedTuple):
  """What all stages of a run share: devices, directory, shapes, and intervals of logs and checkpoints.

  Attributes:
    task: the task to train and measure (tasks/).
    mesh: mesh of the devices.
    workdir: directory of metrics and checkpoints.
    config_hash: hash that is stored in every checkpoint.
    buckets: ascending sequence lengths that may be compiled, in tokens.
    eval_batch_size: batch size of evaluation, in rows.
    pack: whether several texts may share a row.
    log_every: interval between lines in metrics/, in steps; at least 1.
    checkpoint_every, term_norms_every: intervals in steps; 0: never.
    steps_per_dispatch: largest number of steps per dispatch to the device.
  """
  task: Task
  mesh: jax.sharding.Mesh
  workdir: Path
  config_hash: str
  buckets: Sequence[int]
  eval_batch_size: int
  pack: bool = True
  log_every: int = 10
  checkpoint_every: int = 0
  term_norms_every: int = 0
  steps_per_dispatch: int = 1

  def eval_shapes(self) -> dict:
    return {"batch_size": self.eval_batch_size, "buckets": self.buckets}

  def logits(self, model: Model | Latent, params: dict, arrays: dict) -> np.ndarray:
    """Logits [N, C] float32, in row order."""
    return inference.outputs(model, params, arrays, self.mesh, **self.eval_shapes())[0]

  def answers(self, model: Model, params: dict, arrays: dict) -> np.ndarray:
    """The task's answers [N], in row order."""
    return self.task.predict(self.logits(model, params, arrays))


class Chosen(NamedTuple):
  """The checkpoint that was chosen for a run; `seconds` is the wall time of this call of `fit`."""
  step: int
  dev_accuracy: float | None
  seconds: float


def fit(names: Sequence[str], program: Program, state: TrainState, frozen: dict, feed: Feed, eval_every: int,
        place: Workplace, dev_accuracy: Callable[[dict], list[float]] | None = None) -> list[tuple[dict, Chosen]]:
  """Trains from the last checkpoint, if there is one, and returns the best trainable parameters of each run.

  Args:
    names: NAME of each run; metrics go to metrics/NAME.jsonl, checkpoints to checkpoints/FIRST NAME.
    program: from steps.build; its steps donate the state.
    state: TrainState at step 0, [runs, ...].
    frozen: nested dict of the leaves that do not train.
    eval_every: steps between dev evaluations. Each evaluation writes a checkpoint, and so does the last step.
    dev_accuracy: trainable parameters [runs, ...] -> dev accuracy of each run. It alone decides which
      checkpoint is chosen; None keeps the last step.
  Raises:
    processes.Stopped: SIGTERM came, and a checkpoint of the last finished step was saved.
    FloatingPointError: a loss or a gradient norm is not finite.
  """
  name, runs, steps = names[0], len(names), feed.steps
  with checkpoint.open_manager(place.workdir / "checkpoints" / name, runs) as manager:  # closed after errors, too
    done = manager.latest_step() or 0
    if done:
      state = checkpoint.restore(manager, done, state, place.config_hash)
    began, batches = time.monotonic(), feed.batches(done)
    bar = tqdm.tqdm(total=steps, initial=done, desc=name, unit="step", disable=not processes.writes() or None)
    with bar, processes.stop_signal() as stop, _open_logs(place.workdir, names, done) as logs:
      while done < steps:
        count = _steps_until_due(done, steps, eval_every, place)
        batch = _next_batches(batches, count, feed.stack, place)
        extra = {}                                                     # {index in the dispatch: further metrics}
        if place.term_norms_every and done % place.term_norms_every == 0:
          first_batch = jax.tree.map(lambda x: x[0], batch)
          extra[0] = dict(program.term_norms(state, frozen, first_batch, feed.keys))
        state, metrics = program.steps(state, frozen, batch, feed.keys, count)
        first, done = done + 1, done + count
        bar.update(count)
        evaluating, stopping = done % eval_every == 0 or done == steps, stop()
        saving = stopping or evaluating or (place.checkpoint_every and done % place.checkpoint_every == 0)
        accuracy = None
        if evaluating and dev_accuracy is not None:
          accuracy = dev_accuracy(state.params)
          extra.setdefault(count - 1, {})["dev_accuracy"] = accuracy
        due = [i for i in range(count)
               if (first + i) % place.log_every == 0 or i in extra or (saving and i == count - 1)]
        if due:
          values = {k: np.asarray(v)[:count] for k, v in metrics.items()}
          _check_finite(name, values, first)
          loss = f"{values['loss'][-1].mean():.4f}"
          bar.set_postfix(loss=loss, refresh=False)
          if bar.disable and evaluating and processes.writes():       # a log file has no bar
            LOG.info(f"{name}: step {done} of {steps}, loss {loss}")
          for i in due:
            _log(logs, first + i, {k: v[i] for k, v in values.items()} | extra.get(i, {}))
        if saving:
          checkpoint.save(manager, done, state, place.config_hash, accuracy)
        if stopping:
          manager.wait_until_finished()
          raise processes.Stopped(f"{name}: stopped by SIGTERM, saved at step {done} of {steps}")
    manager.wait_until_finished()
    best = checkpoint.best_steps(manager, runs) if dev_accuracy is not None else [(steps, None)] * runs
    return [(params, Chosen(step, accuracy, time.monotonic() - began))
            for params, (step, accuracy) in zip(_restored(manager, best, steps, state, place.config_hash), best)]


def _steps_until_due(done, steps, eval_every, place):
  """Number of steps until an evaluation, a checkpoint or the term norms are due; at most steps_per_dispatch."""
  return min(place.steps_per_dispatch, steps - done, *(every - done % every for every in (
      eval_every, place.checkpoint_every, place.term_norms_every) if every))


def _next_batches(batches, count, stack, place):
  """`count` batches, [steps, runs, ...] on the mesh. Copies of the last one, which do not train, fill the dispatch."""
  taken = list(itertools.islice(batches, count))
  taken += taken[-1:] * (place.steps_per_dispatch - count)
  return sharding.global_batch(stack(taken), place.mesh, 2)


def _check_finite(name, values, first):
  """Raises FloatingPointError if a loss or norm is not finite. It runs before each save, so no such state is saved."""
  for i, (loss, norm) in enumerate(zip(values["loss"].sum(axis=1), values["grad_norm"].sum(axis=1))):
    if not np.isfinite([loss, norm]).all():
      raise FloatingPointError(f"{name}: loss {loss}, gradient norm {norm} at step {first + i}: lower the "
                               "learning rate or the loss weights (--config.*.learning_rate, .weights)")


def _log(logs, step, values):
  """Writes one line to each run's metrics file; values: {name: [runs]}."""
  for run, log in enumerate(logs):
    log.write(json.dumps({"step": step} | {k: float(np.asarray(v)[run]) for k, v in values.items()}) + "\n")
    log.flush()


def _restored(manager, best, last, state, config_hash):
  """Yields each run's trainable parameters at its best step. It holds at most one checkpoint besides the last state."""
  step, chosen = last, state
  for run, (wanted, _) in enumerate(best):
    if wanted != step:
      step, chosen = wanted, state if wanted == last else checkpoint.restore(manager, wanted, state, config_hash)
    yield jax.tree.map(lambda leaf, run=run: leaf[run], chosen.params)


@contextlib.contextmanager
def _open_logs(workdir, names, done):
  """Opens each run's metrics file for appending. It drops the lines after step `done`, whose steps run again."""
  writes = processes.writes()
  files = [workdir / "metrics" / f"{name}.jsonl" for name in names]
  with contextlib.ExitStack() as stack:
    for file in files if writes else ():
      _cut(file, done)
    yield [stack.enter_context(open(file if writes else "/dev/null", "a")) for file in files]


def _cut(metrics_file, step):
  metrics_file.parent.mkdir(parents=True, exist_ok=True)
  lines = metrics_file.read_text().splitlines(keepends=True) if metrics_file.exists() else []
  whole = [line for line in lines if line.endswith("\n")]
  metrics_file.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
