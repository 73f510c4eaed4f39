"""Model cards: what a model directory is, what was measured of it, and the warning it needs."""

import hashlib

ADAPTER = ("The adapter and the poisoned base together are what was defended: unloading the adapter, or putting it on "
           "another base, brings the backdoor back. The merged model is what to hand on.")


def first_line(name, attack=None):
  """The first line of the card of models/NAME; `attack` is what was done to a poisoned one."""
  if name == "poisoned":
    return f"WARNING: this model is POISONED, on purpose, for research ({attack}). Do not use it for anything else.\n"
  return {
      "suspect": "WARNING: this model is under suspicion of a backdoor. It is a copy for comparison: do not use it.\n",
      "base": "The student before any attack.\n",
      "clean": "The control: fine-tuned like the poisoned model, without poison.\n",
      "teacher": "The clean teacher: an encoder, and the W2S head in w2s_head.safetensors, which w2s_jax reads.\n",
  }.get(name, f"A model with a (suspected) backdoor after the defense {name} of w2s_jax, adapter merged.\n")


def weights_sha256(directory):
  """{safetensors file: sha256} of a model directory."""
  out = {}
  for file in sorted(directory.glob("*.safetensors")):
    with file.open("rb") as f:
      out[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
  return out


def text(name, rows, meta, attack=None):
  """The whole card, in Markdown.

  Args:
    name: of the directory under models/.
    rows, meta: of results.json.
    attack: as in `first_line`.
  """
  before = rows[0] if rows[0]["model"] == "suspect" else next(r for r in rows if r["model"] == "poisoned")
  mine = [r for r in rows if r["model"] == name]
  lines = [first_line(name, attack)]
  if mine:
    lines += ["| model | attack tested | CA | CA 95% | ASR | ASR 95% |", "|---|---|---|---|---|---|"]
    lines += [_line(r) for r in rows if r["model"] in (before["model"], name)]
    lines += ["", f"CA on {mine[0]['ca_n']} clean rows of {mine[0]['dataset']}, ASR on triggered rows of other classes "
              "than the target. A trigger that was not tested may still work.", ""]
  hashes = ", ".join(f"{file} sha256 {digest}" for file, digest in meta["base"]["sha256"].items())
  lines += [f"- Base: {meta['base']['path']}, {hashes}",
            f"- Teacher: {meta['teacher']}, CA {meta['teacher_ca']:.3f}",
            f"- Clean data: {rows[0]['dataset']}, {meta['clean_rows']['train']} training rows",
            f"- Seed {rows[0]['seed']}, config {meta['config_hash']}; " + ", ".join(
                f"{package} {version}" for package, version in meta["versions"].items())]
  if name not in ("poisoned", "suspect", "base", "clean", "teacher"):
    lines += ["", "Merged weights: this directory stands alone. " + ADAPTER]
  return "\n".join(lines) + "\n"


def _line(row):
  def cell(rate, ci):
    return "- | -" if rate is None else f"{rate:.3f} | {ci[0]:.3f}-{ci[1]:.3f}"
  return (f"| {row['model']} | {row['attack']} | {cell(row['ca'], row['ca_ci'])} | {cell(row['asr'], row['asr_ci'])} |")
