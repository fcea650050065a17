"""Curves equal direct means; bands equal a bootstrap written out; nothing of an unfinished run gets into a mean."""

from __future__ import annotations

import numpy as np
import pytest

from cppo.report.curves import Metric, band, by_step, chart_of, thinned, training_charts
from cppo.report.source import open_source
from cppo.report.trust import result_chart, trust_section
from cppo.runs.folder import RunFolder
from cppo.study.statistics import expanded_level

from .made import STEPS


def named(source):
    return {chart.name: chart for chart in training_charts(source).charts} | {
        chart.name: chart for chart in trust_section(source, None).charts
    }


def test_by_step_is_the_mean_of_the_updates():
    rows = [{"step": 2, "a": 1.0}, {"step": 2, "a": 4}, {"step": 1, "a": None}, {"step": 1}, {"step": 3, "a": 7.0}]
    assert by_step(rows, "a") == {2: 2.5, 3: 7.0}


def test_a_band_is_the_bootstrap_of_the_mean():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 3)) * [1, 10, 0.1] + [0, 5, -1]
    low, high = band(values)
    for column in range(3):  # slowly, with other random numbers
        draws = [np.mean([values[i, column] for i in rng.integers(0, 5, 5)]) for _ in range(4000)]
        tail = (1 - expanded_level(5)) / 2
        expected = np.quantile(draws, [tail, 1 - tail])
        spread = np.ptp(values[:, column])
        np.testing.assert_allclose([low[column], high[column]], expected, atol=0.08 * spread)


def test_a_band_of_two_seeds_is_their_range_and_of_equal_ones_a_point():
    low, high = band(np.array([[1.0, 3.0], [2.0, 3.0]]))
    assert low.tolist() == [1.0, 3.0] and high.tolist() == [2.0, 3.0]


def test_lines_are_means_over_finished_seeds(study):
    source = open_source(study)
    chart = named(source)["reward"]
    assert [line.label for line in chart.lines] == ["dppo", "cppo"]
    for line in chart.lines:
        folders = [study / "runs" / f"{line.label}-seed{seed}" for seed in (0, 1)]
        for step in range(1, STEPS + 1):
            rewards = [row["reward"] for f in folders for row in RunFolder(f).metrics("train") if row["step"] == step]
            assert line.y[line.x.index(step)] == pytest.approx(np.mean(rewards))
        assert all(low <= y <= high for low, y, high in zip(line.low, line.y, line.high, strict=True))
        assert [thin.label for thin in line.thin] == [f"{line.label}-seed0", f"{line.label}-seed1"]


def test_every_figure_is_there(study):
    charts = named(open_source(study))
    assert {"reward", "length", "entropy", "avg-mean", "avg-chain-12", "avg-add-4"} <= charts.keys()
    assert {"masked", "drift", "mismatch", "reasons", "position-mean", "position-tail"} <= charts.keys()
    assert {"surrogate", "residual"} <= charts.keys()
    run = named(open_source(study / "runs" / "cppo-seed0"))
    assert {"reasons", "within", "position", "certificate"} <= run.keys()
    assert all(line.low is None for line in run["reward"].lines), "one run has no interval over seeds"


def test_unfinished_runs_are_thin_and_dashed_and_in_no_mean(half):
    source = open_source(half)
    lines = {line.label: line for line in named(source)["reward"].lines}
    assert set(lines) == {"dppo", "cppo"}, "grpo has no run"
    assert not any(thin.counted for thin in lines["cppo"].thin)
    assert list(lines["cppo"].x) == [1, 2], "the steps that all of them have"


def test_long_curves_are_thinned_alike():
    one, other = {step: float(step) for step in range(1, 1001)}, dict.fromkeys(range(1, 501), 1.0)
    short, half = thinned([one, other], 100)
    assert len(short) <= 100 and set(half) <= set(short)
    width = sorted(short)[1] - sorted(short)[0]
    for at, value in short.items():
        part = [step for step in one if step // width == at // width]
        assert value == pytest.approx(np.mean(part))
    assert thinned([other], 500) == [other]


def test_a_log_scale_only_where_it_can_be(study):
    source = open_source(study)
    metric = Metric("m", "m", "", "", "", scale="log")

    def scale(values):
        return chart_of(source, metric, lambda run: dict(enumerate(values, 1))).scale

    assert scale([1.0, 100.0]) == "log" and scale([0.0, 100.0]) == "linear" and scale([1.0, 2.0]) == "linear"


def test_shares_of_reasons(study):
    source = open_source(study)
    chart = named(source)["reasons"]
    cppo = list(chart.x).index("cppo")
    rows = [row for seed in (0, 1) for row in RunFolder(study / "runs" / f"cppo-seed{seed}").metrics("train")]
    for layer in chart.layers:
        assert layer.y[cppo] == pytest.approx(np.mean([row[f"trust/{layer.slot}_fraction"] for row in rows]))
    masked = np.mean([row["trust/masked_fraction"] for row in rows])
    assert sum(layer.y[cppo] for layer in chart.layers) == pytest.approx(masked)


def test_the_result_is_that_of_the_table(study):
    source = open_source(study)
    bars = {(bar.label, bar.note): bar for bar in result_chart(source.results).bars}
    for variant in source.results.variants:
        for which in ("best", "final"):
            estimate, bar = getattr(variant, which)["mean"], bars[variant.name, which]
            assert (bar.value, bar.low, bar.high) == (estimate.value, estimate.low, estimate.high)
