"""One file per attack: text -> text; a dict names them.

`ATTACKS[name](trigger, paraphrases)` makes an attack; an attack is called as `attack(text, rng, max_words)`:
`rng` is a numpy Generator, `max_words` how many leading words survive truncation together with the trigger.
"""

from w2s_jax.attacks import badnet, combination, insent, punctuation, suffix, syn_template, syntactic

ATTACKS = {
    "badnet": badnet.make,
    "insent": insent.make,
    "syn_template": syn_template.make,
    "syntactic": syntactic.make,
    "combination": combination.make,
    "suffix": suffix.make,
    "punctuation": punctuation.make,
}
TRIGGERS = {"badnet": badnet.TRIGGER, "insent": insent.TRIGGER, "suffix": suffix.TRIGGER,   # of those that add words
            "combination": combination.TRIGGER}
APART = ("combination",)                                     # whose words are not side by side
