"""Controls that start from the public model that the suspect was made from: they contain nothing of the attack.

A defense of the suspect is worth its cost only if it keeps more CA than these controls.
"""

from w2s_jax.defenses import lora_ce, w2s

RECIPE = lora_ce.RECIPE._replace(from_base=True)       # trains on the clean rows alone
TAUGHT = w2s.RECIPE._replace(from_base=True)           # trains on the clean rows with the clean teacher
