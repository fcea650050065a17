"""Adapters that put CPPO's rules into other people's trainers, one small module an engine.

Nothing is imported here: each module needs its engine installed (docs/engines.md). `cppo.engines.trl` needs ``pip
install "cppo[train]"``, `cppo.engines.verl` ``pip install "cppo[verl]"``.
"""
