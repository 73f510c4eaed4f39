"""What can be measured of a suspect whose trigger nobody knows: listed triggers, and a reading without any."""

import itertools
import re

import numpy as np

from w2s_jax import processes
from w2s_jax.attacks.insertion import insert, inserting
from w2s_jax.data import poison
from w2s_jax.defenses import w2s
from w2s_jax.measure import metrics, scan

LETTERS = "bcdfghjklmnpqrstvwxz"   # rare words are made of consonants, like `mn`, `cf`, `tq` of the literature
SENTENCE_WORDS = 8
STILL_THERE = 0.2        # ASR above the false rate from which a defended model's trigger is said to work still


def rare_words(texts, avoid, rng):
  """Endless random words of two or three consonants that neither the texts nor the strings to avoid contain."""
  known = {word for text in [*texts, *avoid] for word in re.findall(r"\w+", text.lower())}
  while True:
    word = "".join(rng.choice(list(LETTERS), rng.integers(2, 4)))
    if word not in known:
      yield word


def with_rare_words(rows, share, avoid, seed):
  """The rows, a random `share` of them with a rare word put in: what a student is trained on that must not heed one.

  avoid: triggers that are known to whoever measures: no defense may see one.
  """
  rng = np.random.default_rng([seed, 4])
  words = rare_words([r["text"] for r in rows], avoid, rng)
  chosen = set(rng.permutation(len(rows))[:round(share * len(rows))].tolist())
  return [row | {"text": insert(row["text"], next(words), rng, len(row["text"]))} if i in chosen else row
          for i, row in enumerate(rows)]


def insertions(texts, words, sentences, avoid, seed):
  """(kind, string) to put into texts: rare words, and the beginnings of other texts."""
  rng = np.random.default_rng([seed, 3])
  rare = itertools.islice(rare_words(texts, avoid, rng), words)
  chosen = rng.permutation(len(texts))[:sentences]
  return [*(("word", w) for w in rare), *(("sentence", " ".join(texts[i].split()[:SENTENCE_WORDS])) for i in chosen)]


def freeze_rows(run, tokenizer):
  """run.rows["probes"]: test rows with each listed trigger, and some of them with each random insertion; hashed."""
  c, file = run.config, run.workdir / "data" / "probes.jsonl"
  if not file.exists():
    test, out = [row | {"id": i} for i, row in enumerate(run.rows["test"])], []
    order = np.random.default_rng([c.seed, 5]).permutation(len(test))   # files may be sorted by label
    some = [test[i] for i in order[:c.probe.rows]]
    texts = [r["text"] for split in ("train", "test") for r in run.rows[split]]
    drawn = insertions(texts, c.probe.words, c.probe.sentences, c.probe.triggers, c.seed)
    for kind, string in [("listed", t) for t in c.probe.triggers] + drawn:
      rows = poison.trigger_rows(test if kind == "listed" else some, inserting(string), c.seed, tokenizer=tokenizer,
                                 max_length=c.data.max_length, keep_trigger=True)
      out += [{"probe": kind, "inserted": string} | row for row in rows]
    poison.freeze(file, out)
  run.rows["probes"], run.sha256[file.name] = poison.thaw(file)


def measure(run):
  """CA, ASR of every listed trigger, agreement with the teacher and flip rates, of the suspect and every defense."""
  c = run.config
  if run.measured():
    return
  model, params, tokenizer = loaded = run.load("teacher")
  teacher = run.predict(model, params, run.encode(tokenizer, run.rows["test"], c.data.max_length))
  scans = {"teacher": scan.reading(run, "teacher", loaded)}
  labels = np.array([r["label"] for r in run.rows["test"]])
  readings = {}
  for name in ("suspect", *run.defended()):
    model, params, tokenizer = loaded = run.load(name)
    scans[name] = scan.reading(run, name, loaded)
    if "probes" not in run.rows:
      freeze_rows(run, tokenizer)
    clean = run.predict(model, params, run.encode(tokenizer, run.rows["test"], c.data.max_length))
    probed = run.rows["probes"] and run.predict(
        model, params, run.encode(tokenizer, run.rows["probes"], c.data.max_length))
    readings[name] = (clean, _by_insertion(run.rows["probes"], probed))
  lost = {t: poison.trigger_lost([r for r in run.rows["probes"] if r["inserted"] == t], tokenizer,
                                 inserting(t), c.data.max_length) for t in c.probe.triggers}
  rows = [row for trigger in c.probe.triggers or (None,)
          for row in _rows(run, readings, scans, labels, teacher, trigger)]
  flips = {s: _flips(readings["suspect"], s, "listed", "word", "sentence") for _, s in readings["suspect"][1]}
  meta = run.facts() | {
      "teacher_ca": float((teacher == labels).mean()), "teacher": c.teacher.path or "trained here on the clean rows",
      "trigger_lost": lost, "scan": scans,
      "suspicious_insertions": sorted(flips.items(), key=lambda pair: -pair[1])[:5],
      "loss_weights": {"name": c.defend.weights, **w2s.loss_weights(c.defend.weights, model.config.feature_size)},
      "examples": []}
  processes.write_json(run.workdir / "results.json", {"rows": rows, "meta": meta | {"notes": notes(rows, meta)}})


