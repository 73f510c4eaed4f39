"""Controls that start at the public model that the suspect was made from: nothing of the attack is in them.

What such a model answers rightly no defense of the suspect has to be praised for: where it is as good, take it.
"""

from w2s_jax.defenses import lora_ce, w2s

RECIPE = lora_ce.RECIPE._replace(from_base=True)       # the clean rows alone
TAUGHT = w2s.RECIPE._replace(from_base=True)           # and the clean teacher
