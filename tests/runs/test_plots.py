"""Plots and summary from run folders: whole, short, without evaluation, without anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import synthetic
from cppo.files import atomic_write_text, read_jsonl
from cppo.runs import charts, plots
from cppo.runs.folder import RunFolder
from cppo.runs.records import best_evaluation
from cppo.runs.summary import write_summary

NAMES = ["reward.png", "avg.png", "masked.png", "divergence.png", "certificate.png"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_run(tmp_path_factory.mktemp("run"), steps=24, updates=4)


def check(folder: Path) -> None:
    """There is a figure of each, with words. That a chart leaves ink is tested with the drawers."""
    figures = plots.figures_of(folder)
    assert [f"{name}.png" for name in figures] == NAMES and all(map(texts, figures.values()))


def texts(figure: Figure) -> str:
    parts = []
    for ax in figure.axes:
        parts += [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
        legend = ax.get_legend()
        parts += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(parts)


def test_plots_exist_and_are_made_again(run: Path) -> None:
    first = {path.name: path.read_bytes() for path in plots.write_plots(run)}
    check(run)
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(NAMES)  # no temporary files
    assert all(data.startswith(b"\x89PNG") for data in first.values())
    (run / "plots" / "avg.png").write_bytes(b"broken")
    again = {path.name: path.read_bytes() for path in plots.write_plots(run)}
    assert first == again


def test_plots_say_what_one_sees(run: Path) -> None:
    rows, positions = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "positions.jsonl")
    assert "Training reward: from" in texts(plots.draw_reward(rows))
    avg = texts(plots.draw_avg(rows))
    assert "Before and after (step 0 and step 24)" in avg and "chain_long" in avg and "points" in avg
    masked = texts(plots.draw_masked(rows))
    assert "token limit" in masked and "prefix budget" in masked and "sequence limit" not in masked
    divergence = texts(plots.draw_divergence(positions))
    assert "steps 1-5: mean of the top 10%" in divergence and "steps 20-24: mean" in divergence
    assert "update 4 of a batch" in divergence
    certificates = texts(plots.draw_certificate(RunFolder(run).certificates()))
    assert (
        "How far the surrogate can be trusted" in certificates and "bound of its error, from the ratios" in certificates
    )
    right = plots.draw_masked(rows).axes[1]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "3", "4"] and len(right.patches) == 8


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", ["cppo", "ppo_clip"])
def test_short_runs(tmp_path: Path, steps: int, name: str) -> None:
    synthetic.write_run(tmp_path, steps=steps, updates=1, name=name)
    check(tmp_path)
    assert "skipped" in write_summary(tmp_path) or steps == 0


def test_missing_data_is_said(tmp_path: Path) -> None:
    check(tmp_path)
    assert "No reward yet" in texts(plots.draw_reward([]))
    assert "No evaluation" in texts(plots.draw_avg([]))
    assert "No training update" in texts(plots.draw_masked([]))
    assert "No divergence yet" in texts(plots.draw_divergence([]))
    assert "No certificate" in texts(plots.draw_certificate([]))
    train = {"step": 1, "update": 0, "kind": "train", "reward": None, "trust/masked_fraction": 0.0}
    assert "No update has had a loss token" in texts(plots.draw_masked([train]))
    assert "No token was held back in any update" in texts(plots.draw_masked([train | {"trust/kept_fraction": 1.0}]))
    assert "the rule measures none" in texts(
        plots.draw_divergence([{"step": 1, "update": 0, "width": 1, "count": [1]}])
    )
    one = {"step": 0, "update": 0, "kind": "evaluation", "avg/a": 0.5, "avg/mean": 0.5, "samples": 4}
    assert "One evaluation only" in texts(plots.draw_avg([one]))
    text = write_summary(tmp_path)
    assert "No evaluation in this run." in text and "No training update" in text and "No checkpoint" in text


def test_many_benchmarks_and_wide_responses(tmp_path: Path) -> None:
    for step in (0, 5):
        scores = {f"avg/a benchmark with a long name {i}": 0.1 * (i % 5) + step / 50 for i in range(14)}
        row = {"step": step, "update": 0, "kind": "evaluation", "samples": 4}
        RunFolder(tmp_path).append_metrics(row | scores | {"avg/mean": 0.3})
    wide = {"step": 2, "update": 7, "width": 2, "count": [10, 10], "sum": [1.0, 2.0], "tail_mean": [0.5, 0.6]}
    narrow = {"step": 1, "update": 7, "width": 1, "count": [30, 10], "sum": [1.0, 1.0], "tail_mean": [0.1, 0.1]}
    atomic_write_text(tmp_path / "positions.jsonl", json.dumps(narrow) + "\n" + json.dumps(wide) + "\n")
    check(tmp_path)
    pooled = charts.pool_positions([narrow, wide])
    assert pooled["position"].tolist() == [1, 3] and pooled["count"].tolist() == [50, 10]
    assert pooled["mean"] == pytest.approx([3 / 50, 0.2])
    assert pooled["tail_mean"] == pytest.approx([(40 * 0.1 + 10 * 0.5) / 50, 0.6])


def test_before_and_after_compares_like_with_like() -> None:
    def row(step: int, samples: int, score: float) -> dict[str, object]:
        base = {"step": step, "update": 0, "kind": "evaluation", "samples": samples}
        return base | {"avg/a": score, "avg/mean": score}

    rows = [row(0, 16, 0.5), row(5, 4, 0.9), row(10, 16, 0.8), row(10, 4, 0.7)]
    before, after = plots.before_and_after(rows)
    assert (before, after) == (rows[0], rows[2])
    assert plots.before_and_after(rows[:2]) == (rows[0], rows[1])
    assert plots.before_and_after([]) == (None, None)
    assert best_evaluation(rows) == rows[1]
    assert best_evaluation([row(1, 4, 0.5), row(2, 4, 0.5)])["step"] == 1  # type: ignore[index]


def test_summary_has_everything(run: Path) -> None:
    for name in ("checkpoints/step-000024", "best/step-000024"):
        (run / name).mkdir(parents=True, exist_ok=True)
    text = write_summary(run)
    assert (run / "summary.md").read_text() == text
    for part in (
        "# cppo on arithmetic",
        "| rule | cppo (delta=0.15, delta_b=0.02) |",
        "| seed | 7 |",
        "24 (rollout batches), 96 updates",
        "Avg@16 before",
        "pass@16 after",
        "Best validation score within the budget",
        "saved in `best/step-000024`",
        "tokens held back (masked fraction)",
        "- over the token limit",
        "- prefix budget used up",
        "mismatch, near 0",
        "| groups left out since all their rewards were equal | 20.00% |",
        "| 1 of 96 |",
        "[[",
        "loss tokens:",
        "| rollouts (first update of each batch less the median of its others) | 24 s | 44% |",
        "| updates | 24 s | 44% |",
        "AutoModelForCausalLM.from_pretrained",
        f"cppo train --resume {run}",
    ):
        assert part in text, part
    train = [row["trust/masked_fraction"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
    assert f"| {sum(train) / len(train):.2%} |" in text


def test_updates_without_a_token_are_no_update_in_which_nothing_was_held_back(tmp_path: Path) -> None:
    """Their shares are logged as 0; the share of step 2 is that of its second update, and stays in its place."""
    shares = [(0.2, 0.8), (0.4, 0.6), (0.0, 0.0), (0.9, 0.1)]
    for update, (masked, kept) in enumerate(shares, 1):
        trust = {"trust/masked_fraction": masked, "trust/token_limit_fraction": masked, "trust/kept_fraction": kept}
        RunFolder(tmp_path).append_metrics({"step": (update + 1) // 2, "update": update, "kind": "train", **trust})
    text = write_summary(tmp_path)
    assert "the 3 of 4 updates that had a loss token" in text and "| 50.00% |" in text
    figure = plots.draw_masked(read_jsonl(tmp_path / "metrics.jsonl"))
    assert "50.00% on average" in texts(figure)
    over, within = figure.axes
    assert [bar.get_height() for bar in over.patches] == pytest.approx([0.3, 0.9])
    assert [bar.get_height() for bar in within.patches] == pytest.approx([0.2, 0.65])


def test_summary_of_an_adaptive_divergence(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, steps=1, updates=2)
    said = ("whose exact divergence was needed", "bytes per token that the divergence keeps")
    assert not any(part in write_summary(tmp_path) for part in said)
    for share in (0.1, 0.2):
        row = {"step": 2, "update": 3, "kind": "train", "trust/masked_fraction": 0.0, "trust/kept_fraction": 1.0}
        row |= {"trust/resolved_fraction": share}
        RunFolder(tmp_path).append_metrics(row | ({"trust/divergence_bytes_per_token": 612.0} if share == 0.1 else {}))
    text = write_summary(tmp_path)
    assert all(part in text for part in said)
    assert "| 15.00% |" in text and "| 612 |" in text


def test_summary_survives_hostile_text(tmp_path: Path) -> None:
    record = {
        "step": 1,
        "update": 0,
        "prompt": "```` | \x1b[31m",
        "tokens": ["```", "\x1b]0;x\x07", "ok"],
        "reason": ["kept", "token_limit", "kept"],
    }
    atomic_write_text(tmp_path / "samples" / "step-000001.jsonl", json.dumps(record) + "\n")
    atomic_write_text(tmp_path / "config.yaml", "model: 'a|b'\nrule: [broken")
    text = write_summary(tmp_path)
    assert "\x1b" not in text and "`````text" in text and "[[\\x1b]0;x\\x07]]ok" in text


def train_row(update: int, held: float, responses: float) -> dict[str, object]:
    shares = {"trust/token_limit_fraction": held / 2, "trust/clamped_fraction": held / 2, "trust/masked_fraction": held}
    rest = {"trust/kept_fraction": 1 - held, "trust/held_responses_fraction": responses}
    return {"step": update, "update": update, "kind": "train", **shares, **rest}


@pytest.mark.parametrize(
    "held, words",
    [
        ((0.0, 0.2, 0.1), "held back 10.0% of the tokens; it acted in 2 of 3 updates and on 20.0% of the responses"),
        ((0.0, 0.0, 0.0), "**The rule never acted: none of 3 updates"),
        ((0.0, 0.0, 3e-6), "**The rule held back 1e-06 of the tokens; it acted in 1 of 3 updates"),
    ],
)
def test_whether_the_rule_bound_is_one_sentence(tmp_path: Path, held: tuple[float, ...], words: str) -> None:
    for update, share in enumerate(held):
        RunFolder(tmp_path).append_metrics(train_row(update, share, 2 * share))
    assert words in write_summary(tmp_path)
    atomic_write_text(tmp_path / "config.yaml", "rule: {name: none}\n")
    assert "The rule" not in write_summary(tmp_path)


def test_the_time_of_the_rollout_is_what_was_measured(tmp_path: Path) -> None:
    rows = [(1, 1, 5.0, 3.0), (1, 2, 2.0, None), (2, 3, 9.0, 6.0), (2, 4, 1.0, None)]
    for step, update, seconds, rollout in rows:
        row = {"step": step, "update": update, "kind": "train", "time/step_time": seconds}
        RunFolder(tmp_path).append_metrics(row | ({} if rollout is None else {"time/rollout_time": rollout}))
    text = write_summary(tmp_path)
    assert "| rollout | 9 s | 53% |" in text and "| updates | 8 s | 47% |" in text
