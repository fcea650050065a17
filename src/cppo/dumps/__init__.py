"""Dumps of rollouts of any engine: reading, writing, inspecting, calibrating (docs/inspect.md)."""
