"""Does `w2s_adv` withstand an attacker who knows it, or later clean training?

  python benchmarks/robustness.py --main=runs/grid_offline/cells --attacks=badnet,insent --out=runs/robustness

The checks start from the poisoned students of a grid's cells (configs/grid_offline.py). These cells must have lora_ce,
w2s and w2s_adv:

  adaptive    The attacker trains the poisoned student further on the poisoned rows, with and without soft tokens (the
              loss of ce_adv). So it learns to obey the trigger and to ignore soft tokens. Then lora_ce, w2s and w2s_adv
              run.
  reactivate  A defended student is fine-tuned (lora_ce) on clean texts of the attacked domain.

A poisoned teacher is no check here, but a setting of a run: --config.teach.poison_rate.

Complete cells are not run again. Prints a table, and writes it to OUT/robustness.md. A row has the means and standard
deviations of a model over all attacks and seeds, and the ASR of each cell. `adaptive: poisoned` is the attacker's
student. `reactivate w2s_adv: poisoned` is the student that w2s_adv defended, measured on the attacked domain.
`reactivate w2s_adv: lora_ce` is the same student after the fine-tuning.
"""

import runpy
from pathlib import Path

import numpy as np
import runs

from w2s_jax.data import corpora, poison

DEFENSES = ("lora_ce", "w2s", "w2s_adv")


def flags(args, *defenses, data=None, max_length=None):
  out = [f"--config.defenses={('none', *defenses)}", *args.extra]
  return out + [f"--config.data.{name}={value}" for name, value in (
      ("defend_source", data), ("max_length", max_length)) if value]


def config_of(args, attack):
  return runpy.run_path(args.config.format(attack=attack))["get_config"]()


def adaptive(args, attack, seed, core):
  """{label: results.json} of one cell; None instead of the results if a run failed."""
  main, out, c = runs.workdir_of(args.main, attack, seed), args.out / "adaptive", config_of(args, attack)
  data = out / "data" / main.name
  domain = corpora.load(c.data.attack_source, corpora.GRAMMAR_SIZES, 2)
  rows, _ = poison.thaw(main / "data" / "poisoned_train.jsonl")
  runs.write_data(data, train=rows, dev=domain["dev"], test=domain["test"])
  attacker = runs.run_cell(attack, seed, out / "attacker", args.config,
                           flags(args, "ce_adv", data=data, max_length=c.data.attack_max_length), core,
                           runs.models_of(main, (*runs.STUDENT, "teacher")))
  students = runs.models_of(main, ("base", "clean", "teacher")) | {
      "poisoned": out / "attacker" / main.name / "models" / "ce_adv"}
  return {"adaptive": attacker and runs.run_cell(attack, seed, out / "defended", args.config, flags(args, *DEFENSES),
                                                 core, students)}


def reactivate(args, attack, seed, core):
  main, c = runs.workdir_of(args.main, attack, seed), config_of(args, attack)
  return {f"reactivate {defense}": runs.run_cell(
      attack, seed, args.out / "reactivate" / defense, args.config,
      flags(args, "lora_ce", data=c.data.attack_source, max_length=c.data.attack_max_length), core,
      runs.models_of(main, ("base", "clean", "teacher")) | {"poisoned": main / "models" / defense})
          for defense in DEFENSES}


CHECKS = {"adaptive": adaptive, "reactivate": reactivate}


def lines(label, cells):
  """Yields the rows of the table, one per model.

  label: first word of each row. cells: {(attack, seed): results.json, or None}.
  """
  rows = {cell: {row["model"]: row for row in r["rows"]} for cell, r in cells.items() if r}
  for model in next(iter(rows.values()), ()):
    got = {k: np.array([row[model][k] for row in rows.values()]) for k in ("ca", "asr", "false_rate")}
    yield (f"| {label}: {model} | " + " | ".join(runs.mean_sd(got[k]) for k in got) + " | "
           + " ".join(f"{attack} {seed}: {100 * x:.0f}" for (attack, seed), x in zip(rows, got["asr"])) + " |")


def main():
  parser = runs.make_parser(__doc__, "0-2", CHECKS)
  parser.add_argument("--main", required=True, type=Path, help="cells/ of a grid of attacks and seeds")
  args = runs.parse(parser, CHECKS)
  cells = [(attack, seed) for attack in args.attacks for seed in args.seeds]
  table, failed = ["| check: model | CA | ASR | false rate | ASR of each |", "|---|---|---|---|---|"], []
  print("\n".join(table), flush=True)
  for name in args.only:
    results = dict(zip(cells, runs.on_cores(lambda cell, core: CHECKS[name](args, *cell, core), cells, args.jobs)))
    for label in next(iter(results.values())):
      of_label = {cell: r[label] for cell, r in results.items()}
      failed += [(label, *cell) for cell, r in of_label.items() if not r]
      table += (new := list(lines(label, of_label)))
      print("\n".join(new), flush=True)
  (args.out / "robustness.md").write_text("\n".join(table) + "\n")
  runs.end(failed)


if __name__ == "__main__":
  main()
