"""Figures as files for papers."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cppo.files import atomic_write_bytes


def save_figure(figure: Figure, folder: str | Path, name: str, dpi: int = 130) -> list[Path]:
    """Write NAME.png and NAME.svg, the same bytes for the same figure. dpi: of the PNG. Raises: files.DiskFullError."""
    paths = []
    for suffix, options in (("png", {"dpi": dpi}), ("svg", {"metadata": {"Date": None}})):
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "cppo"}):  # else its ids are random
            FigureCanvasAgg(figure)
            figure.savefig(data, format=suffix, **options)
        paths.append(atomic_write_bytes(Path(folder) / f"{name}.{suffix}", data.getvalue()))
    return paths
