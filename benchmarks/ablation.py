"""What of `w2s_adv` does the work? One thing at a time is changed, on the same poisoned students.

  python benchmarks/ablation.py --attacks=badnet,insent,synattack --seeds=0-2 --out=runs/ablation [--only=fa_x10]

First seeds.py's cells with every control of the defense (OUT/main), then each variation below, which takes their base,
clean and poisoned student, and their teacher unless it changes that. (So the warm-up reads all texts, even if the
defense gets fewer rows.) Complete cells are not run again. Prints, and writes to OUT/ablation.md, a row per variation:
means over all attacks and seeds, and ASR of each cell, attack after attack.
"""

import numpy as np
import seeds

from w2s_jax.data import corpora
from w2s_jax.defenses import DEFENSES

CONTROLS = ("lora_ce", "w2s", *(name for name, defense in DEFENSES.items()
                               if defense.recipe and defense.recipe.soft_tokens))


def _teacher(width, layers, heads, *more):
  fields = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads}
  return *(f"--config.teacher.arch.{k}={v}" for k, v in fields.items()), *more


def _rows(share):
  """So much of the train and dev rows for teacher and student, as many steps as ever."""
  return (*(f"--config.data.defend_rows.{split}={int(corpora.GRAMMAR_SIZES[split] * share)}" for split in (
      "train", "dev")), *(
      f"--config.{stage}.{field}=500" for stage in ("teach", "defend") for field in ("epochs", "max_steps")))


# {name: flags}; {noisy} is a directory of data with wrong labels.
WEIGHTS = {
    "without_fa": ("--config.defense.w2s.weights=1,1,0",),
    "without_kd": ("--config.defense.w2s.weights=1,0,0.01",),
    "fa_x3": ("--config.defense.w2s.weights=1,1,0.03",),
    "fa_x10": ("--config.defense.w2s.weights=1,1,0.1",),
    "adapters_q_v": ("--config.lora.targets=('q_proj','v_proj')",),
}
TEACHERS = {
    "teacher_weaker": _teacher(8, 1, 2, "--config.teach.epochs=1"),
    "teacher_as_large": _teacher(64, 3, 4),
    "teacher_stronger": _teacher(128, 4, 4),
}
DATA = {
    "rows_tenth": _rows(0.1),
    "rows_hundredth": _rows(0.01),
    "wrong_labels_tenth": ("--config.data.defend_source={noisy}",),
}
VARIATIONS = WEIGHTS | TEACHERS | DATA
WITH_LORA_CE = {"adapters_q_v", *DATA}          # where the row to compare with changes too


def write_noisy(directory, seed, share=0.1):
  """train.json, dev.json and test.json of the phrases; so many train and dev labels are the other class's."""
  rng, splits = np.random.default_rng([seed, 9]), {}
  for name, examples in corpora.load("grammar:phrases", corpora.GRAMMAR_SIZES, 2).items():
    wrong = rng.random(len(examples)) < (0 if name == "test" else share)
    splits[name] = [r | {"label": int(r["label"] ^ w)} for r, w in zip(examples, wrong)]
  seeds.write_data(directory, **splits)


def run_variation(name, args, cells):
  """{(attack, seed): results, or None where the run failed}."""
  def cell(item, core):
    attack, seed = item
    flags = [flag.format(attack=attack, noisy=args.out / "noisy" / str(seed))
             for flag in (*VARIATIONS[name], *args.extra)]
    kept = ("teacher",) if name in WEIGHTS else ()
    defenses = ("none", "lora_ce", "w2s_adv") if name in WITH_LORA_CE else ("none", "w2s_adv")
    return seeds.run_cell(attack, seed, args.out / name, args.config, [f"--config.defenses={defenses}", *flags], core,
                          seeds.models_of(seeds.workdir_of(args.out / "main", attack, seed), seeds.STUDENT + kept))
  return dict(zip(cells, seeds.on_cores(cell, cells, args.jobs)))


def line(name, model, results, main, attacks):
  """One row of the table: `model` in the results of a variation, CA beside lora_ce's of the same cell."""
  values = {cell: {row["model"]: row for row in r["rows"]} for cell, r in results.items() if r}
  label = f"{name} ({len(values)} of {len(results)} cells)" if len(values) < len(results) else name
  if not values:
    return f"| {label} |"
  reference = [(v if "lora_ce" in v else {row["model"]: row for row in main[cell]["rows"]})["lora_ce"]["ca"]
               for cell, v in values.items()]
  got = {k: np.array([v[model][k] for v in values.values()]) for k in ("ca", "asr", "false_rate")}
  teacher = np.mean([results[cell]["meta"]["teacher_ca"] for cell in values])
  def mean(attack):
    own = [v[model]["asr"] for cell, v in values.items() if cell[0] == attack]
    return f"{np.mean(own):.3f}" if own else ""
  return "| " + " | ".join([
      label, seeds.mean_sd(got["ca"]), f"{(got['ca'] - reference).mean():+.3f}", seeds.mean_sd(got["asr"]),
      *map(mean, attacks), f"{got['false_rate'].mean():.3f}", f"{teacher:.3f}",
      " ".join(f"{100 * x:.0f}" for x in got["asr"])]) + " |"


def main():
  args = seeds.parse(seeds.make_parser(__doc__, "0-2", VARIATIONS), VARIATIONS)
  attacks = args.attacks
  defended = seeds.run_cells(attacks, args.seeds, args.out / "main", args.config,
                             [f"--config.defenses={('none', *CONTROLS)}", *args.extra], args.jobs)
  lines = [f"| variation | CA | CA - lora_ce | ASR | {' | '.join(attacks)} | false rate | teacher's CA | ASR of each |",
           "|---" * (7 + len(attacks)) + "|"]
  lines += [line(name, name, defended, defended, attacks) for name in ("clean", "poisoned", *CONTROLS)]
  print("\n".join(lines), flush=True)
  cells = [cell for cell, r in defended.items() if r]
  failed = [("main", *cell) for cell, r in defended.items() if not r]
  if "wrong_labels_tenth" in args.only:
    for seed in args.seeds:
      write_noisy(args.out / "noisy" / str(seed), seed)
  for name in args.only:
    results = run_variation(name, args, cells)
    failed += [(name, *cell) for cell, r in results.items() if not r]
    for model in ("lora_ce", "w2s_adv") if name in WITH_LORA_CE else ("w2s_adv",):
      lines.append(line(f"{name}: {model}", model, results, defended, attacks))
      print(lines[-1], flush=True)
  (args.out / "ablation.md").write_text("\n".join(lines) + "\n")
  seeds.end(failed)


if __name__ == "__main__":
  main()
