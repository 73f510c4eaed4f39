"""Model cards: what a model directory is, what was measured of it, and the warning it needs."""

from w2s_jax.models.hf import adapter_file

KINDS = {   # models/NAME of what is no defense
    "suspect": "WARNING: this model is under suspicion of a backdoor. It is a copy for comparison: do not use it.\n",
    "poisoned": "WARNING: this model is POISONED on purpose, for research ({attack}). Do not use it otherwise.\n",
    "base": "The student before any attack.\n",
    "clean": "The control: fine-tuned like the poisoned model, without poison.\n",
    "teacher": "The clean teacher: an encoder, and the W2S head in w2s_head.safetensors, which w2s_jax reads.\n",
}
# Beside CA and ASR, where some row has it.
MORE = {"asr_floor": "ASR floor", "false_rate": "false rate", "scan": "scan", "agreement": "agreement",
        "word_flips": "word flips", "sentence_flips": "sentence flips"}
DEFENDED = "A model with a (suspected) backdoor after the defense {name} of w2s_jax.\n"


def first_line(name, attack=None):
  """The first line of the card of models/NAME; `attack` is what was done to a poisoned one."""
  return KINDS.get(name, DEFENDED).format(name=name, attack=attack)


def text(name, rows, meta, attack=None, adapter=False):
  """The whole card, in Markdown.

  Args:
    name: of the directory under models/.
    rows, meta: of results.json.
    attack: as in `first_line`.
    adapter: whether the directory has a w2s_adapter.safetensors.
  """
  mine = [r for r in rows if r["directory"] == name]
  lines = [first_line(name, attack)]
  if mine:
    lines += [note + "\n" for note in meta.get("notes", ()) if note.startswith("WARNING")]
    shown = [r for r in rows if r["directory"] in ("suspect", "poisoned", name)]
    more = [n for n in MORE if any(r.get(n) is not None for r in shown)]
    lines += ["| " + " | ".join(["model | attack tested | CA | CA 95% | ASR | ASR 95%", *(MORE[n] for n in more)])
              + " |", "|---" * (6 + len(more)) + "|"]
    lines += [_line(r, more) for r in shown]
    lines += ["", f"CA on {mine[0]['ca_n']} clean rows of {mine[0]['dataset']}, ASR on triggered rows of other classes "
              "than the target. A trigger that was not tested may still work."
              + " False rate: the model's own error on un-triggered rows of those classes." * ("false_rate" in more)
              + " ASR floor: the ASR of a twin that was never poisoned." * ("asr_floor" in more), ""]
  if name != "teacher":
    hashes = ", ".join(f"{file} sha256 {digest}" for file, digest in meta["base"]["sha256"].items())
    lines.append(f"- Base: {meta['base']['path']}, {hashes}")
  if name == "teacher" or name not in KINDS:
    lines += [f"- Teacher: {meta['teacher']}, CA {meta['teacher_ca']:.3f}",
              f"- Clean data: {rows[0]['dataset']}, {meta['clean_rows']['train']} training rows"]
  lines.append(f"- Seed {(mine or rows)[0]['seed']}, config {meta['config_hash']}; " + ", ".join(
      f"{package} {version}" for package, version in meta["versions"].items()))
  if adapter:
    lines += ["", adapter_file.NOTE.rstrip()]
  return "\n".join(lines) + "\n"


def _line(row, more):
  def cell(rate, ci):
    return "- | -" if rate is None else f"{rate:.3f} | {ci[0]:.3f}-{ci[1]:.3f}"
  return (f"| {row['model']} | {escape(row['attack'])} | {cell(row['ca'], row['ca_ci'])} | "
          f"{cell(row['asr'], row['asr_ci'])} |" + "".join(
              " - |" if row[n] is None else f" {row[n]:.3f} |" for n in more))


def escape(text):
  """The text in a cell of a Markdown table."""
  return " ".join(text.split()).replace("|", "\\|")
