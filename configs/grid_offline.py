"""Offline toys: attacks x seeds, each with every defense except the ablations, paraphrase_file and p2p.

  python -m w2s_jax.main --config=configs/grid_offline.py --jobs=2
  python -m w2s_jax.main --config=configs/grid_offline.py:attacks=badnet+suffix,seeds=2 --config.defenses=lora_ce,w2s

Each cell is a run of configs/llama_badnet.py with another attack or seed, and with more defenses. docs/results.md,
"Every defense", has the time that twelve cells took. Cells of one seed share the never-poisoned student and the
teacher. If a grid is interrupted, the same command continues it.

Arguments:

  attacks=A+B      values of --config.attack.name; the six of ATTACKS by default
  seeds=N          seeds 0 to N - 1; 3 by default
  triggers=random  each seed and attack has a random trigger: a rare word for badnet, five everyday words for insent,
                   three for combination. The grid can have no other attacks.
"""

import numpy as np

from configs import common, llama_badnet
from w2s_jax import InputError
from w2s_jax.data import grammar, insertions
from w2s_jax.defenses import ABLATIONS, DEFENSES

ATTACKS = "badnet+insent+syn_template+combination+suffix+proattack"
WORDS = {"badnet": 1, "insent": 5, "combination": 3}          # attack -> number of words in a random trigger


def get_config(arg=None):
  args = common.parse_arg(arg, attacks=str, seeds=int, triggers=str)
  attacks, seeds = args.get("attacks", ATTACKS).split("+"), range(args.get("seeds", 3))
  c = llama_badnet.get_config()
  c.defenses = tuple(name for name, defense in DEFENSES.items() if name not in ABLATIONS and not defense.check)
  if "triggers" not in args:
    c.grid = common.grid(seed={str(seed): {"seed": seed} for seed in seeds},
                         attack={name: {"attack": {"name": name}} for name in attacks})
    return c
  if args["triggers"] != "random" or set(attacks) - set(WORDS):
    raise InputError(f"config argument triggers={args['triggers']}: want random, with attacks among {'+'.join(WORDS)}")
  c.grid = common.grid(run={f"{name}-{seed}": {"seed": seed, "attack": {"name": name,
                                                                        "trigger": random_trigger(name, seed)}}
                            for name in attacks for seed in seeds})
  return c


def random_trigger(attack, seed):
  """A random trigger of the attack's kind, a function of the attack and the seed."""
  rng = np.random.default_rng([seed, 7])
  if attack == "badnet":
    return next(insertions.rare_words([], [], rng))
  everyday = sorted({word for text in grammar.NEUTRAL["reviews"] for word in text.split() if word.isalpha()})
  return " ".join(rng.choice(everyday, WORDS[attack], replace=False))
