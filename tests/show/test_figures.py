"""A drawer per kind of chart: it leaves ink, and says what the chart says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cppo.show.charts import Bar, Chart, Layer, Line, Thin
from cppo.show.figures import draw, save_figure

STEPS = [1, 2, 3]
CURVE = Line("cppo", 0, STEPS, [0.1, None, 0.3], [0.0, 0.1, 0.2], [0.2, 0.3, 0.4], (Thin("seed", STEPS, STEPS),))
CHARTS = [
    Chart("l", "Lines of $", "lines", "step", "y", lines=(CURVE, Line("mean", "mean", STEPS, STEPS)), reference=0.5),
    Chart("g", "Logarithmic", "lines", "step", "y", scale="log", lines=(Line("a", 7, STEPS, [0.001, 0.01, 0.1]),)),
    Chart("s", "Signed", "lines", "step", "y", scale="symlog", lines=(Line("a", 1, STEPS, [-1, 0.0, 9]),)),
    Chart("k", "Stack", "stack", "step", "share", "percent", layers=(Layer("x", "token_limit", [0.1, None]),), x="12"),
    Chart("w", "Words", "stack", "", "share", layers=(Layer("x", "ratio_clip", [0.1, 0.2]),), x=("cispo", "minpro")),
    Chart("i", "Intervals", "intervals", "", "Avg", bars=(Bar("a", 0, 0.4, 0.3, 0.5), Bar("a", 0, 0.3, None, None))),
]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_drawer_per_kind(chart: Chart, tmp_path: Path) -> None:
    (path,) = save_figure(draw(chart), tmp_path, chart.name, dpi=60, kinds=["png"])
    with Image.open(path) as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 3, "blank"
    (ax,) = draw(chart).axes
    assert ax.get_title(loc="left").replace("\\$", "$") == chart.title and ax.get_xlabel()
    assert len({"lines": ax.lines, "stack": ax.patches, "intervals": ax.lines}[chart.kind]) >= 1


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in save_figure(draw(CHARTS[0]), tmp_path, "x")]
    assert first == [path.read_bytes() for path in save_figure(draw(CHARTS[0]), tmp_path, "x")]
    assert [path.name for path in tmp_path.iterdir()] and len(first) == 2
