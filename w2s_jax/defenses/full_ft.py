"""Full fine-tuning of the attacked student, with the clean teacher (`w2s_full`) or without it (`full_ft`, the control).

The paper's student trains through LoRA alone. Adapters of low rank may not remove a backdoor that lies in all kernels.
Here nothing is frozen.
"""

from w2s_jax.adapters import trees
from w2s_jax.defenses import lora_ce, w2s

RATE = 0.2       # multiple of LoRA's rate (2e-4 for 1e-3); tried on two MiniLM suspects, docs/notes/minilm_suspects.md
CONTROL = lora_ce.RECIPE._replace(trains=trees.FULL, rate=RATE)
TAUGHT = w2s.RECIPE._replace(trains=trees.FULL, rate=RATE)
