"""Progress in a terminal and in a log; responses with the tokens that were held back."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cppo.files import append_jsonl
from cppo.runs.samples import (
    legend,
    mark_response,
    pick_response,
    print_response,
    printable,
    render_response,
    render_sample,
)
from cppo.show import progress as progressing
from cppo.show.progress import RunProgress, accuracy_table, duration, figure

RECORD = {
    "step": 10,
    "update": 7,
    "prompt": "12+7=\n?",
    "advantage": -0.5,
    "tokens": ["a", " b", "c", "[x]", "\n", "d", "e"],
    "reason": ["kept", "token_limit", "token_limit", "towards", "prefix_budget", "outside", "kept"],
}


def console(terminal: bool, width: int = 120, **kwargs: object) -> Console:
    kwargs = {"color_system": "truecolor" if terminal else None} | kwargs
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, **kwargs)  # type: ignore[arg-type]


def output(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_words() -> None:
    assert [duration(s) for s in (7.4, 95, 7320)] == ["7 s", "1 min 35 s", "2 h 02 min"]
    assert figure("masked", 0.0123) == "masked 1.2%" and figure("reward", 0.5) == "reward 0.5"
    assert figure("trust/masked_fraction", 0.5) == "trust/masked_fraction 50.0%" and figure("step", 3) == "step 3"
    assert figure("loss", float("nan")) == "loss nan"


def test_one_line_a_step_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(progressing.time, "monotonic", lambda: float(next(clock)))
    out = console(terminal=False)
    with RunProgress(out, results="runs/a") as progress:
        assert progress.plain
        progress.start_phase("training", 3)
        progress.advance(reward=0.5, masked=0.0213, loss=None)
        progress.note("checkpoint [saved]")
        progress.advance(reward=0.75)
        progress.advance()
        progress.start_phase("evaluation", None)
        progress.advance(5)
    lines = output(out).splitlines()
    assert "\x1b" not in output(out)
    assert lines[0] == "training: 3 steps" and "checkpoint [saved]" in lines
    assert lines[1].startswith("training 1/3 | reward 0.5 | masked 2.1% | ") and lines[1].endswith(" left")
    assert lines[3].startswith("training 2/3 | reward 0.75 | masked 2.1% | ")
    assert lines[4] == "training 3/3 | reward 0.75 | masked 2.1%"
    assert any(line.startswith("training: done in ") for line in lines) and "evaluation 5" in lines
    assert "Results: runs/a (begin with runs/a/summary.md)" in lines[-1]


def test_long_phases_and_resumed_phases_stay_readable() -> None:
    out = console(terminal=False)
    progress = RunProgress(out)
    progress.start_phase("warm-up", 2000)
    for _ in range(2000):
        progress.advance()
    assert 150 < len(output(out).splitlines()) <= 202
    assert "warm-up 2000/2000" in output(out)
    progress.start_phase("training", 100, done=90, every=5)
    assert progress.remaining() is None
    for _ in range(10):
        progress.advance()
    assert next(line for line in output(out).splitlines() if line.startswith("training ")).startswith("training 95/100")
    progress.close()
    progress.close()


def test_terminal_display() -> None:
    out = console(terminal=True)
    with RunProgress(out, plain=False, results="runs/a") as progress:
        progress.start_phase("training [cppo]", 2)
        progress.advance(reward=0.5, masked=0.02)
        progress.note("a note")
        progress.advance()
        progress.pause()
        progress.start_phase("evaluation", 1)
        progress.advance()
    text = output(out)
    for part in ("training [cppo]", "reward 0.5", "masked 2.0%", "2/2", "a note", "evaluation", "Results: runs/a"):
        assert part in text, part


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert RunProgress(console(terminal=True)).plain


def test_an_error_announces_no_results() -> None:
    out = console(terminal=False)

    def interrupted() -> None:
        with RunProgress(out, results="runs/a") as progress:
            progress.start_phase("training", 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "Results" not in output(out)


def test_marks_and_legend() -> None:
    assert mark_response(RECORD) == "a[[ bc]][x][[\n]]de"
    assert legend(RECORD) == (
        "6 loss tokens: 2 kept, 1 over a limit but kept (moves back to the rollout policy), 2 over the token limit, "
        "1 prefix budget used up"
    )
    long = {"tokens": ["k"] * 100 + ["x"] + ["k"] * 100, "reason": ["kept"] * 100 + ["token_limit"] + ["kept"] * 100}
    assert mark_response(long, 20) == "..." + "kkkkk[[x]]" + "k" * 14 + "..."
    assert pick_response([]) is None
    assert pick_response([long, RECORD]) is RECORD
    assert printable("a\x1b[1m\u202e\ud800\t") == "a\\x1b[1m\\u202e\\ud800\t"


def test_response_with_and_without_colour() -> None:
    plain, coloured = console(terminal=False), console(terminal=True)
    print_response(RECORD, plain)
    assert "a[[ bc]][x][[\n]]de" in output(plain) and "> 12+7=\n> ?" in output(plain)
    assert "step 10, update 8 of its rollout batch, advantage -0.50" in output(plain) and "\x1b" not in output(plain)
    print_response(RECORD, coloured)
    assert "[[" not in output(coloured) and "\x1b[" in output(coloured) and "[x]" in output(coloured)
    text = render_response(RECORD)
    assert text.plain == "a bc[x]\u21b5\nde" and len(text.spans) >= 3
    uncoloured = console(terminal=True, no_color=True)
    print_response(RECORD, uncoloured)
    assert "a[[ bc]]" in output(uncoloured)


def test_render_sample(tmp_path: Path) -> None:
    out = console(terminal=False)
    assert not render_sample(tmp_path, out)
    append_jsonl(tmp_path / "samples" / "step-000010.jsonl", RECORD)
    assert render_sample(tmp_path, out) and "a[[ bc]]" in output(out)


def test_accuracy_table() -> None:
    out = console(terminal=False)
    before = {"samples": 16, "avg/a": 0.5, "avg/b": 0.25, "avg/mean": 0.375, "pass/a": 0.75, "pass/mean": 0.5}
    out.print(accuracy_table(before, before | {"avg/a": 0.875, "avg/mean": 0.5625}))
    text = output(out)
    for part in ("Avg@16 before", "pass@16 after", "+0.375", "+0.188", "+0.000", "mean", "0.750"):
        assert part in text, part
    out.print(accuracy_table(before, None))
    out.print(accuracy_table(None, None))
