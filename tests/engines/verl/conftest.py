"""Paths and fixtures of the verl tests; and, before any module imports verl: a CPU as its platform, our plug-in.

This folder is no package: it would hide the real verl. Test modules begin with
``pytest.importorskip("verl.trainer", reason=...)``, which also tells this folder from the installed package.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# This folder for the helpers of the tests, `support` for what runs inside verl, `tests` for core/reference.py.
for folder in (HERE, HERE / "support", HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "cppo_cpu_plugin,cppo_verl_plugin")


@pytest.fixture(scope="session", autouse=True)
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends the session as Ctrl-C does: whoever started processes ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3 of random weights and its tokenizer."""
    import trainer_runs

    return trainer_runs.tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of little sums."""
    import trainer_runs

    return trainer_runs.sums(tmp_path_factory.mktemp("data") / "sums.parquet")


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """A process that has imported verl, for runs to fork from."""
    import trainer_runs

    with trainer_runs.Forks() as ready:
        yield ready
