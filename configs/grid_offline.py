"""Offline toys: attacks x seeds, each with the same defenses; one table of means at the end.

  python -m w2s_jax.main --config=configs/grid_offline.py
  python -m w2s_jax.main --config=configs/grid_offline.py:attacks=badnet+suffix,seeds=2 --config.defenses=lora_ce,w2s

Each cell is a run of configs/llama_badnet.py with another attack or seed; that file says what a run costs. Cells of one
seed share the never-poisoned student and the teacher. A grid that was cut off goes on where it was.

Arguments: attacks=A+B (names of --config.attack.name), seeds=N (0 to N - 1).
"""

from configs import common, llama_badnet

ATTACKS = "badnet+insent+syn_template+combination+suffix+proattack"


def get_config(arg=None):
  args = common.parse_arg(arg, attacks=str, seeds=int)
  c = llama_badnet.get_config()
  c.defenses = ("none", "lora_ce", "w2s", "w2s_adv", "prune", "onion", "strip")
  c.grid = common.grid(
      seed={str(seed): {"seed": seed} for seed in range(args.get("seeds", 3))},
      attack={name: {"attack": {"name": name}} for name in args.get("attacks", ATTACKS).split("+")})
  return c
