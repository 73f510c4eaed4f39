"""Results -> JSON, Markdown, HTML with plots."""

import html
import importlib.metadata
import io
import json
import platform

import numpy as np

from w2s_jax import card, processes

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def versions():
  return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def write_json(path, value):
  processes.write_text(path, json.dumps(value, indent=2))


def _rate(name):
  return lambda row: "-" if row[name] is None else f"{row[name]:.3f}"


def _interval(name):
  return lambda row: "-" if row[name] is None else f"{row[name][0]:.3f}-{row[name][1]:.3f}"


# What a run that attacks shows, and one that cleans a checkpoint of unknown trigger.
ATTACKED = {"model": lambda row: row["directory"], "CA": _rate("ca"), "CA 95%": _interval("ca_ci"), "ASR": _rate("asr"),
            "ASR 95%": _interval("asr_ci"), "ASR floor": _rate("asr_floor"), "false rate": _rate("false_rate")}
SUSPECT = {"model": lambda row: row["directory"], "trigger": lambda row: card.escape(row["attack"]),
           "target": lambda row: "-" if row["target_label"] is None else str(row["target_label"])} | {
    name: ATTACKED[name] for name in ("CA", "CA 95%", "ASR", "ASR 95%", "false rate")} | {
    "scan": lambda row: "-" if row["scan"] is None else f"{row['scan']:.2f} ({row['scan_class']})",
    "agreement": _rate("agreement"), "word flips": _rate("word_flips"), "sentence flips": _rate("sentence_flips")}


def _cells(rows):
  """The column heads, then one line of text per row."""
  columns = SUSPECT if "agreement" in rows[0] else ATTACKED
  return [tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in rows)]


def table(rows):
  """Markdown table, padded so that it reads as it is in a terminal."""
  lines = _cells(rows)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
  return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def reading(rows, meta):
  """What this table shows and what it does not, in sentences computed from it."""
  by_model = {row["directory"]: row for row in rows}
  out = []
  asr, floor, false_rate = (by_model["poisoned"][key] for key in ("asr", "asr_floor", "false_rate"))
  if not meta["implanted"]:
    out.append(f"The backdoor is not implanted (poisoned ASR {asr:.3f} < 0.95): the rows below say little about any "
               "defense.")
  if meta["implanted"] and asr - false_rate < 0.5:
    out.append(f"The poisoned student gives the target label to {false_rate:.3f} of the rows of other classes without "
               "any trigger: read its ASR, and what a defense leaves of it, beside the false rate.")
  if meta["implanted"] and asr - floor < 0.5:
    out.append(f"A student that was never poisoned gives the target label to {floor:.3f} of the triggered rows: little "
               "of the poisoned ASR is the backdoor's, and no defense can be seen to remove more than that.")
  control = by_model.get("lora_ce")
  for name, row in by_model.items():
    if control is None or name in ("clean", "poisoned", "lora_ce") or name != row["model"]:
      continue
    apart = row["asr_ci"][1] < control["asr_ci"][0] or row["asr_ci"][0] > control["asr_ci"][1]
    out.append(f"{name}: ASR {row['asr'] - control['asr']:+.3f} and CA {row['ca'] - control['ca']:+.3f} against "
               f"lora_ce; the ASR intervals {'do not overlap' if apart else 'overlap'}.")
  for name in dict.fromkeys(row["model"] for row in rows if row["directory"] != row["model"]):
    ca, asr = (np.array([row[k] for row in rows if row["model"] == name]) for k in ("ca", "asr"))
    out.append(f"{name} over {len(ca)} seeds: CA {ca.mean():.3f} (sd {ca.std(ddof=1):.3f}), ASR {asr.mean():.3f} (sd "
               f"{asr.std(ddof=1):.3f}).")
  out.append("The intervals cover the sampling of test rows only. One seed is one draw of the training noise, which on "
             "small models is larger (docs/results.md has ten seeds): do not rank defenses by one run.")
  return out


def _headline(rows, meta):
  row = rows[0]
  lost = meta["trigger_lost"]
  trigger = f"trigger `{meta['trigger']}`" if meta["trigger"] else "rewritten text"
  return [f"Attack {row['attack']} ({trigger}), target label {row['target_label']}, {meta['poisoned_rows']} "
          f"clean-label poisoned rows; defended and measured on {row['dataset']}, seed {row['seed']}.",
          f"CA on {row['ca_n']} clean rows, ASR on {row['asr_n']} triggered rows of other classes; the floor is the "
          f"never-poisoned student's rate on them, the false rate a model's own error on un-triggered rows of those "
          f"classes. Teacher CA {meta['teacher_ca']:.3f}. Trigger lost to truncation: {lost['train']} poisoned, "
          f"{lost['eval']} evaluation rows."]


