"""Model cards: what a model directory holds, what was measured, and the warning that the model needs."""

from w2s_jax import results
from w2s_jax.models.hf import adapter_file

KINDS = {   # models/NAME of the models that no defense made -> first line of their card
    results.SUSPECT: "WARNING: this model is under suspicion of a backdoor. It is a copy for comparison: do not use it."
                     "\n",
    results.POISONED: "WARNING: this model is POISONED on purpose, for research ({attack}). Do not use it otherwise.\n",
    results.BASE: "The student before any attack.\n",
    results.CLEAN: "The control: fine-tuned like the poisoned model, without poison.\n",
    results.TEACHER: "The clean teacher: an encoder, and the W2S head in w2s_head.safetensors, which w2s_jax reads.\n",
}
# Columns of a card after CA and ASR; a card shows those that have a value in one of its rows.
MORE = ("asr_floor", "false_rate", "frr", "far", "scan", "agreement", "found", "word_flips", "sentence_flips")
EXPLAINED = {"false_rate": "False rate: the model's own error on un-triggered rows of those classes.",
             "asr_floor": "ASR floor: the ASR of a twin that was never poisoned."}
FROM_BASE = ("A control: the public base of the suspect, trained on the clean rows ({name} of w2s_jax). Nothing of the "
             "suspect is in it but the names of its classes.\n")
DEFENDED = "A model with a (suspected) backdoor after the defense {name} of w2s_jax.\n"


def first_line(name: str, attack: str | None = None) -> str:
  """The first line of the card of models/NAME; `attack` describes the attack on a poisoned model."""
  line = FROM_BASE if name.startswith("from_base") else KINDS.get(name, DEFENDED)
  return line.format(name=name, attack=attack)


def unmeasured(name: str, attack: str | None = None) -> str:
  """The card of models/NAME before the report is made."""
  return f"{first_line(name, attack)}\nNot measured yet: the stages `evaluate` and `report` write the figures here.\n"


def text(name: str, rows: list[dict], meta: dict, adapter: bool = False) -> str:
  """The whole card, in Markdown.

  Args:
    name: name of the directory under models/.
    rows, meta: contents of results.json.
    adapter: whether the directory has a w2s_adapter.safetensors.
  """
  own_rows = [r for r in rows if r["directory"] == name]
  lines = [first_line(name, meta["attack"])]
  tested = meta.get("selftest")                      # only runs on a given suspect have a self-test
  if tested and name == tested["defense"]:
    lines.append(tested["in_words"] + "\n")
  from_base = name.startswith("from_base")
  if own_rows and name not in KINDS and not from_base and own_rows[0]["asr"] is None:
    lines.append("NOT KNOWN: whether a backdoor was in the suspect, and whether it is left here: no trigger was "
                 "listed.\n")
  if own_rows:
    lines += [f"WARNING: {warning}\n" for warning in meta["warnings"]]
    shown = [r for r in rows if r["directory"] in (results.SUSPECT, results.POISONED, name)]
    extra = [n for n in MORE if any(r.get(n) is not None for r in shown)]
    heads = ["model | attack tested | CA | CA 95% | ASR | ASR 95%", *(results.COLUMNS[n].label for n in extra)]
    lines += ["| " + " | ".join(heads) + " |", "|---" * (6 + len(extra)) + "|", *(_line(r, extra) for r in shown), ""]
    below = [f"CA on {own_rows[0]['ca_n']} clean rows of {own_rows[0]['dataset']}, ASR on triggered rows of other "
             "classes than the target. A trigger that was not tested may still work.",
             *(EXPLAINED[n] for n in extra if n in EXPLAINED)]
    lines += [" ".join(below), ""]
  if from_base and meta["base"]["public"]:
    lines.append(f"- Base: {meta['base']['public']}")
  elif name != results.TEACHER:
    hashes = ", ".join(f"{file} sha256 {digest}" for file, digest in meta["base"]["sha256"].items())
    lines.append(f"- Base: {meta['base']['path']}, {hashes}")
  if name == results.TEACHER or name not in KINDS:
    lines += [f"- Teacher: {meta['teacher']}, CA {meta['teacher_ca']:.3f}",
              f"- Clean data: {rows[0]['dataset']}, {meta['clean_rows']['train']} training rows"]
  lines.append(f"- Seed {(own_rows or rows)[0]['seed']}, config {meta['config_hash']}; " + ", ".join(
      f"{package} {version}" for package, version in meta["versions"].items()))
  if adapter:
    lines += ["", adapter_file.NOTE.rstrip()]
  return "\n".join(lines) + "\n"


def _line(row, extra):
  def cell(value, ci):
    return "- | -" if value is None else f"{results.rate(value)} | {results.interval(ci)}"
  return (f"| {row['model']} | {results.escape(row['attack'])} | {cell(row['ca'], row['ca_ci'])} | "
          f"{cell(row['asr'], row['asr_ci'])} |" + "".join(f" {results.rate(row[n])} |" for n in extra))
