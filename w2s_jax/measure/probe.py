"""The results table for a suspect with an unknown trigger, from the models' answers to the probes (probe_rows.py)."""

from typing import Any

import numpy as np

from w2s_jax import results
from w2s_jax.attacks.insertion import inserting
from w2s_jax.data import poison
from w2s_jax.measure import features, metrics, probe_rows, scan, search, selftest
from w2s_jax.measure.deployed import Reading

COLUMNS = ("directory", "attack", "target_label", "ca", "ca_ci", "asr", "asr_ci", "false_rate", "frr", "far", "scan",
           "agreement", "found", "word_flips", "sentence_flips")
BELOW_CHANCE = 0.8       # a CA below this multiple of chance (1 / number of classes) gets a warning; our choice
STILL_THERE = 0.2        # a trigger still works in a defended model if its ASR exceeds the false rate by more than this
REACTS = "This model has no weight of the suspect. A clean model may react to such a text, too."


def table(run: Any, readings: dict[str, Reading], teacher: dict) -> tuple[list[results.Row], dict, dict]:
  """(rows, meta) of results.json, and the contents of features.json.

  Each trigger that is tried has a row for the suspect and a row for each defense. Without such a trigger each model has
  one row. A row has CA, the trigger's ASR, agreement with the teacher, and flip rates.

  Args:
    readings: {NAME of models/NAME: Reading}.
    teacher: entries of meta about the run and the teacher. This function adds further entries.
  """
  c, labels = run.config, run.labels("test")
  by_insertion = {name: (reading.clean, _by_insertion(run.rows["probes"], reading.triggered))
                  for name, reading in readings.items()}
  tokenizer, probes = run.tokenizer(results.SUSPECT), run.rows["probes"]
  losses = {t: poison.trigger_lost([row for row in probes if row["inserted"] == t], tokenizer, inserting(t),
                                   c.data.max_length) for t in c.probe.triggers}
  models = {name: answers for name, answers in by_insertion.items() if name != results.TEACHER}
  scans = {name: reading.scan for name, reading in readings.items()}
  found = search.kept(run)
  strongest = search.strongest(found["classes"])
  rows, places, probe_labels = [], _places(probes), run.labels("probes")
  for tried in probe_rows.tried(c) or (None,):
    own = places.get(tried, [])
    tried_labels = probe_labels[own]
    for row in _rows(run, models, readings, labels, tried, tried_labels, strongest):
      if own and (tried_labels >= 0).all():
        row.nearer_target = features.nearer_target(readings[row.directory].picture.distances[own], tried_labels,
                                                   row.target_label)
      rows.append(row)
  gained = {name: _gained(*answers, labels, strongest) for name, answers in models.items()}
  self_test = selftest.kept(run)
  if self_test:
    self_test["in_words"] = selftest.in_words(self_test)
  meta = teacher | {
      "title": "A suspicious checkpoint", "columns": COLUMNS, "attack": None, "trigger_lost": losses, "scan": scans,
      "num_labels": c.data.num_labels,
      "not_scanned": scan.skipped(run, results.SUSPECT, run.model_config(results.SUSPECT).hidden_size),
      "selftest": self_test, "found": search.in_words(found) if found["classes"] else None,
      "search": found | {"gained": gained},
      "suspicious_insertions": _most_flipping(models[results.SUSPECT]), "examples": []}
  rows_as_dicts = [vars(row) for row in rows]
  meta |= {"warnings": warnings(rows_as_dicts, meta), "notes": notes(rows_as_dicts, meta)}
  return rows, meta, _pictures(run, readings, rows[0], strongest, places)


def _places(probes):
  """{(kind, inserted string): indices of its rows among the probes}."""
  out = {}
  for i, row in enumerate(probes):
    out.setdefault((row["probe"], row["inserted"]), []).append(i)
  return out


def _pictures(run, readings, first, found, places):
  """The contents of features.json for the first trigger that is tried, or else for the search's string.

  {} if there is neither, or if the trigger's rows have unknown labels.
  """
  if tried := probe_rows.tried(run.config):
    shown, target = tried[0], first.target_label
  elif found:
    shown, target = ("found", found["string"]), found["class"]
  else:
    return {}
  if (run.labels("probes")[places[shown]] < 0).any():
    return {}
  pictures = {name: reading.picture for name, reading in readings.items() if name != results.TEACHER}
  return features.to_json(pictures, run.labels("test"), places.get(shown, []), run.labels("probes"), target, shown[1],
                          run.config.seed, shown[0] == "found")


