"""How often a run saves, and whether it starts without room."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cppo.errors import UserError
from cppo.training.saving import GUESS, SHARE, SavePolicy, check_space, state_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(step=st.floats(0.5, 60), saving=st.floats(0.01, 30), size=st.floats(1e6, 1e10), steps=st.integers(50, 300))
def test_saving_takes_its_share_of_the_time_at_most(step: float, saving: float, size: float, steps: int) -> None:
    clock = Clock()
    policy = SavePolicy("auto", int(size), clock)
    last, gaps = 0, []
    for number in range(1, steps + 1):
        clock.now += step
        if policy.due(number):
            policy.starts()
            clock.now += saving
            policy.ends()
            gaps.append(number - last)
            last = number
    allowed = max(SHARE * clock.now, saving)  # the first save is a guess, and may take longer than was thought
    assert policy.spent <= allowed + 1e-6
    if SHARE * clock.now > size / GUESS + saving:
        assert gaps  # and it does save


def test_a_number_is_a_number_of_steps() -> None:
    policy = SavePolicy(3, 10**12)
    assert [step for step in range(1, 10) if policy.due(step)] == [3, 6, 9]


def test_a_checkpoint_holds_moments_of_what_is_trained() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    assert state_bytes(model) == (800, 800 + 800)


def test_a_disk_without_room_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 5 * 10**9))
    check_space(tmp_path, 540_000_000, 1_300_000_000, keep=1)
    with pytest.raises(UserError, match=r"5\.0 GB free, and the run needs about 5\.9 GB: 3 checkpoints of 1\.6 GB"):
        check_space(tmp_path, 540_000_000, 1_620_000_000, keep=2)
