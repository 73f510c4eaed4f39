"""Orbax checkpoints of the state and the config hash, by step. The step is also the position in the data.

The latest checkpoint and the best one by dev accuracy stay on disk.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from w2s_jax import InputError
from w2s_jax.training.steps import TrainState


def open_manager(directory: Path, runs: int = 1) -> ocp.CheckpointManager:
  """The checkpoint manager of one stage. Saving is atomic and asynchronous.

  With several runs every evaluated checkpoint stays on disk, because each run has its own best checkpoint.
  """
  def accuracy(metrics):
    return metrics["dev_accuracy"]
  n = 1 if runs == 1 else None
  keep = preservation_policy.AnyPreservationPolicy([
      preservation_policy.LatestN(1),
      preservation_policy.BestN(get_metric_fn=accuracy, n=n, keep_checkpoints_without_metrics=False)])
  return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(
      best_fn=accuracy, preservation_policy=keep))


def save(manager: ocp.CheckpointManager, step: int, state: TrainState, config_hash: str,
         dev_accuracy: list[float] | None = None) -> None:
  """Saves the state of a step.

  dev_accuracy: [runs]; None if it was not measured at this step.
  """
  metrics = None
  if dev_accuracy is not None:
    metrics = {"dev_accuracy": float(np.mean(dev_accuracy)), "each": [float(a) for a in dev_accuracy]}
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()),
                                             meta=ocp.args.JsonSave({"config_hash": config_hash})), metrics=metrics)


def best_steps(manager: ocp.CheckpointManager, runs: int) -> list[tuple[int, float]]:
  """[(step, dev accuracy)] of each run's best evaluated checkpoint. Among equally good ones it is the latest."""
  accuracies_at = {step: metrics["each"] for step in manager.all_steps() if (metrics := manager.metrics(step))}
  return [max(((step, accuracies[run]) for step, accuracies in accuracies_at.items()),
              key=lambda scored: (scored[1], scored[0])) for run in range(runs)]


def restore(manager: ocp.CheckpointManager, step: int, state: TrainState, config_hash: str) -> TrainState:
  """The state saved at `step`, with the shardings of `state`.

  Raises:
    InputError: another config made the checkpoint, or its leaves do not fit `state`.
  """
  made_by = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta["config_hash"]
  if made_by != config_hash:
    raise InputError(f"checkpoint {manager.directory} was made by config {made_by}, this run is {config_hash}: give "
                     "another --workdir")
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
  try:
    saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
  except ValueError as e:
    what = str(e).splitlines()[0].rstrip(":")
    raise InputError(f"checkpoint {manager.directory}/{step} does not fit ({what}), another version of the program may "
                     "have made it: move it away, or give another --workdir") from e
  return type(state)(**saved.state)
