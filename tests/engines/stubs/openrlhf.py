"""Loads OpenRLHF's real loss module, and nothing of the rest, on a machine without CUDA.

``openrlhf.models`` imports DeepSpeed, flash-attention and PEFT before it comes to its loss. So the packages above the
module are empty shells here with the real search path, and ``deepspeed``, which ``openrlhf/models/utils.py`` imports
for a function that no loss calls, is an empty module while that file is imported, where it is not installed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def shells() -> None:
    """Put the packages in place; imports below them find the installed files."""
    spec = find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations
    root = next(iter(spec.submodule_search_locations))
    for name in ("openrlhf", "openrlhf.models", "openrlhf.utils"):
        package = ModuleType(name)
        package.__path__ = [root + name.removeprefix("openrlhf").replace(".", "/")]
        sys.modules[name] = package


def load() -> tuple[Any, Any]:
    """The modules ``openrlhf.models.loss`` and ``openrlhf.utils.loss_utils``, freshly executed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]
    shells()
    missing = "deepspeed" not in sys.modules and find_spec("deepspeed") is None
    if missing:
        sys.modules["deepspeed"] = ModuleType("deepspeed")
    try:
        return import_module("openrlhf.models.loss"), import_module("openrlhf.utils.loss_utils")
    finally:
        if missing:  # others ask whether it is installed, and must hear the truth
            del sys.modules["deepspeed"]
