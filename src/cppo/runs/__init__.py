"""What lies in a run folder: names, readers, writers, plots and the summary (docs/runs.md)."""
