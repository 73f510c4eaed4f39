"""Controls that start at the public model that the suspect was made from: nothing of the attack is in them.

A defense of the suspect is worth its cost only where it keeps more CA than these do.
"""

from w2s_jax.defenses import lora_ce, w2s

RECIPE = lora_ce.RECIPE._replace(from_base=True)       # the clean rows alone
TAUGHT = w2s.RECIPE._replace(from_base=True)           # and the clean teacher