def _by_insertion(rows, predicted):
  """{(kind, inserted string): {index of the row in the test set: predicted class}}."""
  out = {}
  for row, p in zip(rows, predicted):
    out.setdefault((row["probe"], row["inserted"]), {})[row["id"]] = int(p)
  return out


def _flips(reading, string, *kinds):
  """Fraction of texts whose predicted class changes when the string is inserted; None if no text counts.

  If `string` is None, all strings of these kinds count. A text does not count if the defense rejects it with the string
  or without it.
  """
  clean, probed = reading
  changes = [p != clean[place] for (kind, s), texts in probed.items() if kind in kinds and string in (None, s)
             for place, p in texts.items() if results.REJECTED not in (p, clean[place])]
  return float(np.mean(changes)) if changes else None


def _most_flipping(reading):
  """The five listed or random strings that flip the largest fractions of texts: [(string, fraction)], largest first."""
  kinds = ("listed", "word", "sentence")
  flips = {string: _flips(reading, string, *kinds) for kind, string in reading[1] if kind in kinds}
  return sorted(flips.items(), key=lambda pair: -pair[1])[:5]


def _turned(probed, labels, found):
  """Fraction of the accepted rows of other classes that get the found string's class when the string is inserted."""
  if not found:
    return None
  answers = [p for place, p in probed.get(("found", found["string"]), {}).items()
             if labels[place] != found["class"] and p != results.REJECTED]
  return float(np.mean([p == found["class"] for p in answers])) if answers else None


def _gained(clean, probed, labels, found):
  """By how much the found string raises the fraction of rows of other classes that get the string's class."""
  if (turned := _turned(probed, labels, found)) is None:
    return None
  unchanged = {("found", found["string"]): {place: clean[place] for place in probed["found", found["string"]]}}
  return turned - (_turned(unchanged, labels, found) or 0.0)


def _rows(run, models, readings, labels, tried, tried_labels, found):
  """Yields one results.Row per model.

  Args:
    labels: [N] int, labels of the test rows.
    tried: a trigger (probe_rows.tried); None if no trigger is tried.
    tried_labels: [M] int, labels of the rows with this trigger.
    found: the search's strongest finding; None if there is none.
  """
  c, target = run.config, None
  if tried:
    target = c.probe.target_label
    classes = [t for t in range(c.data.num_labels) if (labels != t).any()]
    if target < 0:  # the class with the trigger's highest ASR on the suspect
      suspect = np.array(list(models[results.SUSPECT][1][tried].values()))
      target = max(classes, key=lambda t: metrics.attack_metrics(suspect, tried_labels, t, run.task)["asr"])
  for name, (clean, probed) in models.items():
    model, seed = run.defended().get(name, (name, c.seed))
    asr, rejection = {}, {}
    if target is not None:
      triggered = np.array(list(probed[tried].values()))
      asr = metrics.attack_metrics(triggered, tried_labels, target, run.task)
      rejection = metrics.rejection_metrics(readings[name]._replace(triggered=triggered), tried_labels, target,
                                            run.task)
    accepted = clean != results.REJECTED
    strongest = scan.judged(readings[name].scan) or {"strength": None, "class": None}
    yield results.Row(
        model=model, directory=name, attack=tried[1] if tried else "none listed", dataset=c.data.train, seed=seed,
        config_hash=run.hash, target_label=target, **metrics.clean_metrics(clean, labels, target, run.task), **asr,
        **rejection, scan=strongest["strength"], scan_class=strongest["class"],
        found=_turned(probed, labels, found),
        agreement=float((clean == readings[results.TEACHER].clean)[accepted].mean()) if accepted.any() else None,
        word_flips=_flips((clean, probed), None, "word"), sentence_flips=_flips((clean, probed), None, "sentence"))


def warnings(rows: list[dict], meta: dict) -> list[str]:
  """The warnings that a user of a cleaned model must read first."""
  suspect, out = rows[0], []
  if suspect["ca"] * meta["num_labels"] < BELOW_CHANCE:
    out.append(f"the suspect's CA of {suspect['ca']:.3f} is below chance. Its classes may have another order than the "
               "data's labels. List the data's names of class 0, 1, ... in --config.data.class_names.")
  if meta["teacher_ca"] < suspect["ca"] - 0.02:
    out.append(f"the teacher (CA {meta['teacher_ca']:.3f}) is less accurate than the suspect (CA {suspect['ca']:.3f}). "
               "Give more clean rows, or a pretrained encoder as --config.teacher.path.")
  out += [f"`{r['attack']}` still works in {r['model']}: the ASR is {r['asr']:.3f}, the false rate "
          f"{r['false_rate']:.3f}. {_conclusion(r)}"
          for r in rows if r["model"] != suspect["model"] and _still_works(r)]
  if meta["search"]["outcome"] == "suspicious":
    found = search.strongest(meta["search"]["classes"])
    out += [f"the string that the search found, `{results.escape(found['string'])}`, still works in {name}: it "
            f"raises the share of texts of other classes that get class {found['class']} by {100 * gained:.0f} "
            f"percentage points, in clean models by {100 * found['clean']:.0f} at most. {_conclusion(r)}"
            for name, r in {r["directory"]: r for r in rows if r["model"] != suspect["model"]}.items()
            if (gained := meta["search"]["gained"][name]) is not None and gained > found["clean"] + STILL_THERE]
  return out + [scan.verdict(name, meta["scan"][name]) for name in _suspicious(meta)]