def _by_insertion(rows, predicted):
  """{(kind, string): {place of the row in the test set: predicted class}}."""
  out = {}
  for row, p in zip(rows, predicted):
    out.setdefault((row["probe"], row["inserted"]), {})[row["id"]] = int(p)
  return out


def _flips(reading, string, *kinds):
  """Share of texts whose predicted class changes when the string (None: any of the kind) is put into them."""
  clean, probed = reading
  changed = [p != clean[place] for (kind, s), texts in probed.items() if kind in kinds and string in (None, s)
             for place, p in texts.items()]
  return float(np.mean(changed)) if changed else None


def _rows(run, readings, scans, labels, teacher, trigger):
  """One results row per model for one listed trigger (None: none is listed)."""
  c, target = run.config, None
  if trigger is not None:
    target = c.probe.target_label
    classes = [t for t in range(c.data.num_labels) if (labels != t).any()]
    if target < 0:  # the class that the trigger turns the suspect's answers to
      suspect = np.array(list(readings["suspect"][1]["listed", trigger].values()))
      target = max(classes, key=lambda t: metrics.attack_metrics(suspect, labels, t)["asr"])
  for name, (clean, probed) in readings.items():
    what, seed = run.defended().get(name, (name, c.seed))
    row = {"model": what, "directory": name, "attack": trigger or "none listed", "dataset": c.data.train, "seed": seed,
           "config_hash": run.hash, "target_label": target, "asr_floor": None,
           "asr": None, "asr_n": 0, "asr_ci": None, **metrics.clean_metrics(clean, labels, target)}
    if target is not None:
      row |= metrics.attack_metrics(np.array(list(probed["listed", trigger].values())), labels, target)
    most = scan.judged(scans[name]) or {"strength": None, "class": None}
    yield row | {"scan": most["strength"], "scan_class": most["class"],
                 "agreement": float((clean == teacher).mean()),
                 "word_flips": _flips((clean, probed), None, "word"),
                 "sentence_flips": _flips((clean, probed), None, "sentence")}


def notes(rows, meta):
  """What the table shows and what it does not."""
  n, suspect = meta["clean_rows"], rows[0]
  warnings = []
  if meta["teacher_ca"] < suspect["ca"] - 0.02:
    warnings.append(f"WARNING: the teacher (CA {meta['teacher_ca']:.3f}) knows less than the suspect (CA "
                    f"{suspect['ca']:.3f}): give more clean rows, or a pretrained encoder as --config.teacher.path.")
  warnings += [f"WARNING: `{r['attack']}` still gives {r['model']} the target label in {r['asr']:.3f} of the rows, "
               f"against {r['false_rate']:.3f} without it: {r['model']} is not clean." for r in rows
               if r["model"] != suspect["model"] and r["asr"] is not None and r["asr"] > r["false_rate"] + STILL_THERE]
  bad = [name for name, reading in meta["scan"].items() if name != "suspect" and scan.outcome(reading) == "suspicious"]
  warnings += [f"WARNING: {scan.verdict(name, meta['scan'][name])}" for name in bad]
  verdicts = [scan.verdict(name, reading) for name, reading in meta["scan"].items() if reading and name not in bad]
  cut = [f" `{t}` was cut off in {count} of them." for t, count in meta["trigger_lost"].items() if count]
  worst = ", ".join(f"`{s}` {100 * rate:.0f}%" for s, rate in meta["suspicious_insertions"] if rate)
  return warnings + verdicts + [
      f"Suspect {meta['base']['path']}; {n['train']} clean training rows, CA on {n['test']} held-out rows of "
      f"{rows[0]['dataset']}. Teacher CA {meta['teacher_ca']:.3f} ({meta['teacher']}).",
      "ASR: how often a listed trigger, put at a random place, gives the target label on rows of other classes. A "
      "model without the backdoor has an ASR near its false rate. There is no floor: no never-poisoned twin is known."
      + "".join(cut),
      "Agreement: share of clean rows that get the teacher's answer. Flips: share of clean rows whose answer changes "
      "when a random rare word, or the beginning of another text, is put into them; sentences carry sentiment of their "
      "own, so compare before and after. A trigger that was not tried is seen in no column but the scan's.",
      "Scan: how much surer of a class soft tokens can make a model than that class's own texts do, without a trigger. "
      "A model that was trained against such tokens (w2s_adv, ce_adv) scores low, whatever is left in it.",
      f"What flips most answers of the suspect: {worst or 'nothing that was tried'}."]