def write(workdir):
  """results.md and report.html from results.json and metrics/; prints the table. Returns (rows, meta)."""
  results = json.loads((workdir / "results.json").read_text())
  rows, meta = results["rows"], results["meta"]
  notes = meta.get("notes") or _headline(rows, meta) + reading(rows, meta)
  markdown = table(rows) + "\n\n" + "\n".join(f"- {n}" for n in notes) + "\n"
  processes.write_text(workdir / "results.md", markdown)
  processes.write_text(workdir / "report.html", page(rows, meta, notes, _curves(workdir)))
  print(f"\n{markdown}\n{workdir / 'report.html'}", flush=True)
  return rows, meta


def _curves(workdir):
  """{stage: {term: [(step, value)]}} from metrics/STAGE.jsonl."""
  out = {}
  for file in sorted((workdir / "metrics").glob("*.jsonl")):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = [k for k in lines[0] if k not in ("step", "dev_accuracy") and "grad_norm" not in k] if lines else []
    out[file.stem] = {n: [(line["step"], line[n]) for line in lines] for n in names}
  return out


def page(rows, meta, notes, curves):
  """One self-contained HTML page: table, bars with intervals, loss curves per term, triggered texts."""
  head, *lines = _cells(rows)
  head = "".join(f"<th>{c}</th>" for c in head)
  cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
  models = list(dict.fromkeys(row["directory"] for row in rows))
  examples = "".join(
      f"<tr><td>{html.escape(e['text'])}</td><td>{e['label']}</td>"
      + "".join(f"<td class='{'hit' if e['predicted'][m] == rows[0]['target_label'] else ''}'>{e['predicted'][m]}</td>"
                for m in models) + "</tr>" for e in meta["examples"])
  names = "".join(f"<th>{html.escape(m)}</th>" for m in models)
  triggered = f"""<h2>Triggered texts</h2>
<p>Predicted class by each model; the attacker's target class {rows[0]['target_label']} is marked.</p>
<table><tr><th>text</th><th>true class</th>{names}</tr>{examples}</table>""" if examples else ""
  title = "A suspicious checkpoint" if "agreement" in rows[0] else f"Backdoor {html.escape(rows[0]['attack'])}"
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
{triggered}
<h2>Loss terms</h2>
{_loss_plots(curves)}
<h2>Details</h2><pre>{details}</pre>
</body></html>
"""


def _svg(figure):
  import matplotlib
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "w2s_jax"}):          # else every file has ids of its own
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  text = buffer.getvalue()
  return text[text.index("<svg"):]


def _figure(*shape, size):
  from matplotlib.figure import Figure  # only here: no global backend, and the training stages do not wait for it
  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(*shape, squeeze=False)


def _bars(rows):
  figure, axes = _figure(1, 2, size=(10, 3.2))
  for ax, key, title in ((axes[0, 0], "ca", "clean accuracy (CA)"), (axes[0, 1], "asr", "attack success rate (ASR)")):
    shown = [r for r in rows if r[key] is not None]
    several = len({r["attack"] for r in rows}) > 1
    names = [f"{r['directory']} {r['attack'][:12]}".replace("$", r"\$") if several else r["directory"] for r in shown]
    errors = [[max(0, r[key] - r[f"{key}_ci"][0]) for r in shown], [max(0, r[f"{key}_ci"][1] - r[key]) for r in shown]]
    colors = {"clean": "#8da0cb", "poisoned": "#e07a5f", "suspect": "#e07a5f"}
    ax.bar(range(len(shown)), [r[key] for r in shown], yerr=errors, capsize=4,
           color=[colors.get(r["model"], "#81b29a") for r in shown])
    ax.set(title=title, ylim=(0, 1), xticks=range(len(shown)))
    ax.set_xticklabels(names, rotation=30, ha="right")
  if rows[0]["asr_floor"] is not None:
    axes[0, 1].axhline(rows[0]["asr_floor"], color="#444", linestyle="--", linewidth=1)
  return _svg(figure)


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
