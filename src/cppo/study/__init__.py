"""The study: what rules do, and whether they help. docs/inspect.md and the pages beside it."""
