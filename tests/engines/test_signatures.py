"""Stubs take what the engines take, and engines still take what was recorded of them (stubs/facts.json)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from .stubs.facts import FACTS, named, signature

STUBS = {"prime-rl": "prime_rl", "nemo-rl": "nemo_rl", "slime": "slime"}


def recorded() -> Iterator[Any]:
    for engine, files in FACTS.items():
        for file in files:
            yield pytest.param(engine, file, id=file["module"])


def compare(file: dict[str, Any], module: Any) -> None:
    for name, members in file.get("members", {}).items():
        assert {m.name: m.value for m in named(module, name)} == members, (name, file["source"])
    found = {name: signature(named(module, name)) for name in file.get("signatures", {})}
    assert found == file.get("signatures", {}), file["source"]


@pytest.mark.parametrize("engine, file", recorded())
def test_stubs_take_what_the_engines_take(engine: str, file: dict[str, Any]) -> None:
    compare(file, import_module(f".stubs.{STUBS[engine]}", __package__))


@pytest.mark.parametrize("engine, file", recorded())
def test_engines_take_what_was_recorded(engine: str, file: dict[str, Any]) -> None:
    package = file["module"].split(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{engine} is not installed here (it is not on PyPI, or needs CUDA)")
    compare(file, import_module(file["module"]))
