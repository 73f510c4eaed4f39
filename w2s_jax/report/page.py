"""Writes results.md and report.html, with tables and plots, from results.json, features.json and metrics/."""

import html
import io
import json
import logging
from pathlib import Path

from w2s_jax import processes, results
from w2s_jax.report import tables

LOG = logging.getLogger(__name__)


def write(workdir: Path) -> tuple[list[dict], dict]:
  """Writes results.md and report.html from what the other stages left, and logs the table. Returns (rows, meta)."""
  saved = json.loads((workdir / "results.json").read_text())
  rows, meta = saved["rows"], saved["meta"]
  notes = [*(f"WARNING: {w}" for w in meta["warnings"]), *meta["notes"]]
  markdown = tables.table(rows, meta["columns"]) + "\n\n" + "\n".join(f"- {n}" for n in notes) + "\n"
  processes.write_text(workdir / "results.md", markdown)
  file = workdir / "features.json"                 # workdirs of older versions do not have it
  pictures = json.loads(file.read_text()) if file.exists() else {}
  processes.write_text(workdir / "report.html", page(rows, meta, notes, _curves(workdir), pictures))
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


def page(rows: list[dict], meta: dict, notes: list[str], curves: dict[str, dict[str, list[tuple[int, float]]]],
         pictures: dict) -> str:
  """One self-contained HTML page: table, bars with intervals, features, triggered texts, loss curves per term."""
  head, *lines = tables.cells(rows, meta["columns"])
  head = "".join(f"<th>{c}</th>" for c in head)
  cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
  models = list(dict.fromkeys(row["directory"] for row in rows))
  examples = "".join(
      f"<tr><td>{html.escape(e['text'])}</td><td>{e['label']}</td>"
      + "".join(f"<td class='{'hit' if e['predicted'][m] == rows[0]['target_label'] else ''}'>{e['predicted'][m]}</td>"
                for m in models) + "</tr>" for e in meta["examples"])
  names = "".join(f"<th>{html.escape(m)}</th>" for m in models)
  triggered = f"""<h2>Triggered texts</h2>
<p>The class that each model predicts. The attacker's target class {rows[0]['target_label']} is marked.</p>
<table><tr><th>text</th><th>true class</th>{names}</tr>{examples}</table>""" if examples else ""
  title = html.escape(meta["title"])
  details = html.escape(json.dumps({k: v for k, v in meta.items() if k != "examples"}, indent=2))
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; vertical-align: top }}
.hit {{ background: #fbd9d3 }}
svg {{ max-width: 100%; height: auto }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
</style></head><body>
<h1>{title}: before and after</h1>
<p>{html.escape(notes[0])}</p>
<table><tr>{head}</tr>{cells}</table>
{_bars(rows)}
<ul>{''.join(f'<li>{html.escape(n)}</li>' for n in notes[1:])}</ul>
{_features(pictures, rows)}
{triggered}
<h2>Loss terms</h2>
{_loss_plots(curves)}
<h2>Details</h2><pre>{details}</pre>
</body></html>
"""


def _svg(figure):
  import matplotlib
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "w2s_jax"}):          # otherwise ids in the SVG differ from run to run
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  text = buffer.getvalue()
  return text[text.index("<svg"):]


def _figure(*shape, size):
  from matplotlib.figure import Figure  # late: training stages do not need it; it sets no global backend
  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(*shape, squeeze=False)


def _bars(rows):
  figure, axes = _figure(1, 2, size=(10, 3.2))
  for ax, key, title in ((axes[0, 0], "ca", "clean accuracy (CA)"), (axes[0, 1], "asr", "attack success rate (ASR)")):
    shown = [r for r in rows if r[key] is not None]
    several_attacks = len({r["attack"] for r in rows}) > 1
    names = [f"{r['directory']} {r['attack'][:12]}".replace("$", r"\$") if several_attacks else r["directory"]
             for r in shown]
    errors = [[max(0, r[key] - r[f"{key}_ci"][0]) for r in shown], [max(0, r[f"{key}_ci"][1] - r[key]) for r in shown]]
    colors = {results.CLEAN: "#8da0cb", results.POISONED: "#e07a5f", results.SUSPECT: "#e07a5f"}
    ax.bar(range(len(shown)), [r[key] for r in shown], yerr=errors, capsize=4,
           color=[colors.get(r["model"], "#81b29a") for r in shown])
    ax.set(title=title, ylim=(0, 1), xticks=range(len(shown)))
    ax.set_xticklabels(names, rotation=30, ha="right")
  if rows[0]["asr_floor"] is not None:
    axes[0, 1].axhline(rows[0]["asr_floor"], color="#444", linestyle="--", linewidth=1)
  return _svg(figure)


def _features(pictures, rows):
  """A panel per model, of its first seed: clean texts by class, and triggered texts of other classes."""
  names = [name for name in dict.fromkeys(row["directory"] for row in rows if row["seed"] == rows[0]["seed"])
           if name in pictures.get("models", {})]
  if not names:
    return ""
  target = pictures["target"]
  figure, axes = _figure(-(-len(names) // 3), 3, size=(10, 3 * -(-len(names) // 3)))
  for ax in axes.flat[len(names):]:
    ax.axis("off")
  for ax, name in zip(axes.flat, names):
    own = pictures["models"][name]
    for label in sorted({label for *_, label in own["clean"]}):
      ax.scatter(*zip(*[point[:2] for point in own["clean"] if point[2] == label]), s=9, alpha=0.6, linewidths=0,
                 label=f"clean, class {label}" + (" (target)" if label == target else ""))
    if own["triggered"]:
      ax.scatter(*zip(*[point[:2] for point in own["triggered"]]), s=14, marker="x", linewidths=0.8, color="#222",
                 label="with the trigger, other classes")
    share = results.rate(own["nearer_target"])
    ax.set(title=f"{name}: {share} nearer to class {target}", xticks=[], yticks=[])
    ax.title.set_fontsize(9)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
  return f"""<h2>Features of clean and triggered texts</h2>
<p>A point is the pooled feature of one text, on the first two principal components of the model's clean texts.
A cross is a text of another class than {target} with the trigger <code>{html.escape(pictures["trigger"])}</code>.
The number is the share of such texts that are nearer to the mean of the clean texts of class {target} than to the mean
of their own class, in all dimensions. A backdoor moves the crosses to class {target}. A defense that works leaves them
with their own.</p>
{_svg(figure)}"""


def _loss_plots(curves):
  curves = {stage: terms for stage, terms in curves.items() if terms}
  if not curves:
    return "<p>No metrics were found.</p>"
  figure, axes = _figure(-(-len(curves) // 3), min(3, len(curves)), size=(10, 2.8 * -(-len(curves) // 3)))
  for ax in axes.flat[len(curves):]:
    ax.axis("off")
  for ax, (stage, terms) in zip(axes.flat, curves.items()):
    for name, points in terms.items():
      ax.plot(*zip(*points), label=name, linewidth=1)
    ax.set(title=stage, xlabel="step", yscale="log" if min(v for p in terms.values() for _, v in p) > 0 else "linear")
    ax.legend(fontsize=7)
  return _svg(figure)
