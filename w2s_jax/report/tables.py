"""Turns results into a Markdown table."""

from w2s_jax import results


def cells(rows: list[dict], names: tuple[str, ...]) -> list[tuple[str, ...]]:
  """The heads of the columns (results.COLUMNS) with these names, then the cells of each row."""
  columns = results.columns(rows, names)
  return [tuple(column.label for column in columns), *(tuple(column.cell(row) for column in columns) for row in rows)]


def table(rows: list[dict], names: tuple[str, ...]) -> str:
  """The Markdown table, with padded cells, so that its columns align in a terminal."""
  lines = cells(rows, names)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
  return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
