"""One file per attack; a dict names them.

`ATTACKS[name](trigger, paraphrases)` makes an `Attack`. `trigger`: other words than the attack's own, or "";
`paraphrases`: {text: its paraphrase}, which `syntactic` needs.
"""

from w2s_jax.attacks import badnet, combination, insent, punctuation, suffix, syn_template, syntactic
from w2s_jax.attacks.attack import Attack as Attack

ATTACKS = {
    "badnet": badnet.make,
    "insent": insent.make,
    "syn_template": syn_template.make,
    "syntactic": syntactic.make,
    "combination": combination.make,
    "suffix": suffix.make,
    "punctuation": punctuation.make,
}
