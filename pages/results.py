"""The study of seven rules x five seeds x two tasks: raw results, and tables and figures for docs/results.md.

    cppo compare pages/study/chain-24.yaml --jobs 2 --out studies/chain-24    # half an hour each on two cores
    cppo compare pages/study/automaton-8x12.yaml --jobs 2 --out studies/automaton-8x12
    python -m pages.results --collect studies/chain-24 studies/automaton-8x12
    python -m pages.results --docs docs

`--collect` writes pages/study/study_<name>.json: every run's figures, reward curve and score of each held-out
problem, its rule with all parameters, and the versions; of an ablation, those of its stability frontier. `--docs`
computes everything else from these files alone: the statistics are the same as those of `cppo compare --show` and
`cppo ablate --show` on the folders. The other studies of the page are in its text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cppo import files
from cppo.config import yaml_io
from cppo.runs.folder import RunFolder
from cppo.runs.positions import rounded
from cppo.show.tables import Cells
from cppo.study import tables
from cppo.study.ablate import figures as ablate_figures
from cppo.study.ablate import tables as ablate_tables
from cppo.study.ablate.frontier import Frontier, diverged, read_frontier
from cppo.study.ablate.suite import KIND as ABLATION
from cppo.study.ablate.suite import Entry, Suite, suites_of, view
from cppo.study.results import MEAN, Results, RunRecord, read_results, summarise
from cppo.study.statistics import Estimate, probability_of_improvement
from cppo.study.store import load_plan
from pages.scoring import fill

RESULTS = Path(__file__).parent / "study"
NAMES = ("chain-24", "automaton-8x12", "automaton-8x24", "chain-24-moe")
FRONTIER = "chain-24-frontier"
#: The rule that the second table measures the others against.
SUBJECT = "cppo"
#: Column -> metric of an update.
UPDATE = {"masked": "trust/masked_fraction", "gradient norm": "grad_norm", "mean divergence": "trust/divergence_mean"}


# -- raw results -----------------------------------------------------------------------------------------------------


def collect(folder: Path) -> Path:
    """Write the raw results of a study's folder; no path of the machine is in them."""
    plan = load_plan(folder)
    suite = None
    if plan.kind == ABLATION:
        (suite,) = (suite for suite in suites_of(plan) if suite.name == "frontier")
    results = read_results(plan if suite is None else view(plan, suite))
    if left := sum(record.state != "finished" and not diverged(record) for record in results.records):
        raise SystemExit(
            f"{folder}: {left} of {len(results.records)} runs are not finished: cppo {plan.kind} --resume {folder}"
        )
    study = yaml_io.read(folder / "study.yaml")
    about = {
        "study": folder.name,
        "versions": {key: value for key, value in study["versions"].items() if key != "threads"},
        "threads": plan.threads,
        "rules": {variant.name: variant.rule for variant in results.variants},
    }
    if suite is not None:
        about["entries"] = [{"label": entry.label, "at": dict(entry.at)} for entry in suite.entries]
    runs = [_shorter(record) for record in results.as_json()["records"]]
    path = RESULTS / f"study_{folder.name}.json"
    lines = ",\n".join("    " + json.dumps(run) for run in runs)
    head = json.dumps(about, indent=2).removesuffix("\n}")
    files.atomic_write_text(path, f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n')
    return path


def collect_updates(run: Path) -> Path:
    """Write what the rule saw at each update of a run's first two rollout batches to study_updates.json, by run."""
    rows = [row for row in RunFolder(run).metrics("train") if row["step"] <= 2]
    path = RESULTS / "study_updates.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    study = run.resolve().parents[1].name
    found[f"{study}/{run.name}"] = [{key: row[key] for key in ("step", "update", *UPDATE.values())} for row in rows]
    files.atomic_write_json(path, found)
    return path


def updates_table() -> str:
    """Some updates of these runs: share of tokens held back, gradient norm, mean divergence before the update."""
    runs = json.loads((RESULTS / "study_updates.json").read_text(encoding="utf-8"))
    rows = [
        (name, str(row["update"]), *(f"{row[key]:.2g}" for key in UPDATE.values()))
        for name, found in runs.items()
        for row in found
        if row["update"] in (2, 3, 6, 10, 16, 17, 18)
    ]
    return Cells("", ("run", "update", *UPDATE), rows).markdown()


def _shorter(value: Any) -> Any:
    """Numbers to six digits, as in the files they come from."""
    if isinstance(value, dict):
        return {key: _shorter(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shorter(inner) for inner in value]
    return rounded(value) if isinstance(value, float) else value


def _raw(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"study_{name}.json").read_text(encoding="utf-8"))
    return found


def load(name: str, baseline: str | None = None) -> Results:
    """The results of a committed study, with its statistics."""
    raw = _raw(name)
    results = summarise("compare", list(raw["rules"]), [RunRecord(**run) for run in raw["runs"]], baseline)
    for variant in results.variants:
        variant.rule = raw["rules"][variant.name]
    return results


def load_frontier(name: str = FRONTIER) -> Frontier:
    """A committed stability frontier."""
    raw = _raw(name)
    entries = tuple(Entry(entry["label"], (), entry["at"]) for entry in raw["entries"])
    return read_frontier(Suite("frontier", "", entries), [RunRecord(**run) for run in raw["runs"]])


# -- tables ----------------------------------------------------------------------------------------------------------


def all_tables() -> dict[str, str]:
    """Marker of docs/results.md -> table."""
    found = {marker: table for name in NAMES for marker, table in study_tables(name).items()}
    found["rules"] = "\n".join(f"- {variant.name}: `{variant.rule}`" for variant in load(NAMES[0]).variants)
    found["updates"] = updates_table()
    found[FRONTIER] = "\n\n".join(
        f"{cells.title}:\n\n{cells.markdown()}" for cells in ablate_tables.frontier(load_frontier())
    )
    return found


def study_tables(name: str) -> dict[str, str]:
    """The same, of one study."""
    results = load(name, SUBJECT)
    found = {f"{name}-scores": tables.cells(load(name))[0].markdown()}
    columns = ("", "best", "final", f"P({SUBJECT} better), final", "collapsed", "masked")
    rows = []
    for variant in results.variants:
        masked = "-" if variant.masked_fraction is None else f"{variant.masked_fraction:.1%}"
        end = (f"{len(variant.collapsed)} of {len(variant.seeds)}", masked)
        if variant.name == SUBJECT:
            rows.append((variant.name, "-", "-", "-", *end))
        else:
            better = _better(results, SUBJECT, variant.name)
            rows.append((variant.name, _less(variant.difference), _less(variant.final_difference), better, *end))
    found[f"{name}-differences"] = Cells("", columns, tuple(rows)).markdown()
    found[f"{name}-seeds"] = _by_seed(results)
    return found


def _by_seed(results: Results) -> str:
    """Final Avg@k in % of every run, and where each seed started."""
    seeds = sorted({record.seed for record in results.records})
    start = {record.seed: record.before[MEAN] for record in results.records}
    final = {(record.variant, record.seed): record.final[MEAN] for record in results.records}
    rows = [("before training", *(f"{100 * start[seed]:.1f}" for seed in seeds))]
    rows += [(v.name, *(f"{100 * final[v.name, seed]:.1f}" for seed in seeds)) for v in results.variants]
    return Cells("", ("", *(f"seed {seed}" for seed in seeds)), tuple(rows)).markdown()


def _less(estimate: Estimate | None) -> str:
    """The subject's lead in percentage points: the difference is the other way round in `Results`."""
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{-100 * estimate.value:+.1f}"
    return f"{-100 * estimate.value:+.1f} [{-100 * estimate.high:+.1f}, {-100 * estimate.low:+.1f}]"


def _better(results: Results, one: str, other: str) -> str:
    scores = {
        name: {r.seed: list(r.final_problems.values()) for r in results.records if r.variant == name and r.final}
        for name in (one, other)
    }
    found = probability_of_improvement(scores[one], scores[other])
    return tables.share(found)


# -- figure ----------------------------------------------------------------------------------------------------------


def draw(path: Path) -> None:
    """Final Avg@k of every run, and its mean with the interval, a panel a study."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(7, 4))
    for axes, name in zip(panels.flat, NAMES, strict=True):
        results = load(name)
        for row, variant in enumerate(reversed(results.variants)):
            runs = [100 * r.final[MEAN] for r in results.records if r.variant == variant.name and r.final]
            colour = "#0072B2" if variant.name == SUBJECT else "#555555"
            axes.plot(runs, [row + 0.22] * len(runs), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
            mean = variant.final.get(MEAN)
            if mean is not None and mean.value is not None and mean.low is not None and mean.high is not None:
                axes.plot([100 * mean.low, 100 * mean.high], [row, row], color=colour, linewidth=2)
                axes.plot([100 * mean.value], [row], "D", color=colour, markersize=5)
        start = [100 * r.before[MEAN] for r in results.records if r.before]
        axes.axvline(sum(start) / len(start), color="#D55E00", linestyle=":", linewidth=1.2)
        axes.set_yticks(range(len(results.variants)), [variant.name for variant in reversed(results.variants)])
        axes.set(title=name, xlabel=f"final Avg@{results.samples} in %", xlim=(-2, 102))
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", help="folders of the studies", default=[])
    parser.add_argument("--updates", type=Path, nargs="+", help="folders of runs, for the table of updates", default=[])
    parser.add_argument("--docs", type=Path, help="write the tables of results.md and its figure in this folder")
    options = parser.parse_args()
    for folder in options.collect:
        print(f"Written: {collect(folder)}")
    for folder in options.updates:
        print(f"Written: {collect_updates(folder)}")
    if options.docs:
        page = options.docs / "results.md"
        if missing := [
            path
            for path in (page, *(RESULTS / f"study_{name}.json" for name in (*NAMES, FRONTIER)))
            if not path.is_file()
        ]:
            raise SystemExit(
                f"{missing[0]} is not there: the raw results come from --collect, the page's text is written."
            )
        for marker, table in all_tables().items():
            fill(page, marker, table)
        draw(options.docs / "images" / "results.png")
        ablate_figures.frontier(load_frontier()).savefig(options.docs / "images" / "frontier.png", dpi=120)


if __name__ == "__main__":
    main()
