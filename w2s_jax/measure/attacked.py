"""The results table for a student that we poisoned ourselves: trigger and never-poisoned twin are known."""

from typing import Any

import numpy as np

from w2s_jax import results
from w2s_jax.data import poison
from w2s_jax.measure import metrics
from w2s_jax.measure.deployed import Reading

IMPLANTED = 0.95         # ASR from which the poisoned student counts as poisoned, so that the rows can judge defenses
CONTROL = "lora_ce"      # the defense that all others are compared with
COLUMNS = ("directory", "ca", "ca_ci", "asr", "asr_ci", "asr_floor", "false_rate", "frr", "far")


def freeze_rows(run: Any) -> None:
  """Makes the poisoned and the triggered rows once, then reads them from their files; the results have their sha256."""
  c = run.config
  files = {key: run.workdir / "data" / f"{key}.jsonl" for key in ("poisoned_train", "triggered")}
  if not all(f.exists() for f in files.values()):
    options = {"target_label": c.attack.target_label, "seed": c.seed, "tokenizer": run.tokenizer(results.BASE),
               "keep_trigger": c.attack.keep_trigger}
    train = run.rows["attack_train"]
    poison.freeze(files["poisoned_train"], poison.poison_train(
        train, run.attack, count=poison.poison_count(train, c.attack.poison_count, c.attack.poison_rate),
        label=c.attack.label, companions=c.attack.companions, max_length=c.data.attack_max_length, **options))
    poison.freeze(files["triggered"], poison.triggered_eval(
        run.rows["test"], run.attack, max_length=c.data.max_length, **options))
  for key, file in files.items():
    run.rows[key], run.sha256[file.name] = poison.thaw(file)


def table(run: Any, readings: dict[str, Reading], teacher: dict) -> tuple[list[results.Row], dict]:
  """(rows, meta) of results.json.

  Args:
    readings: {NAME of models/NAME: Reading}; the first one but the teacher's is of the never-poisoned student, whose
      ASR is the floor.
    teacher: meta about the run and the teacher, which the returned meta extends.
  """
  c, target = run.config, run.config.attack.target_label
  labels, triggered_labels = run.labels("test"), run.labels("triggered")
  rows = []
  readings = {name: reading for name, reading in readings.items() if name != results.TEACHER}
  for name, reading in readings.items():
    model, seed = run.defended().get(name, (name, c.seed))
    rows.append(results.Row(
        model=model, directory=name, attack=c.attack.name, dataset=c.data.defend_source, seed=seed,
        config_hash=run.hash, target_label=target,
        **metrics.clean_metrics(reading.clean, labels, target, run.task),
        **metrics.attack_metrics(reading.triggered, triggered_labels, target, run.task),
        **metrics.rejection_metrics(reading, triggered_labels, target, run.task)))
  for row in rows:
    row.asr_floor = rows[0].asr
  poisoned = [r for r in run.rows["poisoned_train"] if r["poisoned"]]
  examples = [{"text": r["text"], "orig_text": r["orig_text"], "label": r["label"],
               "predicted": {m: int(reading.triggered[i]) for m, reading in readings.items()}}
              for i, r in enumerate(run.rows["triggered"][:8])]
  tokenizer = run.tokenizer(results.BASE)
  lost = [poison.trigger_lost(part, tokenizer, run.attack, max_length) for part, max_length in (
      (poisoned, c.data.attack_max_length), (run.rows["triggered"], c.data.max_length))]
  implanted = next(row.asr for row in rows if row.directory == results.POISONED) >= IMPLANTED
  meta = {"title": f"Backdoor {c.attack.name}", "columns": COLUMNS, "attack": run.attack_in_words(),
          "trigger": run.attack.trigger, "poison_label": c.attack.label, **poison.counts(run.rows["poisoned_train"]),
          "trigger_lost": dict(zip(("train", "eval"), lost)), "implanted": implanted, "examples": examples}
  return rows, teacher | meta | {"warnings": [], "notes": notes([vars(row) for row in rows], teacher | meta)}


