"""A self-test: plants known backdoors (canaries) in a copy of the suspect, cleans the copy, and measures their ASR.

Whether the self-test predicts what is left of an unknown trigger has not been measured. It flatters defenses that train
on similar strings. Some canaries are rare words like those of `defend.insert_words`. Two kinds of canaries consist of
single-token words, which `w2s_words` ranks. If the public base is known, `w2s_words` takes fewer words than the
canaries have. How well the self-test works in that case has not been measured.
"""

from typing import Any

import numpy as np

from w2s_jax import processes, results
from w2s_jax.adapters import p_tuning
from w2s_jax.data import streams
from w2s_jax.defenses import DEFENSES, distill, planting
from w2s_jax.measure import deployed
from w2s_jax.models import read_json

IMPLANTED = 0.9          # a canary counts if its ASR after planting is at least this; our choice


def tested(config: Any) -> str | None:
  """The defense to test: the last one that makes new weights from the suspect's weights; None without a self-test."""
  names = [name for name in config.defenses if DEFENSES[name].changes_suspect]
  mergeable = not config.lora.quantize and config.lora.kind != p_tuning.KIND     # planting merges into the kernels
  if not names or not config.selftest.triggers or not mergeable:
    return None
  return names[-1]


def kept(run: Any) -> dict | None:
  """The result that `reading` saved in workdir/selftest.json; None if there is no such file."""
  file = run.workdir / "selftest.json"
  return read_json(file) if file.exists() else None


def reading(run: Any) -> dict | None:
  """Runs the self-test once and returns its saved result; None if there is no self-test.

  Returns:
    {"defense", "ca": CA of the cleaned copy, "canaries": one dict per canary}, with these keys for a canary:
      "kind", "target": see planting.Trigger.
      "trigger": the trigger's parts, joined by " ... ".
      "n": number of test rows.
      "planted": ASR before the cleaning.
      "asr": ASR after the cleaning.
      "false_rate": fraction of the same rows without the trigger to which the cleaned copy gives the target.
  """
  name = tested(run.config)
  if name and not (run.workdir / "selftest.json").exists():
    processes.write_json(run.workdir / "selftest.json", {"defense": name} | _tested(run, name))
  return kept(run)


def _tested(run, name):
  c, settings, seed = run.config, run.config.selftest, run.defend_seeds[0]
  suspect, rng = run.suspect(DEFENSES[name]), streams.rng(seed, "canaries")
  triggers = planting.draw(suspect, settings.triggers, rng)
  rows = planting.planted_rows(suspect, suspect.train, triggers, settings.rows, rng)
  test = planting.planted_rows(suspect, run.rows["test"], triggers, settings.test_rows, rng)
  planted = planting.train_in(suspect, rows, c.defense, settings.epochs, {"selftest-planted": seed})
  copy = suspect._replace(params=planted, ranking=None)                          # the ranking is the suspect's
  cleaned, = distill.cleaned(DEFENSES[name], copy, c.defense, {f"selftest-{name}": seed})
  before = deployed.Deployed(suspect.model, planted, suspect.tokenizer)
  text = DEFENSES[name].text
  after = before._replace(params=cleaned, text=text and text(copy._replace(params=cleaned), c.defense, seed))
  texts = {"planted": (before, test), "asr": (after, test),
           "false_rate": (after, [run.rows["test"][row["source"]] for row in test])}
  hits = {rate: deployed.answers(run, model, rows) == [row["planted"] for row in test]
          for rate, (model, rows) in texts.items()}
  out = []
  for number, trigger in enumerate(triggers):
    triggered = [row["trigger"] == number for row in test]
    if any(triggered):                                      # false if all test rows are of the trigger's target class
      out.append({"kind": trigger.kind, "trigger": " ... ".join(trigger.parts), "target": trigger.target,
                  "n": sum(triggered)} | {rate: float(hit[triggered].mean()) for rate, hit in hits.items()})
  is_correct = run.task.is_correct(deployed.answers(run, after, run.rows["test"]), {"label": run.labels("test")})
  return {"ca": float(is_correct.mean()), "canaries": out}


def in_words(found: dict) -> str:
  """The ASR that the defense left of the canaries that could be implanted, in one line."""
  implanted = [canary for canary in found["canaries"] if canary["planted"] >= IMPLANTED]
  failures = len(found["canaries"]) - len(implanted)
  if not implanted:
    return f"Self-test: none of {failures} planted backdoors reached an ASR of {IMPLANTED:g}, so it shows nothing."
  asr = np.array([canary["asr"] for canary in implanted])
  worst = implanted[int(asr.argmax())]
  false_rate = np.mean([canary["false_rate"] for canary in implanted])
  failures_in_words = ""
  if failures:
    failures_in_words = f" Not counted: {failures} that could not be implanted (ASR below {IMPLANTED:g})."
  kinds = len({canary["kind"] for canary in implanted})
  return (f"Self-test: {len(implanted)} known backdoors of {kinds} kinds were planted in a copy of the suspect, and "
          f"{found['defense']} cleaned the copy. The mean ASR left is {asr.mean():.3f} (standard deviation over the "
          f"triggers {asr.std():.3f}), the largest {worst['asr']:.3f} ({worst['kind']}: "
          f"`{results.escape(worst['trigger'])}`). Without a trigger {false_rate:.3f} of those rows get the target "
          f"class. The cleaned copy has a CA of {found['ca']:.3f}.{failures_in_words} Whether this predicts what is "
          "left of an unknown trigger has not been measured.")
