"""The stability frontier: what counts as learning, diverged and missing, against a slow reading of the definitions."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from cppo.cli.ablate import ablate
from cppo.study.ablate import answers as ablate_report
from cppo.study.ablate.frontier import diverged, outcome, read_frontier
from cppo.study.ablate.suite import Entry, Suite
from cppo.study.ablate.tables import frontier as tables
from cppo.study.results import RunRecord
from cppo.training.callbacks import NonFiniteError, NonFiniteGuard
from said import said

from .ablated import fail, study, write_run

NAN = "10 updates in a row had a NaN or infinite gradient (the last: update 30); each was skipped"


def record(label, seed, final=None, before=0.2, collapsed=None, error=None, problems=None):
    state = "finished" if final is not None else "failed" if error else "not started"
    return RunRecord(
        f"{label}-seed{seed}",
        label,
        seed,
        state,
        error=error,
        before={"a": before, "mean": before},
        final={} if final is None else {"a": final, "mean": final},
        final_problems={} if problems is None else {"a": problems},
        collapsed_at=collapsed,
    )


def suite_of(rules, rates, updates):
    return Suite(
        "frontier",
        "?",
        tuple(
            Entry(f"{rule} {rate} {m}", (), {"rule": rule, "learning_rate": rate, "updates": m})
            for rule, rate, m in itertools.product(rules, rates, updates)
        ),
    )


def test_the_message_of_the_real_guard_is_known():
    """A run that `NonFiniteGuard` stops, and one that torch cannot sample from, have diverged; others have failed."""
    guard = NonFiniteGuard(SimpleNamespace(latest=lambda: None), limit=1)
    model = torch.nn.Linear(2, 1)
    (model(torch.ones(1, 2)) * float("nan")).sum().backward()
    with pytest.raises(NonFiniteError) as stopped:
        guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=4), None, model=model)
    with pytest.raises(RuntimeError) as unsampled:
        torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)
    for error in (str(stopped.value), f"RuntimeError: {unsampled.value}"):
        assert diverged(record("x", 0, error=error)) and ablate_report.is_result(error)
        assert outcome(record("x", 0, error=error)) == 0.0
    assert not diverged(record("x", 0, error="the disk is full")) and outcome(record("x", 0, error="full")) is None
    assert not diverged(record("x", 0, final=0.3, error=NAN)), "tried again and finished"


def test_against_the_definitions():
    """Random studies: every figure from the definitions in the docstring, cell by cell and seed by seed."""
    rng = random.Random(3)
    rules, rates, updates, seeds = ("dppo", "cppo"), (1e-4, 2e-4, 4e-4), (2, 8), range(3)
    met = set()
    for _ in range(30):
        suite = suite_of(rules, rates, updates)
        records = []
        for entry, seed in itertools.product(suite.entries, seeds):
            kind = rng.choices(["fine", "collapsed", "nan", "disk", "absent"], [10, 3, 2, 0.3, 0.3])[0]
            final = rng.choice([0.1, 0.2, 0.3, 0.5]) if kind in ("fine", "collapsed") else None
            error = {"nan": NAN, "disk": "the disk is full"}.get(kind)
            records.append(record(entry.label, seed, final, collapsed=7 if kind == "collapsed" else None, error=error))
        found = read_frontier(suite, records)
        table = {(r.variant, r.seed): r for r in records}
        for each in found.maps:
            for m in updates:
                learning, unknown = [], []
                for rate in rates:
                    runs = [table[f"{each.rule} {rate} {m}", seed] for seed in seeds]
                    values = [0.0 if r.error == NAN else r.final.get("mean") for r in runs]
                    bad = sum(r.error == NAN or r.collapsed_at is not None for r in runs)
                    missing = values.count(None)
                    gain = sum(v - 0.2 for v in values if v is not None)
                    learns = None if missing else gain > 1e-12 and bad <= 1
                    (cell,) = [c for c in each.cells if (c.learning_rate, c.updates) == (rate, m)]
                    # a gain of exactly 0 is a matter of rounding
                    if missing or abs(gain) > 1e-9:
                        assert cell.learns is learns
                    assert (cell.missing, cell.collapsed) == (missing, bad)
                    learning += [rate] if cell.learns else []
                    unknown += [rate] if cell.learns is None else []
                    met.add(cell.learns)
                top = max(learning, default=None)
                assert each.largest[m] == top
                assert (m in each.open) == (top == rates[-1] or any(rate > (top or 0) for rate in unknown))
            means = {}
            for seed in seeds:
                runs = [table[entry.label, seed] for entry in suite.where(rule=each.rule)]
                if all(r.final or r.error == NAN for r in runs):
                    means[seed] = sum(r.final.get("mean", 0.0) for r in runs) / 6
            assert each.by_seed == pytest.approx(means)
            assert each.mean.count == len(means)
            if means:
                assert each.mean.value == pytest.approx(sum(means.values()) / len(means))
        dppo, cppo = found.maps
        both = dppo.by_seed.keys() & cppo.by_seed.keys()
        assert found.reference == "cppo" and cppo.difference is None
        if both:
            expected = sum(cppo.by_seed[s] - dppo.by_seed[s] for s in both) / len(both)
            assert dppo.difference.value == pytest.approx(expected)
        states = [f"{r.name}: {r.state}" for r in records if not r.final and r.error != NAN]
        assert sorted(found.missing) == sorted(states)
    assert met == {True, False, None}


def test_problems_are_resampled_where_there_are_any():
    """Two seeds that agree, on problems that do not: the interval is over the problems; diverged runs are 0 on each."""
    suite = suite_of(["cppo"], (1e-4, 2e-4), (2,))
    scores = [0.0, 0.2, 0.9, 0.9]
    runs = [record(suite.entries[0].label, seed, 0.5, problems=scores) for seed in (0, 1)]
    gone = [record(suite.entries[1].label, seed, error=NAN) for seed in (0, 1)]
    (found,) = read_frontier(suite, runs + gone).maps
    assert found.mean.value == pytest.approx(0.25) and found.mean.low < 0.2 < 0.3 < found.mean.high
    without = [record(suite.entries[0].label, seed, 0.5) for seed in (0, 1)]
    (found,) = read_frontier(suite, without + gone).maps
    assert (found.mean.value, found.mean.low, found.mean.high) == (0.25, 0.25, 0.25)


def test_the_tables_say_what_is_open_and_what_failed():
    suite = suite_of(["dppo", "cppo"], (1e-4, 2e-4), (2, 8))
    finals = {"dppo 0.0001 2": 0.5, "dppo 0.0002 2": 0.1, "dppo 0.0001 8": 0.1, "dppo 0.0002 8": 0.1}
    finals |= {"cppo 0.0001 2": 0.4, "cppo 0.0002 2": 0.6, "cppo 0.0001 8": None, "cppo 0.0002 8": NAN}
    records = [
        record(label, 0, error=value) if value == NAN else record(label, 0, value) for label, value in finals.items()
    ]
    largest, means, dppo, cppo = tables(read_frontier(suite, records))
    assert largest.rows == (("dppo", "0.0001", "none"), ("cppo", ">= 0.0002", "?"))
    assert means.rows[0] == ("dppo", "20.0", "-", "1 of 4", "1") and means.rows[1][-1] == "0"
    assert dppo.rows == (("0.0001", "50.0 +", "10.0"), ("0.0002", "10.0", "10.0"))
    assert cppo.rows == (("0.0001", "40.0 +", "- ?"), ("0.0002", "60.0 +", "0.0 x!"))


def test_a_study_with_a_diverged_run(tmp_path):
    """From run folders to files; a run that diverged is a result, and does not make the command fail."""
    options = {"rules": ("grpo", "cppo"), "learning_rates": (1e-4, 2e-4), "updates": (1, 2)}
    plan = study(tmp_path / "s", "frontier", seeds=2, **options)
    assert len(plan.trained) == 2 * (2 + 2 * 2)  # with one update the rules are one run
    gone = {f"grpo-lr-0.0002-M-2-seed{seed}": NAN for seed in (0, 1)}
    for run in plan.trained:
        if run.name not in gone:
            write_run(plan, run, 0.4 + 0.1 * run.seed)
    fail(plan, gone)
    text = " ".join(said(ablate, show=plan.folder, width=160).split())
    assert "grpo │ 0.0002 │ 0.0001" in text.replace(">= ", "") and "A run that diverged" in text
    (report,) = ablate_report.write_all(plan)
    grpo, cppo = report.data["maps"]
    assert grpo["by_seed"] == pytest.approx({0: 0.3, 1: 0.375}) and cppo["by_seed"] == pytest.approx({0: 0.4, 1: 0.5})
    assert grpo["difference"]["value"] == pytest.approx(0.1125)
    for name in ("frontier.png", "frontier.svg"):
        assert (plan.folder / "frontier" / "plots" / name).stat().st_size > 5000
    svg = (plan.folder / "frontier" / "plots" / "frontier.svg").read_bytes()
    ablate_report.write_all(plan)
    assert (plan.folder / "frontier" / "plots" / "frontier.svg").read_bytes() == svg
