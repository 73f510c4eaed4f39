"""Attacks on training texts: one file per attack; `ATTACKS` maps names to their factories.

`ATTACKS[name](trigger, paraphrases)` makes an `Attack`. `trigger` replaces the attack's own trigger; "" keeps it.
`paraphrases` is {text: its paraphrase}; only `syntactic` needs it.
"""

from w2s_jax.attacks import badnet, combination, insent, proattack, punctuation, suffix, syn_template, syntactic
from w2s_jax.attacks.attack import Attack as Attack

ATTACKS = {
    "badnet": badnet.make,
    "insent": insent.make,
    "syn_template": syn_template.make,
    "syntactic": syntactic.make,
    "combination": combination.make,
    "suffix": suffix.make,
    "punctuation": punctuation.make,
    "proattack": proattack.make,
}
