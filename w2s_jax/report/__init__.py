"""Results tables, the HTML report, model cards."""
