"""Context-parallel rows and vocabulary-parallel heads: each process compares its part with the whole."""

from __future__ import annotations

import pytest

from gloo import run_checks

MODULES = (
    "core.shard_checks",
    "scoring.vocab_checks",
    "scoring.score_checks",
    "scoring.adaptive_checks",
    "engines.judge_checks",
)


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_equal_the_whole(processes: int) -> None:
    run_checks(MODULES, processes)
