"""The scorer with a vocabulary-parallel lm_head and with sequence shards, over gloo processes (score_worker.py)."""

from __future__ import annotations

import pytest

from gloo import run_workers


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_equal_the_whole(processes: int) -> None:
    run_workers("scoring.score_worker", processes)
