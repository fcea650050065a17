"""What a figure shows, before anyone draws it: the report's page (chart.js) and matplotlib (`show.figures`) draw it.

A `Chart` is plain numbers with words. `as_json` rounds to four significant digits, which is finer than any screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cppo.files import rounded

Numbers = Sequence[float | None]

#: Significant digits of what is drawn.
DIGITS = 4


@dataclass(frozen=True)
class Thin:
    """One run behind a line. counted : it is part of the mean and its interval (a finished run)."""

    label: str
    x: Numbers
    y: Numbers
    counted: bool = True


@dataclass(frozen=True)
class Line:
    """A line over x ``[n]``, with its interval where there is one.

    slot : number of its colour and dash, or "mean" (of the others: black). dashed : a second line of the same colour.
    """

    label: str
    slot: int | str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    thin: tuple[Thin, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Layer:
    """One reason (`slot`) of stacked bars: a value per bar."""

    label: str
    slot: str
    y: Numbers


@dataclass(frozen=True)
class Bar:
    """A figure with its interval: one row of "intervals"."""

    label: str
    slot: int
    value: float | None
    low: float | None
    high: float | None
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure.

    kind : "lines", "stack" (bars at `x`, which may be words) or "intervals" (rows with value and interval).
    form : how its figures are written, "percent", "number" or "integer". scale : of y, "linear", "log" or "symlog"
    (symmetric: signed, linear within 0.01 of zero). zero : the scale begins at 0. caption : what a reader must know.
    """

    name: str
    title: str
    kind: str
    x_label: str
    y_label: str
    form: str = "number"
    caption: str = ""
    scale: str = "linear"
    zero: bool = False
    lines: tuple[Line, ...] = ()
    layers: tuple[Layer, ...] = ()
    x: Sequence[float | str] = ()
    bars: tuple[Bar, ...] = ()
    reference: float | None = None
    """A value of the y axis (of "intervals": of the value axis) at which a thin line is drawn."""

    def as_json(self) -> dict[str, Any]:
        """Plain types, short."""
        head = {k: getattr(self, k) for k in ("name", "title", "kind", "form", "scale", "zero", "reference")}
        head |= {"xLabel": self.x_label, "yLabel": self.y_label}
        if self.kind == "lines":
            return head | {"lines": [_line(line) for line in self.lines]}
        if self.kind == "stack":
            layers = [{"label": la.label, "slot": la.slot, "y": short(la.y)} for la in self.layers]
            return head | {"x": [short_one(x) if isinstance(x, float) else x for x in self.x], "layers": layers}
        bars = [{"label": b.label, "slot": b.slot, "note": b.note} | _ends(b.value, b.low, b.high) for b in self.bars]
        return head | {"bars": bars}


@dataclass
class Section:
    """Charts under one heading."""

    name: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)


def short_one(value: float | None) -> float | int | None:
    """Rounded for the page; whole numbers without ".0"."""
    if value is None:
        return None
    number = rounded(float(value), DIGITS)
    if number is not None and number == int(number) and abs(number) < 1e9:
        # four digits are too few for a step or a position
        return int(value) if float(value) == int(value) else int(number)
    return number


def short(values: Numbers) -> list[float | int | None]:
    """`short_one` of each."""
    return [short_one(value) for value in values]


def _ends(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": short_one(value), "low": short_one(low), "high": short_one(high)}


def _line(line: Line) -> dict[str, Any]:
    found: dict[str, Any] = {"label": line.label, "slot": line.slot, "x": short(line.x), "y": short(line.y)}
    if line.low is not None and line.high is not None:
        found |= {"low": short(line.low), "high": short(line.high)}
    if line.dashed:
        found["dashed"] = True
    if line.thin:
        found["thin"] = [
            {"label": t.label, "x": short(t.x), "y": short(t.y)} | ({} if t.counted else {"open": True})
            for t in line.thin
        ]
    return found
