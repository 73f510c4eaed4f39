"""fit(): the only training loop in the repository."""

import contextlib
import json
import time

import jax
import numpy as np
import tqdm

from w2s_jax import checkpoint, sharding


def fit(names, step_fn, state, frozen, batches_from, *, steps, key, mesh, eval_every, workdir, config_hash,
        dev_accuracy=None, log_every=10, checkpoint_every=0, term_norms=None, term_norms_every=0):
  """Trains to `steps`, from the last checkpoint where there is one, and returns the best trainable parameters.

  Args:
    names: of the stage, or of each of several runs that train at once (steps.make_train_step); metrics go to
      workdir/metrics/NAME.jsonl, checkpoints to workdir/checkpoints/FIRST NAME. With several, state, batches, key,
      metrics and dev accuracies have an axis of so many runs in front.
    step_fn: (state, frozen, batch, key) -> (state, metrics); donates the state.
    state: TrainState at step 0.
    frozen: nested dict of the leaves that do not train.
    batches_from: start step -> iterator of host batches; the order is a function of the step alone, so that a
      resumed run sees what the uninterrupted one would have seen.
    steps: of the whole stage.
    key: one key; the step folds its number in.
    eval_every: steps between dev evaluations; each is a checkpoint. The last step is one always.
    dev_accuracy: trainable parameters -> clean dev accuracy, which alone chooses the checkpoint; None keeps the last.
    log_every: steps between lines of the metrics file.
    checkpoint_every: steps between further checkpoints; 0 for none.
    term_norms: (state, frozen, batch, key) -> {name: gradient norm of one loss term}, logged every
      `term_norms_every` steps (0: never).
  Returns:
    [(trainable parameters, {"step", "dev_accuracy", "seconds"} of the choice)] of each name.
  """
  name, runs = names[0], len(names)
  with checkpoint.open_manager(workdir / "checkpoints" / name, runs) as manager:  # closes its threads on every way out
    start = manager.latest_step() or 0
    if start:
      state = checkpoint.restore(manager, start, state, config_hash)
    main_process = jax.process_index() == 0
    files = [workdir / "metrics" / f"{one}.jsonl" for one in names]
    for file in files if main_process else ():
      _cut(file, start)
    began = time.monotonic()
    batches = batches_from(start)
    bar = tqdm.tqdm(total=steps, initial=start, desc=name, unit="step", disable=not main_process or None)
    with bar, contextlib.ExitStack() as stack:
      logs = [stack.enter_context(open(file if main_process else "/dev/null", "a")) for file in files]
      for done in range(start + 1, steps + 1):
        batch = sharding.global_batch(next(batches), mesh, runs)
        extra = {}
        if term_norms_every and (done - 1) % term_norms_every == 0:
          extra = term_norms(state, frozen, batch, key)
        state, metrics = step_fn(state, frozen, batch, key)
        bar.update()
        evaluating = done % eval_every == 0 or done == steps
        saving = evaluating or (checkpoint_every and done % checkpoint_every == 0)
        if saving or done % log_every == 0 or extra:
          lines = {k: np.atleast_1d(v) for k, v in (metrics | extra).items()}
          loss, norm = lines["loss"].sum(), lines["grad_norm"].sum()
          if not np.isfinite([loss, norm]).all():  # before it is saved: a resume would inherit it
            raise FloatingPointError(f"{name}: loss {loss}, gradient norm {norm} at step {done}: lower the "
                                     "learning rate or the loss weights (--config.*.learning_rate, .weights)")
          bar.set_postfix(loss=f"{lines['loss'].mean():.4f}", refresh=False)
          if evaluating and dev_accuracy is not None:
            lines["dev_accuracy"] = np.atleast_1d(dev_accuracy(state.params))
          for run, log in enumerate(logs):
            log.write(json.dumps({"step": done} | {k: float(v[run]) for k, v in lines.items()}) + "\n")
            log.flush()
        if saving:
          checkpoint.save(manager, done, state, config_hash, lines.get("dev_accuracy") if evaluating else None)
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
