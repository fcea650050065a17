"""Start a run with an engine for clusters: a recipe as the command of verl, checked first."""
