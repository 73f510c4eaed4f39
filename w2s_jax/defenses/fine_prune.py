"""Fine-Pruning (Liu et al., RAID 2018, arXiv 1805.12185): prunes the units that clean rows use least, then fine-tunes.

The paper's premise is that a backdoor lives in units that are dormant on clean inputs. It prunes the last convolutional
layer until the accuracy on clean rows drops, and fine-tunes what is left on clean rows.

Ours prunes a fixed share of the units of every layer's MLP. The activation of such a unit may be negative, so the
measure of activity is the L2 norm of the activations over all clean rows. Then all parameters train, as in `full_ft`.
Nothing goes into a pruned unit and nothing reads it, so all its gradients are zero and it stays dead. L layers, D
width, F units.
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from w2s_jax.config import field
from w2s_jax.defenses import full_ft, prune
from w2s_jax.defenses.records import Suspect

READS_UNITS = r"layers/mlp/(down_proj|c_proj|Wo)/kernel"                              # [L, F, D]
MAKES_UNITS = r"layers/mlp/(gate_proj|up_proj|gate_up_proj|c_fc|Wi)/(kernel|bias)"    # [L, D, F] and [L, F], or 2 * F


@dataclasses.dataclass
class Settings:
  """Fine-Pruning: the units that clean rows use least are pruned."""
  share: float = field(0.3, "share of each MLP's units to prune", low=0.0, high=1.0, source="ours; not tuned")


def start(suspect: Suspect, settings: Any, params: dict, arrays: dict, seed: int) -> tuple[dict, dict]:
  """(the parameters with the least active units of each layer's MLP set to zero, the unchanged arrays)."""
  del seed
  activity, = (norms for path, norms in prune.input_norms(suspect, len(suspect.train)).items()
               if re.fullmatch(READS_UNITS, path))                                                # [L, F]
  rank = jnp.argsort(jnp.argsort(activity, axis=1), axis=1)
  alive = rank >= round(settings.fine_prune.share * rank.shape[1])
  def pruned(path, leaf):
    path = "/".join(path)
    if re.fullmatch(READS_UNITS, path):
      return jnp.where(alive[:, :, None], leaf, 0)
    if re.fullmatch(MAKES_UNITS, path):
      columns = jnp.tile(alive, leaf.shape[-1] // rank.shape[1])                       # a fused kernel has 2 F outputs
      return jnp.where(columns if leaf.ndim == 2 else columns[:, None], leaf, 0)
    return leaf
  return traverse_util.path_aware_map(pruned, params), arrays


RECIPE = full_ft.CONTROL._replace(augment=start)