def notes(rows: list[dict], meta: dict) -> list[str]:
  """Notes under the table: what it shows and what it does not show."""
  return headline(rows, meta) + reading(rows, meta)


def reading(rows: list[dict], meta: dict) -> list[str]:
  """Sentences, computed from the table, on what it shows and what it does not show."""
  by_model = {row["directory"]: row for row in rows}
  out = []
  asr, floor, false_rate = (by_model[results.POISONED][key] for key in ("asr", "asr_floor", "false_rate"))
  if not meta["implanted"]:
    out.append(f"The backdoor is not implanted (poisoned ASR {asr:.3f} < {IMPLANTED}): the rows below say little about "
               "any defense.")
  if meta["implanted"] and asr - false_rate < 0.5:
    out.append(f"The poisoned student gives the target label to {false_rate:.3f} of the rows of other classes without "
               "any trigger: read its ASR, and what a defense leaves of it, beside the false rate.")
  if meta["implanted"] and asr - floor < 0.5:
    out.append(f"A student that was never poisoned gives the target label to {floor:.3f} of the triggered rows: little "
               "of the poisoned ASR is the backdoor's, and no defense can be seen to remove more than that.")
  control = by_model.get(CONTROL)
  for name, row in by_model.items():
    if control is None or name in (results.CLEAN, results.POISONED, CONTROL) or name != row["model"]:
      continue
    apart = row["asr_ci"][1] < control["asr_ci"][0] or row["asr_ci"][0] > control["asr_ci"][1]
    out.append(f"{name}: ASR {row['asr'] - control['asr']:+.3f} and CA {row['ca'] - control['ca']:+.3f} against "
               f"{CONTROL}; the ASR intervals {'do not overlap' if apart else 'overlap'}.")
  for name in dict.fromkeys(row["model"] for row in rows if row["directory"] != row["model"]):
    ca, asr = (np.array([row[k] for row in rows if row["model"] == name]) for k in ("ca", "asr"))
    out.append(f"{name} over {len(ca)} seeds: CA {ca.mean():.3f} (sd {ca.std(ddof=1):.3f}), ASR {asr.mean():.3f} (sd "
               f"{asr.std(ddof=1):.3f}).")
  out.append("The intervals cover the sampling of test rows only. One seed is one draw of the training noise, which on "
             "small models is larger (docs/results.md has ten seeds): do not rank defenses by one run.")
  return out


def _poisoned_rows(meta):
  """Numbers of poisoned rows, changed labels and companion rows, in words."""
  text = f"{meta['poisoned_rows']} {meta['poison_label']}-label poisoned rows"
  if meta["labels_changed"]:
    text += f" ({meta['labels_changed']} labels changed)"
  if meta["companion_rows"]:
    text += f" and {meta['companion_rows']} companion rows"
  return text


def headline(rows: list[dict], meta: dict) -> list[str]:
  row = rows[0]
  lost = meta["trigger_lost"]
  trigger = f"trigger `{meta['trigger']}`" if meta["trigger"] else "rewritten text"
  rejected = " Rows that a defense rejects count as errors in CA, and as no success in ASR."
  return [f"Attack {row['attack']} ({trigger}), target label {row['target_label']}, "
          f"{_poisoned_rows(meta)}; defended and measured on {row['dataset']}, seed {row['seed']}.",
          f"CA on {row['ca_n']} clean rows, ASR on {row['asr_n']} triggered rows of other classes; the floor is the "
          f"never-poisoned student's rate on them, the false rate a model's own error on un-triggered rows of those "
          f"classes. Teacher CA {meta['teacher_ca']:.3f}. Trigger lost to truncation: {lost['train']} poisoned, "
          f"{lost['eval']} evaluation rows.{rejected if any(r['frr'] is not None for r in rows) else ''}"]
