"""What of `w2s_adv` does the work? One thing at a time is changed, on the same poisoned students.

  python benchmarks/ablation.py --attacks=badnet,insent,synattack --seeds=0-2 --out=runs/ablation [--only=means,fa_x10]

First seeds.py's cells with every control of the defense (OUT/main), then each variation below, which takes their base,
clean and poisoned student, and their teacher unless it changes that. Complete cells are not run again. Prints, and
writes to OUT/ablation.md, a row per variation: means over all attacks and seeds, and ASR of each.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import seeds

from w2s_jax.data import corpora

CONTROLS = ("lora_ce", "w2s", "w2s_adv", "ce_adv", "w2s_adv_shuffled", "w2s_adv_within", "w2s_adv_means",
            "w2s_adv_orthogonal")
STUDENT = ("base", "clean", "poisoned")


def teacher_shape(width, layers, heads, *more):
  fields = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads}
  return *(f"--config.teacher.arch.{k}={v}" for k, v in fields.items()), *more


def rows(count):
  """So few clean rows for teacher and student, as many steps as ever."""
  return (f"--config.data.defend_rows.train={count}", *(
      flag for stage in ("teach", "defend") for flag in (f"--config.{stage}.epochs=500",
                                                         f"--config.{stage}.max_steps=500")))


# {name: flags}; {noisy} is a directory of data with wrong labels.
WEIGHTS = {
    "kd alone": ("--config.defend.weights=1,1,0",),
    "fa alone": ("--config.defend.weights=1,0,0.01",),
    "fa x3": ("--config.defend.weights=1,1,0.03",),
    "fa x10": ("--config.defend.weights=1,1,0.1",),
    "adapters on q, v": ("--config.lora.targets=('q_proj','v_proj')",),
}
TEACHERS = {
    "weaker teacher": teacher_shape(8, 1, 2, "--config.teach.epochs=1"),
    "teacher as large": teacher_shape(64, 3, 4),
    "stronger teacher": teacher_shape(128, 4, 4),
}
DATA = {
    "10% of the rows": rows(400),
    "1% of the rows": rows(40),
    "10% wrong labels": ("--config.data.defend_source={noisy}", "--config.data.defend_rows.train=0",
                         "--config.data.defend_rows.dev=0", "--config.data.defend_rows.test=0"),
}


def write_noisy(directory, seed, share=0.1, source="grammar:phrases", counts=(4000, 1000, 1821)):
  """train.json, dev.json and test.json of the phrases; so many train and dev labels are the other class's."""
  directory.mkdir(parents=True, exist_ok=True)
  split = corpora.load(source, dict(zip(("train", "dev", "test"), counts)), 2, seed)
  rng = np.random.default_rng([seed, 9])
  for name, examples in split.items():
    wrong = rng.random(len(examples)) < (0 if name == "test" else share)
    (directory / f"{name}.json").write_text(json.dumps(
        [{"text": r["text"], "label": int(r["label"] ^ w)} for r, w in zip(examples, wrong)]))


def run_variation(name, flags, args, attacks, jobs):
  """{(attack, seed): {model: row}} with "teacher" -> its CA."""
  def cell(item, core):
    attack, seed = item
    main = args.out / "main" / f"{attack}-{seed}"
    noisy = args.out / "noisy" / str(seed)
    if any("{noisy}" in flag for flag in flags) and not (noisy / "test.json").exists():
      write_noisy(noisy, seed)
    shared = STUDENT if name in TEACHERS or name in DATA else (*STUDENT, "teacher")
    names = ("none", *(("lora_ce",) if name in DATA or "adapters" in name else ()), "w2s_adv")
    return seeds.run_cell(attack, seed, args.out / name.replace(" ", "_").replace("%", ""), args.config, [
        f"--config.defenses={names}", *(flag.format(noisy=noisy) for flag in flags), *args.extra],
        core, main, shared)
  cells = [(attack, seed) for seed in args.seeds for attack in attacks]
  return dict(zip(cells, seeds.on_cores(cell, cells, jobs)))


def line(name, model, results, main):
  """One row of the table: `model` in the results of a variation, CA beside lora_ce's of the same cell."""
  values = {cell: {row["model"]: row for row in r["rows"]} for cell, r in results.items() if r}
  if not values:
    return f"| {name} | failed |"
  reference = {cell: (values[cell] if "lora_ce" in values[cell] else
                      {row["model"]: row for row in main[cell]["rows"]})["lora_ce"] for cell in values}
  got = {k: np.array([v[model][k] for v in values.values()]) for k in ("ca", "asr", "false_rate")}
  gap = got["ca"] - [reference[cell]["ca"] for cell in values]
  teacher = np.mean([results[cell]["meta"]["teacher_ca"] for cell in values])
  def pm(x):
    return f"{x.mean():.3f} ± {x.std(ddof=1) if len(x) > 1 else 0:.3f}"
  by_attack = [np.mean([v[model]["asr"] for cell, v in values.items() if cell[0] == attack])
               for attack in dict.fromkeys(cell[0] for cell in values)]
  each = " ".join(f"{100 * x:.0f}" for x in got["asr"])
  return f"| {name} | {pm(got['ca'])} | {gap.mean():+.3f} | {pm(got['asr'])} | " + " | ".join(
      f"{x:.3f}" for x in by_attack) + f" | {got['false_rate'].mean():.3f} | {teacher:.3f} | {each} |"


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/llama_{attack}.py")
  parser.add_argument("--attacks", default="badnet,insent,synattack")
  parser.add_argument("--seeds", default="0-2", type=seeds.seed_list)
  parser.add_argument("--out", required=True, type=Path)
  parser.add_argument("--only", default="", help="names of variations, comma-separated; all without it")
  parser.add_argument("--jobs", default=len(os.sched_getaffinity(0)), type=int)
  parser.add_argument("extra", nargs="*", help="further flags of w2s_jax.main, after --")
  args = parser.parse_args()
  variations, attacks = WEIGHTS | TEACHERS | DATA, args.attacks.split(",")
  if unknown := set(filter(None, args.only.split(","))) - set(variations):
    parser.error(f"--only: got {', '.join(sorted(unknown))}, want names among {', '.join(variations)}")
  defended = seeds.run_cells(attacks, args.seeds, args.out / "main", args.config,
                             [f"--config.defenses={('none', *CONTROLS)}", *args.extra], args.jobs)
  lines = [f"| variation | CA | CA - lora_ce | ASR | {' | '.join(attacks)} | false rate | teacher's CA | ASR of each |",
           "|---" * (7 + len(attacks)) + "|"]
  lines += [line(name, name, defended, defended) for name in ("clean", "poisoned", *CONTROLS)]
  print("\n".join(lines), flush=True)
  for name, flags in variations.items():
    if not args.only or name in args.only.split(","):
      results = run_variation(name, flags, args, attacks, args.jobs)
      new = [line(f"{name}: {model}", model, results, defended) for model in ("lora_ce", "w2s_adv")
             if any(model in [row["model"] for row in r["rows"]] for r in results.values() if r)]
      print("\n".join(new), flush=True)
      lines += new
  (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
  if failed := [cell for cell, r in defended.items() if r is None]:
    sys.exit(f"failed cells (see log.txt in each): {failed}")


if __name__ == "__main__":
  main()
