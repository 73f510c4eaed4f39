"""The probes: test rows with a listed, found or random string, and texts of files that have a trigger already."""

from pathlib import Path
from typing import Any

from w2s_jax import InputError, results
from w2s_jax.attacks.insertion import inserting
from w2s_jax.data import insertions, paraphrases, poison, streams
from w2s_jax.measure import search


def tried(config: Any) -> list[tuple[str, str]]:
  """The triggers that ASR is measured for: ("listed", the string), then ("file", the name of a file of texts)."""
  return ([("listed", trigger) for trigger in config.probe.triggers]
          + [("file", Path(file).name) for file in config.probe.triggered])


def read_triggered(config: Any) -> dict[str, list[dict]]:
  """{key in Run.rows: rows} of the files in `probe.triggered`; see `_own_rows`.

  A row has "id", "text" and "label". Labels in the files are not used, because some files have true labels and others
  the target label. The texts must be of other classes than the target, so with two classes the true label is known.
  With more classes "label" is -1.

  Raises:
    InputError: a file has no texts, two files have the same name, or the target label is not given.
  """
  knob, target, out = "--config.probe.triggered", config.probe.target_label, {}
  if config.probe.triggered and target < 0:
    raise InputError("probe.triggered needs the class that the trigger gives: set --config.probe.target_label")
  for file in config.probe.triggered:
    if not isinstance(file, str):
      raise InputError(f"probe.triggered {tuple(config.probe.triggered)}: want paths of files: set {knob}")
    texts = [row["text"] for row in paraphrases.rows(file, knob) if row["text"]]
    if not texts:
      raise InputError(f"file {file} has no texts: set {knob}")
    if _own_rows(Path(file).name) in out:
      raise InputError(f"probe.triggered has two files of the name {Path(file).name}: rename one")
    label = 1 - target if config.data.num_labels == 2 else -1
    out[_own_rows(Path(file).name)] = [{"id": i, "text": text, "label": label} for i, text in enumerate(texts)]
  return out


def freeze_rows(run: Any) -> None:
  """Makes run.rows["probes"] once, and hashes their file.

  A probe is a test row with an inserted string, or a row of a file in `probe.triggered`. Each listed trigger is
  inserted into all test rows. The string that the search found and the random strings are all inserted into the same
  randomly chosen test rows. The found string stands at the place that the search found, the others at random places.
  """
  c, file = run.config, run.workdir / "data" / "probes.jsonl"
  if not file.exists():
    tokenizer = run.tokenizer(results.SUSPECT)
    test, out = [row | {"id": i} for i, row in enumerate(run.rows["test"])], []
    order = streams.rng(c.seed, "probed rows").permutation(len(test))   # files may be sorted by label
    probed = [test[i] for i in order[:c.probe.rows]]
    texts = [r["text"] for split in ("train", "test") for r in run.rows[split]]
    random_strings = insertions.insertions(texts, c.probe.words, c.probe.sentences, c.probe.triggers, c.seed)
    strongest = search.strongest(search.kept(run)["classes"])
    found_strings = [("found", strongest["string"])] if strongest else []
    for kind, string in [("listed", t) for t in c.probe.triggers] + found_strings + random_strings:
      attack = inserting(string, strongest["place"] if kind == "found" else "inside")
      rows = poison.trigger_rows(test if kind == "listed" else probed, attack, c.seed, tokenizer=tokenizer,
                                 max_length=c.data.max_length, keep_trigger=True)
      out += [{"probe": kind, "inserted": string} | row for row in rows]
    out += [{"probe": kind, "inserted": name} | row for kind, name in tried(c) if kind == "file"
            for row in run.rows[_own_rows(name)]]
    poison.freeze(file, out)
  run.rows["probes"], run.sha256[file.name] = poison.thaw(file)


def _own_rows(name):
  """Key in Run.rows of the rows of a file in `probe.triggered`."""
  return f"triggered {name}"
