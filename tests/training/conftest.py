"""The program in this process, and one whole run that tests read (and never change)."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import ARITHMETIC, train
from typer.testing import CliRunner

from cppo.cli import app as cli
from cppo.training import run as run_module


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """The program in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture
def no_plots(monkeypatch):
    """Half of the time of the smallest runs."""
    monkeypatch.setattr(run_module, "write_plots", lambda folder: None)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A whole run of the built-in task, with a warm-up."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train(*ARITHMETIC, "steps=2", "evaluation.every=1", "samples.every=1", f"output_dir={folder}")
    assert result.folder == folder
    return folder


@pytest.fixture(scope="session")
def policy(whole) -> Path:
    """A model folder such as a user would have."""
    return whole / "warmup" / "model"
