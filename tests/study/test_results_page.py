"""The tables of docs/results.md are what the committed raw results give."""

from __future__ import annotations

import functools
import re
from itertools import permutations
from pathlib import Path

import pytest

from cppo.study.compare import TABLE_1
from cppo.study.results import collapse
from cppo.study.statistics import paired_difference
from pages import results as page_of_results
from pages.results import NAMES, all_tables, load_frontier

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
load = functools.cache(page_of_results.load)


def test_the_tables_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m pages.results --docs docs` has been run since results or statistics changed."""
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(page_of_results, "load", load)  # the tests below want the same
    tables = all_tables()
    assert set(tables) == set(re.findall(r"<!-- (\S+):begin -->", page))
    for name, text in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert page.partition(begin)[2].partition(end)[0].strip() == text.strip(), name


@pytest.mark.parametrize("name", NAMES)
def test_the_studies_are_whole_and_matched(name: str) -> None:
    results = load(name)
    assert results.complete and not results.unmatched
    seeds = {variant.name: variant.seeds for variant in results.variants}
    assert len({tuple(found) for found in seeds.values()}) == 1
    if name in NAMES[:2]:
        assert set(seeds) == set(TABLE_1) and all(len(found) == 5 for found in seeds.values())
    for record in results.records:
        assert collapse(record.rewards) == record.collapsed_at
        for benchmark, scores in record.final_problems.items():
            assert sum(scores) / len(scores) == pytest.approx(record.final[benchmark], abs=1e-5)


def test_differences_beyond_noise_are_those_that_the_page_names() -> None:
    found = {}
    for name in NAMES[:2]:
        scores = {variant.name: {} for variant in load(name).variants}
        for record in load(name).records:
            scores[record.variant][record.seed] = list(record.final_problems.values())
        gaps = {pair: paired_difference(*(scores[rule] for rule in pair)) for pair in permutations(scores, 2)}
        found[name] = {pair for pair, gap in gaps.items() if gap.low > 0}
    assert found[NAMES[0]] == {("cppo", "minpro"), ("grpo", "cispo")}
    assert found[NAMES[1]] == {(one, other) for one in ("cppo", "grpo") for other in ("minpro", "trm_max", "trm_avg")}


def test_rules_had_the_same_parameters_in_all_studies() -> None:
    found = {(variant.name, variant.rule) for name in NAMES for variant in load(name).variants}
    assert len(found) == len(TABLE_1)


def test_the_frontier_is_whole() -> None:
    frontier = load_frontier()
    assert not frontier.missing and frontier.reference == "cppo"