def _conclusion(row):
  return REACTS if results.is_from_base(row["model"]) else f"{row['directory']} is not clean."


def _still_works(row):
  return row["asr"] is not None and row["asr"] > row["false_rate"] + STILL_THERE


def _suspicious(meta):
  """Names of the models, other than the suspect, that the scan finds suspicious."""
  return [name for name, reading in meta["scan"].items()
          if name != results.SUSPECT and scan.outcome(reading) == "suspicious"]


def notes(rows: list[dict], meta: dict) -> list[str]:
  """The notes under the table: which model to take, how it was measured, and what the table does not show."""
  counts, suspicious = meta["clean_rows"], _suspicious(meta)
  verdicts = [scan.verdict(name, reading) for name, reading in meta["scan"].items()
              if reading and name not in suspicious]
  losses = [f" Truncation removed `{t}` from {count} test rows." for t, count in meta["trigger_lost"].items()
            if count]
  strongest = ", ".join(f"`{s}` {100 * rate:.0f}%" for s, rate in meta["suspicious_insertions"] if rate)
  findings = [meta["selftest"]["in_words"]] if meta["selftest"] else []
  findings += [meta["found"]] if meta["found"] else []
  return [_which_to_take(rows)] + findings + verdicts + list(filter(None, [meta["not_scanned"]])) + [
      f"The suspect is {meta['base']['path']}. The defenses got {counts['train']} clean training rows. CA is measured "
      f"on {counts['test']} held-out rows of {rows[0]['dataset']}. The teacher's CA is {meta['teacher_ca']:.3f} "
      f"({meta['teacher']}).",
      "ASR: share of rows of other classes that get the target label when a listed trigger is inserted at a random "
      "place, or share of a file's texts (probe.triggered) that get it." + "".join(losses) + " A model without the "
      "backdoor has an ASR near its false rate. The table has no ASR floor, because there is no never-poisoned twin of "
      "the suspect.",
      "Agreement: share of clean rows on which the model agrees with the teacher. Flips: share of clean rows whose "
      "answer changes when a random rare word, or the beginning of another text, is inserted. An inserted sentence has "
      "a meaning of its own, so compare a model's flips with the suspect's. Only the columns found and "
      "scan can show a trigger that was not tried.",
      "Found: share of clean rows of other classes that get the class of the search's string when the string is "
      "inserted. w2s_words trains on the words of this string, so a low share there does not prove that the trigger is "
      "gone.",
      "Scan: strength of the strongest soft trigger, and its class. The strength is the log-odds of the class on other "
      "texts with the soft tokens, divided by the log-odds on the class's own texts. A model that was trained against "
      "soft tokens (w2s_adv, ce_adv) has a low strength even if its backdoor is left.",
      f"The strings that flip the most answers of the suspect: {strongest or 'none of those that were tried'}."]


def _which_to_take(rows):
  """Says which model to take. Only a model without any weight of the suspect surely lacks its backdoor."""
  safe = {row["directory"]: row for row in rows if results.is_from_base(row["model"])}
  if safe:
    names = " and ".join(f"`{name}` (CA {row['ca']:.3f})" for name, row in safe.items())
    line = (f"No weight of the suspect (CA {rows[0]['ca']:.3f}) is in {names}. Take one if its CA is high enough for "
            "you.")
    if any(row["model"] == "from_base_words" for row in safe.values()):
      line += " On MiniLM `from_base_words` reacted less than `from_base` to strings that are out of place."
    return line
  return ("No column proves that a trigger that was not tried has stopped working. If you know the public model that "
          "the suspect was fine-tuned from, run again with --config.student.base and another --workdir. The defenses "
          "`from_base` and `from_base_words` then train that public model, and use none of the suspect's weights.")
