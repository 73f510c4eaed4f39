"""fit(): the only training loop in the repository."""

import json
import time

import jax
import numpy as np
import tqdm

from w2s_jax import checkpoint, sharding


def fit(name, step_fn, state, frozen, batches_from, *, steps, key, mesh, eval_every, workdir, config_hash,
        dev_accuracy=None, log_every=10, checkpoint_every=0, term_norms=None, term_norms_every=0):
  """Trains to `steps`, from the last checkpoint where there is one, and returns the best trainable parameters.

  Args:
    name: of the stage; metrics go to workdir/metrics/NAME.jsonl, checkpoints to workdir/checkpoints/NAME.
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
    (trainable parameters, {"step", "dev_accuracy", "seconds"} of the choice).
  """
  with checkpoint.open_manager(workdir / "checkpoints" / name) as manager:  # closes its threads on every way out
    start = manager.latest_step() or 0
    if start:
      state = checkpoint.restore(manager, start, state, config_hash)
    main_process = jax.process_index() == 0
    metrics_file = workdir / "metrics" / f"{name}.jsonl"
    if main_process:
      _cut(metrics_file, start)
    began = time.monotonic()
    batches = batches_from(start)
    bar = tqdm.tqdm(total=steps, initial=start, desc=name, unit="step", disable=not main_process or None)
    with bar, open(metrics_file if main_process else "/dev/null", "a") as log:
      for done in range(start + 1, steps + 1):
        batch = sharding.global_batch(next(batches), mesh)
        extra = {}
        if term_norms_every and (done - 1) % term_norms_every == 0:
          extra = term_norms(state, frozen, batch, key)
        state, metrics = step_fn(state, frozen, batch, key)
        bar.update()
        evaluating = done % eval_every == 0 or done == steps
        saving = evaluating or (checkpoint_every and done % checkpoint_every == 0)
        if saving or done % log_every == 0 or extra:
          line = {k: float(v) for k, v in (metrics | extra).items()}
          if not np.isfinite([line["loss"], line["grad_norm"]]).all():  # before it is saved: a resume would inherit it
            raise FloatingPointError(f"{name}: loss {line['loss']}, gradient norm {line['grad_norm']} at step {done}: "
                                     "lower the learning rate or the loss weights (--config.*.learning_rate, .weights)")
          bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
          if evaluating and dev_accuracy is not None:
            line["dev_accuracy"] = float(dev_accuracy(state.params))
          log.write(json.dumps({"step": done} | line) + "\n")
          log.flush()
        if saving:
          checkpoint.save(manager, done, state, config_hash, line.get("dev_accuracy") if evaluating else None)
    manager.wait_until_finished()
    best = manager.best_step() if dev_accuracy is not None else steps
    if best != steps:
      state = checkpoint.restore(manager, best, state, config_hash)
    accuracy = manager.metrics(best)["dev_accuracy"] if dev_accuracy is not None else None
    return state.params, {"step": best, "dev_accuracy": accuracy, "seconds": time.monotonic() - began}


def _cut(metrics_file, step):
  """Drops lines past `step`: they belong to work that the interrupted run lost."""
  metrics_file.parent.mkdir(parents=True, exist_ok=True)
  lines = metrics_file.read_text().splitlines(keepends=True) if metrics_file.exists() else []
  whole = [line for line in lines if line.endswith("\n")]
  metrics_file.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
