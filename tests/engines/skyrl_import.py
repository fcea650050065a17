"""SkyRL 0.3.0 on Python 3.11.

Its `skyrl.tinker.types` puts a `typing.TypedDict` into a pydantic model, which pydantic refuses before Python 3.12:
there it wants `typing_extensions.TypedDict`. While that one module is imported, and only then, `typing` offers the
latter. Nothing of this is in the package: SkyRL on Python 3.12 does not need it.
"""

from __future__ import annotations

import importlib
import os
import sys
import typing
from typing import Any
from unittest import mock

import typing_extensions


def make_importable() -> None:
    """Import `skyrl.tinker.types`, after which all of SkyRL imports."""
    if sys.version_info < (3, 12) and "skyrl.tinker.types" not in sys.modules:
        with mock.patch.object(typing, "TypedDict", typing_extensions.TypedDict):
            importlib.import_module("skyrl.tinker.types")


def ray_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """For RAY_RUNTIME_ENV_HOOK: the same in Ray's workers, which also get this process's import path."""
    env = dict(runtime_env or {})
    env["env_vars"] = {**env.get("env_vars", {}), "PYTHONPATH": os.environ["PYTHONPATH"]}
    return {**env, "worker_process_setup_hook": f"{__name__}.make_importable"}
