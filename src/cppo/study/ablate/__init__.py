"""Ablations: suites of matched runs that take CPPO apart (docs/ablate.md)."""
