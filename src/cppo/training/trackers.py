"""Trackers that get the metrics beside the run folder (``report_to``): checked before a run starts, and placed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations import INTEGRATION_TO_CALLBACK

from cppo.errors import UserError
from cppo.words import nearest

_LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"


def check_trackers(names: Sequence[str]) -> None:
    """Every tracker must be known to transformers, and those that are named in the documentation installed.

    Raises
    ------
    UserError : one is not.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK and name not in ("all", "none"):
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to is {name!r}, expected some of {', '.join(known)}.{nearest(name, known)}")
        if name in ("tensorboard", "wandb", "trackio") and find_spec(name) is None:
            raise UserError(f"report_to={name} needs a package that is not installed: pip install {name}.")


@contextlib.contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Let transformers put its event files into `folder`, unless the user has set a place for them.

    Its default lies below the Trainer's output folder, which is emptied when a run resumes.
    """
    if _LOGGING_DIR in os.environ:
        yield
        return
    os.environ[_LOGGING_DIR] = str(folder)
    try:
        yield
    finally:
        del os.environ[_LOGGING_DIR]
