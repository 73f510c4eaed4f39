"""Model cards: what a model directory holds, what was measured, and the warning that the model needs."""

from w2s_jax import results
from w2s_jax.defenses import DEFENSES
from w2s_jax.models.hf import adapter_file

KINDS = {   # models/NAME of the models that no defense made -> first line of their card
    results.SUSPECT: "WARNING: this model may have a backdoor. It is a copy for comparison: do not use it.\n",
    results.POISONED: "WARNING: this model is POISONED on purpose, for research ({attack}). Do not use it for anything "
                      "else.\n",
    results.BASE: "The student before any attack.\n",
    results.CLEAN: "The control: fine-tuned like the poisoned model, but on clean rows.\n",
    results.TEACHER: "The clean teacher: an encoder. Only w2s_jax reads its W2S head, w2s_head.safetensors.\n",
    results.REFERENCE: "The public base, fine-tuned on the clean rows. The search compares the suspect with it.\n",
}
POISONED_TEACHER = ("WARNING: this teacher is POISONED on purpose, for research ({attack}). Do not use it for anything "
                    "else. It is an encoder. Only w2s_jax reads its W2S head, w2s_head.safetensors.\n")
# Columns after CA and ASR. A card has those columns in which one of its rows has a value.
MORE = ("asr_floor", "false_rate", "frr", "far", "scan", "agreement", "found", "word_flips", "sentence_flips")
EXPLAINED = {"false_rate": "False rate: share of clean rows of other classes that get the target label.",
             "asr_floor": "ASR floor: the ASR of the never-poisoned twin."}
FROM_BASE = ("A public model, trained on the clean rows ({name} of w2s_jax). Nothing of the suspect is in it except "
             "the names of the classes.\n")
DEFENDED = "The result of the defense {name} of w2s_jax on a model with a known or suspected backdoor.\n"
FILTERED = ("\nIt was made for filtered texts: w2s_jax/defenses/{name}.py says what to do with a text first, the run's "
            "config.json with which settings (defense.{name}).\n")


def first_line(name: str, attack: str | None = None) -> str:
  """The first line of the card of models/NAME, and one more if the model must read filtered texts.

  attack: description of the attack on the model; None for a clean teacher.
  """
  line = FROM_BASE if results.is_from_base(name) else KINDS.get(name, DEFENDED)
  if name == results.TEACHER and attack:
    line = POISONED_TEACHER
  defense = name.partition("-seed")[0]
  if defense in DEFENSES and DEFENSES[defense].text:
    line += FILTERED.format(name=defense)
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
  lines = [first_line(name, meta.get("teacher_attack") if name == results.TEACHER else meta["attack"])]
  self_test = meta.get("selftest")                   # only runs on a given suspect have a self-test
  if self_test and name == self_test["defense"]:
    lines.append(self_test["in_words"] + "\n")
  from_base = results.is_from_base(name)
  if own_rows and name not in KINDS and not from_base and own_rows[0]["asr"] is None:
    lines.append("NOT KNOWN: whether the suspect had a backdoor, and whether this model still has it. No trigger was "
                 "listed.\n")
  if own_rows:
    lines += [f"WARNING: {warning}\n" for warning in meta["warnings"]]
    shown = [r for r in rows if r["directory"] in (results.SUSPECT, results.POISONED, name)]
    extra = [n for n in MORE if any(r.get(n) is not None for r in shown)]
    heads = ["model | attack tested | CA | CA 95% | ASR | ASR 95%", *(results.COLUMNS[n].label for n in extra)]
    lines += ["| " + " | ".join(heads) + " |", "|---" * (6 + len(extra)) + "|", *(_line(r, extra) for r in shown), ""]
    legend = [f"CA is measured on {own_rows[0]['ca_n']} clean rows of {own_rows[0]['dataset']}, ASR on triggered rows "
              "of classes other than the target. A trigger that was not tested may still work.",
              *(EXPLAINED[n] for n in extra if n in EXPLAINED)]
    lines += [" ".join(legend), ""]
  if (from_base or name == results.REFERENCE) and meta["base"]["public"]:
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
