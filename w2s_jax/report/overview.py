"""The page of many runs: mean ASR and CA of each model under each setting, all tables, and links to the runs' pages."""

import html
import statistics
from collections.abc import Mapping, Sequence

from w2s_jax.report import page

RATES = {"asr": "Attack success rate (ASR)", "ca": "Clean accuracy (CA)"}


def page_of(title: str, legend: Sequence[str], groups: Mapping[tuple[str, str, str], Mapping[int, dict]],
            tables: Mapping[str, Sequence[tuple[str, ...]]], links: Mapping[str, str]) -> str:
  """One self-contained HTML page.

  Args:
    legend: one line per setting, with its letter, its runs, and the fields in which it differs from the first setting.
    groups: {(letter of the setting, trigger, model): {seed: row of results.json}}.
    tables: {heading: head and lines of a table}.
    links: {name of a run: address of its page}.
  """
  settings = list(dict.fromkeys((letter, attack) for letter, attack, _ in groups))
  models = list(dict.fromkeys(model for *_, model in groups))
  matrices = "".join(f"<h2>{name}, mean over seeds</h2>{_matrix(rate, settings, models, groups)}"
                     for rate, name in RATES.items()) if groups else "<p>No backdoor was implanted.</p>"
  runs = "".join(f"<li><a href='{html.escape(address)}'>{html.escape(name)}</a></li>"
                 for name, address in links.items())
  return page.frame(html.escape(title), f"""<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in legend)}</ul>
{matrices}
{"".join(f"<h2>{html.escape(heading)}</h2>{page.table(lines)}" for heading, lines in tables.items())}
<h2>Pages of the runs</h2>
<ul>{runs}</ul>""")


def _matrix(rate, settings, models, groups):
  """A row for each model, a column for each setting and trigger. In the table of ASR a higher rate is redder."""
  head = "".join(f"<th>{html.escape(f'{letter}: {attack[:24]}')}</th>" for letter, attack in settings)
  lines = ""
  for model in models:
    cells = ""
    for setting in settings:
      values = [row[rate] for row in groups.get((*setting, model), {}).values() if row[rate] is not None]
      if not values:
        cells += "<td>-</td>"
        continue
      mean = statistics.mean(values)
      colour = f" style='background: rgb(224 122 95 / {mean:.2f})'" if rate == "asr" else ""
      cells += f"<td{colour}>{mean:.3f}</td>"
    lines += f"<tr><th>{html.escape(model)}</th>{cells}</tr>"
  return page.wide(f"<table><tr><th>model</th>{head}</tr>{lines}</table>")
