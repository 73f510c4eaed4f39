"""Which part of `w2s_adv` removes the backdoor? Variations of it on the same poisoned offline toys.

  python -m w2s_jax.main --config=configs/grid_ablation.py --jobs=2

The variation `main` has the unchanged `w2s_adv` and all its controls. Every other variation changes the loss weights,
the adapters or the teacher. docs/notes/w2s_adv_offline.md has a table of the results.

Arguments: attacks=A+B (values of --config.attack.name; badnet+insent by default), seeds=N (0 to N - 1; 3 by default).
"""

from configs import common, llama_badnet
from w2s_jax.defenses import DEFENSES

CONTROLS = tuple(name for name, defense in DEFENSES.items() if defense.recipe and defense.recipe.soft_tokens)


def _teacher(width, layers, heads):
  return {"teacher": {"arch": {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
                               "num_attention_heads": heads}}}


VARIATIONS = {
    "main": {"defenses": ("none", "lora_ce", "w2s", *CONTROLS)},
    "without_fa": {"defense": {"w2s": {"weights": "1,1,0"}}},
    "without_kd": {"defense": {"w2s": {"weights": "1,0,0.01"}}},
    "fa_x3": {"defense": {"w2s": {"weights": "1,1,0.03"}}},
    "fa_x10": {"defense": {"w2s": {"weights": "1,1,0.1"}}},
    "adapters_q_v": {"lora": {"targets": ("q_proj", "v_proj")}},
    "teacher_weaker": _teacher(8, 1, 2) | {"teach": {"epochs": 1}},
    "teacher_as_large": _teacher(64, 3, 4),
    "teacher_stronger": _teacher(128, 4, 4),
}


def get_config(arg=None):
  args = common.parse_arg(arg, attacks=str, seeds=int)
  attacks = args.get("attacks", "badnet+insent").split("+")
  c = llama_badnet.get_config()
  c.defenses = ("none", "lora_ce", "w2s_adv")
  c.grid = common.grid(seed={str(seed): {"seed": seed} for seed in range(args.get("seeds", 3))},
                       attack={name: {"attack": {"name": name}} for name in attacks},
                       variation=VARIATIONS)
  return c
