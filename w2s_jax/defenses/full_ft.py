"""Without LoRA: every parameter of the attacked student trains, with the clean teacher (`w2s_full`) or without
(`full_ft`, the control).

The paper's student learns through LoRA alone. A backdoor that lies in all kernels need not give way to adapters of low
rank; here nothing is frozen.
"""

from w2s_jax.adapters import trees
from w2s_jax.defenses import lora_ce, w2s

RATE = 0.2       # times the rate of LoRA: 2e-4 for 1e-3, tried on two MiniLM suspects (docs/notes/minilm_suspects.md)
CONTROL = lora_ce.RECIPE._replace(trains=trees.FULL, rate=RATE)
TAUGHT = w2s.RECIPE._replace(trains=trees.FULL, rate=RATE)
