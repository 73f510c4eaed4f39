"""fit(): the only training loop in the repository."""

import contextlib
import itertools
import json
import time

import jax
import numpy as np
import tqdm

from w2s_jax import processes, sharding
from w2s_jax.training import checkpoint


def fit(names, steps_fn, state, frozen, batches_from, stack, *, steps, key, mesh, eval_every, workdir, config_hash,
        steps_per_dispatch=1, dev_accuracy=None, log_every=10, checkpoint_every=0, term_norms=None, term_norms_every=0):
  """Trains to `steps`, from the last checkpoint where there is one, and returns the best trainable parameters.

  Args:
    names: of the stage, or of each of several runs that train at once (steps.make_train_step); metrics go to
      workdir/metrics/NAME.jsonl, checkpoints to workdir/checkpoints/FIRST NAME. With several, state, batches, key,
      metrics and dev accuracies have an axis of so many runs in front.
    steps_fn: from steps.make_train_steps; donates the state.
    state: TrainState at step 0.
    frozen: nested dict of the leaves that do not train.
    batches_from: start step -> iterator of host batches; the order is a function of the step alone, so that a
      resumed run sees what the uninterrupted one would have seen.
    stack: list of host batches -> one, with an axis of them in front.
    steps: of the whole stage.
    key: one key; the step folds its number in.
    eval_every: steps between dev evaluations; each is a checkpoint. The last step is one always.
    steps_per_dispatch: at most so many steps are one call of steps_fn; evaluations, checkpoints and term norms come
      when they would come with 1.
    dev_accuracy: trainable parameters -> clean dev accuracy, which alone chooses the checkpoint; None keeps the last.
    log_every: steps between lines of the metrics file.
    checkpoint_every: steps between further checkpoints; 0 for none.
    term_norms: (state, frozen, batch, key) -> {name: gradient norm of one loss term}, logged every
      `term_norms_every` steps (0: never).
  Raises:
    processes.Stopped: SIGTERM came, and a checkpoint of the last step was saved.
  Returns:
    [(trainable parameters, {"step", "dev_accuracy", "seconds"} of the choice)] of each name.
  """
  name, runs = names[0], len(names)
  with checkpoint.open_manager(workdir / "checkpoints" / name, runs) as manager:  # closes its threads on every way out
    done = manager.latest_step() or 0
    if done:
      state = checkpoint.restore(manager, done, state, config_hash)
    writes = processes.writes()
    files = [workdir / "metrics" / f"{one}.jsonl" for one in names]
    for file in files if writes else ():
      _cut(file, done)
    began = time.monotonic()
    batches = batches_from(done)
    bar = tqdm.tqdm(total=steps, initial=done, desc=name, unit="step", disable=not writes or None)
    with bar, processes.stop_signal() as stop, contextlib.ExitStack() as open_files:
      logs = [open_files.enter_context(open(file if writes else "/dev/null", "a")) for file in files]
      while done < steps:
        count = min(steps_per_dispatch, steps - done, *(every - done % every for every in (
            eval_every, checkpoint_every, term_norms_every) if every))
        some = list(itertools.islice(batches, count))
        some += some[-1:] * (steps_per_dispatch - count)               # one shape; these are not trained on
        batch = sharding.global_batch(stack(some), mesh, 1 if runs == 1 else 2)
        more = {}                                                      # measured beside a step: {its place: values}
        if term_norms_every and done % term_norms_every == 0:
          more[0] = dict(term_norms(state, frozen, jax.tree.map(lambda x: x[0], batch), key))
        state, metrics = steps_fn(state, frozen, batch, key, count)
        first, done = done + 1, done + count
        bar.update(count)
        evaluating = done % eval_every == 0 or done == steps
        stopping = stop()
        saving = stopping or evaluating or (checkpoint_every and done % checkpoint_every == 0)
        if evaluating and dev_accuracy is not None:
          more.setdefault(count - 1, {})["dev_accuracy"] = dev_accuracy(state.params)
        logged = [i for i in range(count) if (first + i) % log_every == 0 or i in more or (saving and i == count - 1)]
        if logged:
          values = {k: np.asarray(v)[:count].reshape(count, runs) for k, v in metrics.items()}
          for i, (loss, norm) in enumerate(zip(values["loss"].sum(axis=1), values["grad_norm"].sum(axis=1))):
            if not np.isfinite([loss, norm]).all():                    # before it is saved: a resume would inherit it
              raise FloatingPointError(f"{name}: loss {loss}, gradient norm {norm} at step {first + i}: lower the "
                                       "learning rate or the loss weights (--config.*.learning_rate, .weights)")
          bar.set_postfix(loss=f"{values['loss'][-1].mean():.4f}", refresh=False)
        for i in logged:
          line = {k: v[i] for k, v in values.items()} | {k: np.atleast_1d(v) for k, v in more.get(i, {}).items()}
          for run, log in enumerate(logs):
            log.write(json.dumps({"step": first + i} | {k: float(v[run]) for k, v in line.items()}) + "\n")
            log.flush()
        if saving:
          checkpoint.save(manager, done, state, config_hash, line.get("dev_accuracy"))
        if stopping:
          manager.wait_until_finished()
          raise processes.Stopped(f"{name}: stopped by SIGTERM, saved at step {done} of {steps}")
    manager.wait_until_finished()
    best = checkpoint.best_steps(manager, runs) if dev_accuracy is not None else [(steps, None)] * runs
    out, states = [], {steps: state}
    for run, (step, accuracy) in enumerate(best):
      if step not in states:
        states = {step: checkpoint.restore(manager, step, state, config_hash)}
      params = states[step].params
      if runs > 1:
        params = jax.tree.map(lambda leaf, run=run: leaf[run], params)
      out.append((params, {"step": step, "dev_accuracy": accuracy, "seconds": time.monotonic() - began}))
    return out


def _cut(metrics_file, step):
  """Drops lines past `step`: they belong to work that the interrupted run lost."""
  metrics_file.parent.mkdir(parents=True, exist_ok=True)
  lines = metrics_file.read_text().splitlines(keepends=True) if metrics_file.exists() else []
  whole = [line for line in lines if line.endswith("\n")]
  metrics_file.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
