"""Turns results into Markdown and LaTeX tables."""

from collections.abc import Sequence

from w2s_jax import results


def cells(rows: list[dict], names: tuple[str, ...]) -> list[tuple[str, ...]]:
  """The headers of the columns (results.COLUMNS) with these names, then the cells of each row."""
  columns = results.columns(rows, names)
  return [tuple(column.label for column in columns), *(tuple(column.cell(row) for column in columns) for row in rows)]


def table(rows: list[dict], names: tuple[str, ...]) -> str:
  """The Markdown table of these rows and columns."""
  return markdown(cells(rows, names))


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
  """The Markdown table of a header line and the other lines. Cells are padded, so that columns align in a terminal."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
  return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def latex(lines: Sequence[tuple[str, ...]]) -> str:
  """The LaTeX tabular of a header line and the other lines. It needs the package booktabs."""
  special = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                                                               "^": r"\textasciicircum{}", "±": r"$\pm$",
                                                               "<": r"$<$", ">": r"$>$", "|": r"$|$"})
  head, *body = (" & ".join(cell.translate(special) for cell in line) + r" \\" for line in lines)
  return "\n".join([rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", r"\toprule", head, r"\midrule", *body,
                    r"\bottomrule", r"\end{tabular}", ""])
