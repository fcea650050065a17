"""The progress of a run in a terminal, and one compact line a step where there is none (CI logs, TERM=dumb).

`RunProgress` shows phases (warm-up, evaluation, rollout + updates) with figures and the remaining time. Nothing here
goes into a run folder: wall-clock time is for the reader of the terminal alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cppo.show.tables import Cells

MAX_PLAIN_LINES = 200  # of a phase whose `every` is not given


def duration(seconds: float) -> str:
    """7 -> "7 s", 95 -> "1 min 35 s", 7300 -> "2 h 02 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figure(name: str, value: Any) -> str:
    """One figure as text: shares ("masked", "masked_fraction", "...accuracy") in percent, other floats in 3 digits."""
    if isinstance(value, float):
        words = name.replace("/", "_").split("_")
        share = name.startswith("masked") or any(word in words for word in ("fraction", "accuracy", "avg", "pass"))
        return f"{name} {value:.1%}" if share else f"{name} {value:.3g}"
    return f"{name} {value}"


class RunProgress:
    """`with RunProgress() as progress:` start_phase(...), advance(...), note(...); close() says where results went.

    plain: True for lines instead of a display; None decides: lines unless the console is a terminal that can redraw.
    results: the folder named at the end (also settable later as attribute); no line without it.
    """

    def __init__(
        self, console: Console | None = None, plain: bool | None = None, results: str | Path | None = None
    ) -> None:
        self.console = console if console is not None else Console()
        if plain is None:
            plain = not self.console.is_terminal or self.console.is_dumb_terminal or os.environ.get("TERM") == "dumb"
        self.plain = plain
        self.results = results
        self._name = ""
        self._total: int | None = None
        self._done = self._printed = 0
        self._initial = 0
        self._every = 1
        self._figures: dict[str, str] = {}
        self._began = self._run_began = time.monotonic()
        self._open = True
        self._task: TaskID | None = None
        self._display: Progress | None = None

    def start_phase(self, name: str, total: int | None, done: int = 0, every: int | None = None) -> None:
        """Begin a phase of `total` steps (None: unknown), of which `done` were made before (a resumed run).

        The phase before is closed. every: without a terminal, print a line each `every` steps (None: every step, fewer
        for more than 200).
        """
        self._end_phase()
        self._name, self._total, self._done, self._initial = name, total, done, done
        self._printed = done
        self._every = every if every is not None else max(1, (total or 0) // MAX_PLAIN_LINES)
        self._figures = {}
        self._began = time.monotonic()
        if self.plain:
            self._line(
                f"{name}: {'' if total is None else f'{total} steps'}{f', {done} done' if done else ''}".rstrip(": ")
            )
            return
        if self._display is None:
            self._display = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                # a step takes seconds to minutes: estimate over many of them, redraw seldom
                speed_estimate_period=600,
                refresh_per_second=4,
            )
            self._display.start()
        self._task = self._display.add_task(escape(name), total=total, completed=done, figures="")

    def advance(self, n: int = 1, **figures: Any) -> None:
        """`n` more steps are done; `figures` (reward=, masked=, loss= ...) replace those of the same name."""
        self._done += n
        self._figures |= {name: figure(name, value) for name, value in figures.items() if value is not None}
        if self._display is not None and self._task is not None:
            self._display.update(self._task, advance=n, figures=escape("  ".join(self._figures.values())))
        elif self.plain and (self._done - self._printed >= self._every or self._done == self._total):
            self._printed = self._done
            count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
            parts = [f"{self._name} {count}", *self._figures.values()]
            left = self.remaining()
            if left is not None and self._total is not None and self._done < self._total:
                parts.append(f"{duration(left)} left")
            self._line(" | ".join(parts))

    def remaining(self) -> float | None:
        """Seconds that the phase still takes at its mean speed so far; None where that is not known yet."""
        made = self._done - self._initial
        if self._total is None or made <= 0:
            return None
        return (time.monotonic() - self._began) / made * max(0, self._total - self._done)

    def note(self, text: str) -> None:
        """Print a line of its own, above the display if there is one."""
        console = self.console if self._display is None else self._display.console
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end_phase(self) -> None:
        if not self._name:
            return
        if self._display is not None and self._task is not None:
            self._display.stop_task(self._task)
            self._display.refresh()
        elif self.plain:
            self._line(f"{self._name}: done in {duration(time.monotonic() - self._began)}")
        self._name, self._task = "", None

    def pause(self) -> None:
        """Take the display off the screen (before tables, a traceback ...); the next phase brings it back."""
        self._end_phase()
        if self._display is not None:
            self._display.stop()
            self._display = None

    def close(self) -> None:
        """End the display and say where the results are. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self.pause()
        if self.results is not None:
            spent = duration(time.monotonic() - self._run_began)
            self._line(f"{spent} in all. Results: {self.results} (begin with {Path(self.results) / 'summary.md'})")

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # a failed run has no results to announce; whoever handles the error says what to do
            self.results = None
        self.close()


def accuracy_table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Group:
    """Accuracy before and after as a table; takes evaluation rows ("avg/<benchmark>", "pass/...", "samples")."""
    rows = [row for row in (before, after) if row]
    k = _samples(rows)
    title = f"Accuracy on held-out problems ({k} samples per problem)" if k else "Accuracy on held-out problems"
    avg, passed = f"Avg@{k or 'k'}", f"pass@{k or 'k'}"
    columns = ("benchmark", f"{avg} before", f"{avg} after", "change", f"{passed} before", f"{passed} after")
    names = list(dict.fromkeys(key.removeprefix("avg/") for row in rows for key in row if key.startswith("avg/")))
    names = [name for name in names if name != "mean"] + (["mean"] if "mean" in names and len(names) != 2 else [])
    lines = []
    for name in names:
        values = [None if row is None else row.get(f"avg/{name}") for row in (before, after)]
        passes = [None if row is None else row.get(f"pass/{name}") for row in (before, after)]
        change = "" if values[0] is None or values[1] is None else f"{values[1] - values[0]:+.3f}"
        lines.append((name, *map(_three, values), change, *map(_three, passes)))
    return Cells(title, columns, lines, bold="mean").rich()


def _samples(rows: list[Mapping[str, Any]]) -> str:
    counts = sorted({int(row["samples"]) for row in rows if row.get("samples")})
    return " and ".join(map(str, counts))


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
