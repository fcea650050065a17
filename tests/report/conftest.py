"""One study, one half of a study and their pages, for all tests; and a real Chromium where there is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cppo.files import atomic_write_json
from cppo.report.page import Report, build
from cppo.report.source import open_source

from .made import page_of, plan_of, write_run, write_study

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dppo and cppo, two seeds, all finished."""
    folder = tmp_path_factory.mktemp("report") / "study"
    write_study(folder)
    return folder


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rules: one run finished, one failed half way, one in progress, the others not begun."""
    folder = tmp_path_factory.mktemp("report") / "half <b>study</b>"
    plan = plan_of(folder, ("dppo", "cppo", "grpo"))
    runs = {one.name: one for one in plan.trained}
    write_run(plan.folder_of(runs["dppo-seed0"]), runs["dppo-seed0"].config)
    write_run(plan.folder_of(runs["cppo-seed0"]), runs["cppo-seed0"].config, last=3)
    write_run(plan.folder_of(runs["cppo-seed1"]), runs["cppo-seed1"].config, last=2)
    atomic_write_json(folder / "status.json", {"errors": {"cppo-seed0": "<i>the disk is full</i>"}})
    return folder


@pytest.fixture(scope="session")
def report(study: Path) -> Report:
    """What the report of the whole study holds."""
    return build(open_source(study))


@pytest.fixture(scope="session")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the whole study."""
    return page_of(study, tmp_path_factory.mktemp("page") / "study.html")


def _chromium() -> str | None:
    return os.environ.get("CPPO_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where there is none."""
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CPPO_CHROMIUM to one")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        # in a container root has no namespace for the sandbox; the page is our own
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
