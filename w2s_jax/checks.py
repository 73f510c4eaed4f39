"""What can be told to be wrong from a config alone."""

import re

from w2s_jax import InputError, lora
from w2s_jax.defenses import DEFENSES, w2s
from w2s_jax.models import quantized

TRAINING = ("warmup", "poison", "teach", "defend")   # sections of the config that say how a stage trains


def check_fields(config):
  """Raises InputError where a field is out of range, or does not go with another."""
  for name in config.defenses:
    if name not in DEFENSES:
      raise InputError(f"defense {name!r}: want names among {', '.join(DEFENSES)}: set --config.defenses")
  w2s.loss_weights(config.defend.weights, 1)
  fields = flat(config.to_dict())
  least = {"seed": 0, "log_every": 1, "term_norms_every": 0, "checkpoint_every": 0, "warmup.epochs": 0,
           "teach.epochs": 0,
           "data.eval_batch_size": 1, "lora.rank": 1, "teacher.layers": 0, "data.max_length": 4,
           "data.attack_max_length": 4, "probe.rows": 1, "data.num_labels": 0}
  ranges = {"defend.temperature": (1e-3, 1e3), "lora.dropout": (0.0, 0.99), "lora.alpha": (0.0, 1e6),
            "defend.insert_words": (0.0, 1.0), "probe.words": (0, 1000), "probe.sentences": (0, 1000)}
  for stage in TRAINING:
    least = {f"{stage}.epochs": 1, f"{stage}.batch_size": 1, f"{stage}.evaluations": 1, f"{stage}.max_steps": 0} | least
    ranges |= {f"{stage}.learning_rate": (0.0, 10.0), f"{stage}.warmup_fraction": (0.0, 1.0),
               f"{stage}.weight_decay": (0.0, 10.0), f"{stage}.clip_norm": (0.0, 1e6)}
  for field, low in least.items():
    if fields.get(field, low) < low:
      raise InputError(f"{field} is {fields[field]}, wanted at least {low}: set --config.{field}")
  for field, (low, high) in ranges.items():
    if field in fields and not low <= fields[field] <= high:
      raise InputError(f"{field} is {fields[field]}, wanted a number in {low:g}..{high:g}: set --config.{field}")
  triggers = fields.get("probe.triggers", ())
  if (not all(isinstance(t, str) and t.strip() for t in triggers) or len(set(triggers)) < len(triggers)
      or any(re.fullmatch(r"[\[(].*|\S+(,\S+)+", t) for t in triggers)):  # how a list looks that was not read as one
    raise InputError(f"probe.triggers {tuple(triggers)}: want different strings, e.g. \"('mn','cf')\": set "
                     "--config.probe.triggers")
  if config.teacher.layers and not config.teacher.path:
    raise InputError(f"teacher.layers is {config.teacher.layers} without a teacher.path to cut: set "
                     "--config.teacher.arch.num_hidden_layers for a fresh teacher, or --config.teacher.path")
  seeds = list(config.defend.seeds)
  if len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
    raise InputError(f"defend.seeds {tuple(seeds)}: want different integers of at least 0: set --config.defend.seeds")
  if config.lora.quantize:
    quantized.check(config.lora.quantize)
  trains = fields.get("poison.trains", lora.FULL)
  if not trains or set(trains) - set(lora.FULL):
    raise InputError(f"poison.trains {tuple(trains)}: want labels among {', '.join(lora.FULL)}: set "
                     "--config.poison.trains")
  longest = max(config.data.max_length, fields.get("data.attack_max_length", 0))
  if list(config.data.buckets) != sorted(config.data.buckets) or max(config.data.buckets, default=0) < longest:
    raise InputError(f"data.buckets {tuple(config.data.buckets)}: want ascending lengths of which the last holds "
                     f"{longest} tokens: set --config.data.buckets or --config.data.max_length/.attack_max_length")


def flat(tree, prefix=""):
  out = {}
  for k, v in tree.items():
    out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
  return out
