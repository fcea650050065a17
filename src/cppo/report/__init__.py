"""One self-contained HTML file about a run, a study or a dump: curves, tables, and every token with what rules did."""
