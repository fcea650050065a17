"""The program that a `Worker` runs: `python .../worker_process HANDLER`. It does not import cppo.

A folder of its own, because the folder of a program comes first on its `sys.path`: beside it, `math.py` and
`reasoning_gym.py` would hide the real modules of those names.
"""
