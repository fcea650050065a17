"""What engines define, as facts: names, parameters in their order, defaults, enum members (facts.json, by commit).

prime-rl, NeMo-RL and slime cannot be installed where the tests run (no package, CUDA). Their stubs here do what the
adapters need and take what the engines take: `tests/engines/test_signatures.py` compares stubs with these facts, and
the engines themselves where they can be imported.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

FACTS: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def named(module: Any, name: str) -> Any:
    """``Class.__call__`` of a module."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def signature(thing: Any) -> str:
    """Parameters and defaults, without annotations."""
    found = inspect.signature(thing)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def fields(engine: str, name: str) -> dict[str, Any]:
    """Keyword fields with their defaults, of a configuration class that a stub need not write down again."""
    recorded = next(x["signatures"][name] for x in FACTS[engine] if name in x.get("signatures", {}))
    scope: dict[str, Any] = {}
    exec(f"def f{recorded}: ...", scope)
    return {p.name: p.default for p in inspect.signature(scope["f"]).parameters.values()}
