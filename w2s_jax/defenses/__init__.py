"""Defenses: one file per defense; `DEFENSES` maps names to records."""

from w2s_jax.defenses import (
    anchors,
    beear,
    crow,
    distill,
    fine_mix,
    fine_prune,
    from_base,
    full_ft,
    lethe,
    lora_ce,
    merge,
    nad,
    onion,
    p2p,
    paraphrase_file,
    prune,
    psim,
    quantize,
    rap,
    strip,
    w2s,
    w2s_adv,
    w2s_released,
    w2s_words,
)
from w2s_jax.defenses.records import Defense, Ranking, Recipe, Suspect

_DISTILS = {"w2s": w2s.Settings}
_ADVERSARY = _DISTILS | {"adversary": w2s_adv.Settings}
_W2S_ADV = w2s_adv.with_adversary(w2s.RECIPE)

DEFENSES = {
    "none": Defense(),                                # the attacked model as it is
    "lora_ce": Defense(lora_ce.RECIPE),
    "full_ft": Defense(full_ft.CONTROL),
    "w2s_full": Defense(full_ft.TAUGHT, settings=_DISTILS),
    "w2s_words": Defense(w2s_words.RECIPE, settings=_DISTILS | {"words": w2s_words.Settings}),
    "from_base": Defense(from_base.RECIPE),
    "from_base_words": Defense(from_base.WORDS, settings={"from_base_words": from_base.Settings}),
    "w2s": Defense(w2s.RECIPE, settings=_DISTILS),
    "w2s_released": Defense(w2s_released.RECIPE, settings=_DISTILS),
    "w2s_adv": Defense(_W2S_ADV, settings=_ADVERSARY),
    "beear": Defense(beear.RECIPE, settings={"beear": beear.Settings}),
    "crow": Defense(crow.RECIPE, settings={"crow": crow.Settings}),
    "nad": Defense(nad.RECIPE, settings={"nad": nad.Settings}),
    "prune": Defense(weights=prune.weights, settings={"prune": prune.Settings}),
    "quantize": Defense(weights=quantize.weights, settings={"quantize": quantize.Settings}),
    "merge": Defense(weights=merge.weights, settings={"merge": merge.Settings}, mixes_base=True),
    "lethe": Defense(weights=lethe.weights, settings={"lethe": lethe.Settings}, mixes_base=True),
    "fine_mix": Defense(fine_mix.RECIPE, settings={"fine_mix": fine_mix.Settings}, mixes_base=True),
    "fine_prune": Defense(fine_prune.RECIPE, settings={"fine_prune": fine_prune.Settings}),
    "p2p": Defense(weights=p2p.weights, text=p2p.text, settings={"p2p": p2p.Settings}, check=p2p.check),
    "onion": Defense(text=onion.text, settings={"onion": onion.Settings}),
    "paraphrase_file": Defense(text=paraphrase_file.text, settings={"paraphrase_file": paraphrase_file.Settings},
                               check=paraphrase_file.paraphrases),
    "strip": Defense(accept=strip.accept, settings={"strip": strip.Settings}),
    "rap": Defense(accept=rap.accept, settings={"rap": rap.Settings}),
    "psim": Defense(accept=psim.accept, settings={"psim": psim.Settings}),
}
# Ablations of w2s and w2s_adv: other anchors than the teacher's outputs on the student's own text, or no teacher.
ABLATIONS = {
    "w2s_shuffled": Defense(w2s.RECIPE._replace(teacher_view=anchors.shuffled), settings=_DISTILS),
    "ce_adv": Defense(w2s_adv.with_adversary(lora_ce.RECIPE), settings=_ADVERSARY),
} | {f"w2s_adv_{name}": Defense(_W2S_ADV._replace(teacher_view=anchor), settings=_ADVERSARY) for name, anchor in (
    ("shuffled", anchors.shuffled), ("within", anchors.shuffled_within_classes), ("means", anchors.class_means),
    ("orthogonal", anchors.orthogonal))}
DEFENSES |= ABLATIONS
SETTINGS = {name: cls for defense in DEFENSES.values() for name, cls in defense.settings.items()}

__all__ = ["ABLATIONS", "DEFENSES", "SETTINGS", "Defense", "Ranking", "Recipe", "Suspect", "distill"]
