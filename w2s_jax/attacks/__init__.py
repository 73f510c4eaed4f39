"""Attacks on training texts: one file per attack; `ATTACKS` maps names to their factories.

`ATTACKS[name](trigger, paraphrases)` makes an `Attack`. `trigger` replaces the attack's own trigger; "" keeps it.
`paraphrases` is {text: its paraphrase}; only the attacks of paraphrase.py need it.
"""

from w2s_jax.attacks import (
    badnet,
    combination,
    embedding,
    insent,
    paraphrase,
    proattack,
    punctuation,
    suffix,
    syn_template,
)
from w2s_jax.attacks.attack import Attack as Attack

ATTACKS = {
    "badnet": badnet.make,
    "insent": insent.make,
    "syn_template": syn_template.make,
    "syntactic": paraphrase.make,
    "style": paraphrase.make,
    "combination": combination.make,
    "suffix": suffix.make,
    "punctuation": punctuation.make,
    "proattack": proattack.make,
    "embedding": embedding.make,
}
