"""The plots of report.html, each as the text of an SVG."""

import io

from w2s_jax import results

MODELS = {results.CLEAN: "#8da0cb", results.POISONED: "#e07a5f", results.SUSPECT: "#e07a5f"}
DEFENDED = "#81b29a"
RATES = {"ca": "clean accuracy (CA)", "asr": "attack success rate (ASR)"}


def _figure(*shape, size):
  from matplotlib.figure import Figure  # late: training stages do not need it; it sets no global backend
  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(*shape, squeeze=False)


def _grid(count):
  """(figure, axes of `count` panels in rows of three)."""
  figure, axes = _figure(-(-count // 3), 3, size=(10, 3 * -(-count // 3)))
  for ax in axes.flat[count:]:
    ax.axis("off")
  return figure, list(axes.flat[:count])


def _svg(figure):
  import matplotlib
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "w2s_jax"}):          # else ids in the SVG would differ from run to run
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  text = buffer.getvalue()
  return text[text.index("<svg"):]


def bars(rows: list[dict]) -> str:
  """Bars with intervals: the CA of each row, and its ASR if it was measured, with a dashed line at the ASR floor."""
  shown = {key: own for key in RATES if (own := [row for row in rows if row[key] is not None])}
  several_attacks = len({row["attack"] for row in rows}) > 1
  figure, axes = _figure(1, 2, size=(10, 3.2))
  for ax in axes.flat[len(shown):]:
    ax.axis("off")
  for ax, (key, own) in zip(axes.flat, shown.items()):
    names = [f"{row['directory']} {row['attack'][:12]}".replace("$", r"\$") if several_attacks else row["directory"]
             for row in own]
    errors = [[max(0, row[key] - row[f"{key}_ci"][0]) for row in own],
              [max(0, row[f"{key}_ci"][1] - row[key]) for row in own]]
    drawn = ax.bar(range(len(own)), [row[key] for row in own], yerr=errors, capsize=4,
                   color=[MODELS.get(row["model"], DEFENDED) for row in own])
    ax.bar_label(drawn, [f"{row[key]:.2f}" for row in own], padding=1, fontsize=8)
    ax.set(title=RATES[key], ylim=(0, 1.12), xticks=range(len(own)))
    ax.set_xticklabels(names, rotation=30, ha="right")
    if key == "asr" and rows[0]["asr_floor"] is not None:
      ax.axhline(rows[0]["asr_floor"], color="#444", linestyle="--", linewidth=1)
      ax.set_title(f"{RATES[key]}, dashed: floor")
  return _svg(figure)


def features(pictures: dict, names: list[str]) -> str:
  """A panel for each model: clean texts by class, and triggered texts of other classes than the target.

  Args:
    pictures: contents of features.json.
    names: NAMEs of models/NAME to show.
  """
  target = pictures["target"]
  figure, axes = _grid(len(names))
  for ax, name in zip(axes, names):
    own = pictures["models"][name]
    for label in sorted({label for *_, label in own["clean"]}):
      ax.scatter(*zip(*[point[:2] for point in own["clean"] if point[2] == label]), s=9, alpha=0.6, linewidths=0,
                 label=f"clean, class {label}" + (" (target)" if label == target else ""))
    if own["triggered"]:
      ax.scatter(*zip(*[point[:2] for point in own["triggered"]]), s=14, marker="x", linewidths=0.8, color="#222",
                 label="with the trigger, other classes")
    share = "" if own["nearer_target"] is None else f": {own['nearer_target']:.3f} nearer to class {target}"
    ax.set(title=name + share, xticks=[], yticks=[])
    ax.title.set_fontsize(9)
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
  return _svg(figure)


def losses(curves: dict[str, dict[str, list[tuple[int, float]]]], weights: dict[str, dict[str, float]]) -> str:
  """A panel for each stage: the total loss in black, and each term times its weight.

  A term has one colour in all panels.

  Args:
    curves: {stage: {"loss" or a term: [(step, value)]}}.
    weights: {defense: {term: weight}}. The self-test of a defense uses the weights of this defense. Terms without a
      weight get 1.
  """
  import matplotlib
  terms = sorted({name for own in curves.values() for name in own} - {"loss"})
  colors = dict(zip(terms, matplotlib.color_sequences["tab10"] * (1 + len(terms) // 10)))
  figure, axes = _grid(len(curves))
  for ax, (stage, own) in zip(axes, curves.items()):
    own_weights = weights.get(stage.removeprefix("selftest-").partition("-seed")[0], {})
    for name, points in own.items():
      weight = own_weights.get(name, 1.0)
      if name == "loss":
        ax.plot(*zip(*points), label="loss (total)", linewidth=1.2, color="black", zorder=3)
      elif len(own) > 2 or weight != 1:                                # a single term of weight 1 equals the total
        ax.plot(*zip(*[(step, weight * value) for step, value in points]), linewidth=1, color=colors[name],
                label=name if weight == 1 else f"{weight:g} × {name}")
    smallest = min(line.get_ydata().min() for line in ax.lines)
    ax.set(title=stage, xlabel="step", yscale="log" if smallest > 0 else "linear")
    ax.legend(fontsize=7)
  return _svg(figure)
