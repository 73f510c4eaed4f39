"""Orbax: state, data position (the step) and config hash; the latest checkpoint and the best by dev accuracy stay."""

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from w2s_jax import InputError


def open_manager(directory):
  """CheckpointManager of one stage; saving is atomic and asynchronous."""
  def accuracy(metrics):
    return metrics["dev_accuracy"]
  keep = preservation_policy.AnyPreservationPolicy([
      preservation_policy.LatestN(1),
      preservation_policy.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)])
  return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(
      best_fn=accuracy, preservation_policy=keep))


def save(manager, step, state, config_hash, dev_accuracy=None):
  metrics = None if dev_accuracy is None else {"dev_accuracy": dev_accuracy}
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()),
                                             meta=ocp.args.JsonSave({"config_hash": config_hash})), metrics=metrics)


def restore(manager, step, state, config_hash):
  """The state saved at `step`, placed like `state`.

  Raises:
    InputError: the checkpoint was made by another config.
  """
  made_by = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta["config_hash"]
  if made_by != config_hash:
    raise InputError(f"checkpoint {manager.directory} was made by config {made_by}, this run is {config_hash}: give "
                     "another --workdir")
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
  saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
  return type(state)(**saved.state)
