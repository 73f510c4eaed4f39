"""Writes results.md and report.html, with tables and plots, from results.json, features.json and metrics/."""

import difflib
import html
import itertools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from w2s_jax import processes, results
from w2s_jax.report import plots, tables

LOG = logging.getLogger(__name__)


def write(workdir: Path) -> tuple[list[dict], dict]:
  """Writes results.md and report.html from the files of the other stages, and logs the table. Returns (rows, meta)."""
  saved = json.loads((workdir / "results.json").read_text())
  rows, meta = saved["rows"], saved["meta"]
  notes = [*(f"WARNING: {w}" for w in meta["warnings"]), *meta["notes"], *filter(None, [stealth(meta)])]
  markdown = tables.table(rows, meta["columns"]) + "\n\n" + "\n".join(f"- {n}" for n in notes) + "\n"
  processes.write_text(workdir / "results.md", markdown)
  file = workdir / "features.json"                 # workdirs of older versions do not have it
  pictures = json.loads(file.read_text()) if file.exists() else {}
  processes.write_text(workdir / "report.html", page(rows, meta, _curves(workdir), pictures))
  LOG.info(f"\n{markdown}\n{workdir / 'report.html'}")
  return rows, meta


def _curves(workdir):
  """{stage: {term: [(step, value)]}} from metrics/STAGE.jsonl."""
  out = {}
  for file in sorted((workdir / "metrics").glob("*.jsonl")):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = [k for k in lines[0] if k not in ("step", "dev_accuracy") and "grad_norm" not in k] if lines else []
    out[file.stem] = {n: [(line["step"], line[n]) for line in lines] for n in names}
  return out


def page(rows: list[dict], meta: dict, curves: dict[str, dict[str, list[tuple[int, float]]]], pictures: dict) -> str:
  """One self-contained HTML page.

  Args:
    rows, meta: contents of results.json.
    curves: {stage: {"loss" or a term: [(step, value)]}}.
    pictures: contents of features.json; {} if there are none.
  """
  title = html.escape(meta["title"])
  first, *notes = map(_inline, meta["notes"])
  warnings = "".join(f"<p class='warning'>WARNING: {_inline(warning)}</p>" for warning in meta["warnings"])
  details = html.escape(json.dumps({k: v for k, v in meta.items() if k != "examples"}, indent=2))
  return frame(f"{title}: before and after", f"""{warnings}
<p>{first}</p>
{_table(rows, meta["columns"])}
{wide(plots.bars(rows))}
<ul>{"".join(f"<li>{note}</li>" for note in notes)}</ul>
{_features(pictures, rows)}
{_examples(rows, meta)}
{_losses(curves, meta)}
<details><summary>All facts about this run</summary><pre>{details}</pre></details>""")


