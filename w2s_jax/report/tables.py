"""The results as a Markdown table, and the sentences beside it."""

import numpy as np

from w2s_jax.report import card


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


def cells(rows):
  """The column heads, then one line of text per row."""
  columns = SUSPECT if "agreement" in rows[0] else ATTACKED
  return [tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in rows)]


def table(rows):
  """Markdown table, padded so that it reads as it is in a terminal."""
  lines = cells(rows)
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


def _poisoned_rows(meta):
  """The poisoned rows in words. A results.json of version 1 says neither: all are clean-label."""
  text = f"{meta['poisoned_rows']} {meta.get('poison_label', 'clean')}-label poisoned rows"
  if changed := meta.get("labels_changed", 0):
    text += f" ({changed} labels changed)"
  if companions := meta.get("companion_rows", 0):
    text += f" and {companions} companion rows"
  return text


def headline(rows, meta):
  row = rows[0]
  lost = meta["trigger_lost"]
  trigger = f"trigger `{meta['trigger']}`" if meta["trigger"] else "rewritten text"
  return [f"Attack {row['attack']} ({trigger}), target label {row['target_label']}, "
          f"{_poisoned_rows(meta)}; defended and measured on {row['dataset']}, seed {row['seed']}.",
          f"CA on {row['ca_n']} clean rows, ASR on {row['asr_n']} triggered rows of other classes; the floor is the "
          f"never-poisoned student's rate on them, the false rate a model's own error on un-triggered rows of those "
          f"classes. Teacher CA {meta['teacher_ca']:.3f}. Trigger lost to truncation: {lost['train']} poisoned, "
          f"{lost['eval']} evaluation rows."]