def frame(title: str, body: str) -> str:
  """One self-contained HTML page; `title` and `body` are HTML already."""
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  print-color-adjust: exact }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; vertical-align: top }}
dt {{ font-weight: bold }}
.texts td:first-child {{ min-width: 16rem }}
.hit {{ background: #fbd9d3 }}
.warning {{ background: #fff3cd; border-left: .3rem solid #d39e00; padding: .5rem .8rem }}
.wide {{ overflow-x: auto }}
.wide svg {{ width: 100%; min-width: 40rem; height: auto }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
@media print {{ .wide {{ overflow: visible }} .wide svg {{ min-width: 0 }} .texts {{ font-size: 11px }}
  tr, svg {{ break-inside: avoid }} h2, p {{ break-after: avoid }} }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def table(lines: Sequence[tuple[str, ...]]) -> str:
  """The HTML table of a header line and the other lines."""
  head, *body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
                 for tag, line in zip(itertools.chain(["th"], itertools.repeat("td")), lines))
  return wide(f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in body)}</table>")


def _inline(text):
  """A note in HTML, with text between backticks as code."""
  return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def wide(content: str) -> str:
  """The HTML in a box that scrolls sideways if the window is too narrow."""
  return f'<div class="wide">{content}</div>'


def _table(rows, names):
  """The table of results, with explanations of its columns."""
  meanings = "".join(f"<dt>{column.label}</dt><dd>{html.escape(column.explanation.replace('*', ''))}</dd>"
                     for column in results.columns(rows, names) if column.explanation)
  return table(tables.cells(rows, names)) + (
      f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>")


def _features(pictures, rows):
  """The features of each model. For a defense with several seeds it shows the first seed."""
  first = dict.fromkeys(row["directory"] for row in rows if row["directory"] == row["model"])
  names = [name for name in first if name in pictures.get("models", {})]
  if not names:
    return ""
  target, string = pictures["target"], f"<code>{html.escape(pictures['trigger'])}</code>"
  inserted = f"with the trigger {string}."
  if pictures["found"]:
    inserted = f"with the string {string}, which the search found. Clean models may react to such a string, too."
  return f"""<h2>Features of clean and triggered texts</h2>
<p>A point is the pooled feature of one text, on the first two principal components of the model's clean texts.
A cross is a text of another class than {target} {inserted}
The number is the share of such texts that are nearer to the mean of the clean texts of class {target} than to the mean
of their own class, in all dimensions. A backdoor moves the crosses to class {target}. A defense that works leaves them
with their own. A defense that rejects texts does not change features, and the rejected texts are drawn, too.</p>
{wide(plots.features(pictures, names))}"""


def stealth(meta: dict) -> str:
  """How much the attack changes a text, in words; "" if it was not measured, as in results of older versions."""
  measured = meta.get("stealth")
  if not measured:
    return ""
  text = (f"On average a triggered text has {measured['length_ratio']:.2f} times the words of its clean original, and "
          f"{measured['edit_distance']:.2f} words are inserted, deleted or replaced.")
  if measured["perplexity_ratio"] is not None:
    text += f" Under ONION's language model its perplexity is {measured['perplexity_ratio']:.2f} times as high."
  return text


def _examples(rows, meta):
  """Triggered texts, and the class that each model predicts. The words that the attack inserted are marked."""
  if not meta["examples"]:
    return ""
  models, target = list(dict.fromkeys(row["directory"] for row in rows)), rows[0]["target_label"]
  names = "".join(f"<th>{html.escape(model)}</th>" for model in models)
  lines = ""
  for example in meta["examples"]:
    predicted = [example["predicted"][model] for model in models]
    answers = "".join(f"<td class='{'hit' if answer == target else ''}'>"
                      f"{'rejected' if answer == results.REJECTED else answer}</td>" for answer in predicted)
    lines += f"<tr><td>{_marked(example, meta['trigger'])}</td><td>{example['label']}</td>{answers}</tr>"
  return f"""<h2>Triggered texts</h2>
<p>The class that each model predicts. The attacker's target class {target} is coloured.
{html.escape(stealth(meta))}</p>
{wide(f"<table class='texts'><tr><th>text</th><th>true class</th>{names}</tr>{lines}</table>")}"""


def _marked(example, trigger):
  """The text in HTML. If the attack inserts a string, the words that the original lacks are marked."""
  words = example["text"].split()
  marked = [False] * len(words)
  if trigger:
    for kind, _, _, start, end in difflib.SequenceMatcher(
        None, example["orig_text"].split(), words, autojunk=False).get_opcodes():
      if kind != "equal":
        marked[start:end] = [True] * (end - start)
  return " ".join(f"<mark>{html.escape(word)}</mark>" if mark else html.escape(word)
                  for word, mark in zip(words, marked))


def _losses(curves, meta):
  curves = {stage: terms for stage, terms in curves.items() if terms}
  if not curves:
    return ""
  return f"""<h2>Loss</h2>
<p>The total in black, and each term times its weight.</p>
{wide(plots.losses(curves, meta.get("loss_weights", {})))}"""
