"""Tables of docs/divergences.md on real vocabularies, from `benchmarks.llm.divergences`.

python -m pages.divergences [--docs docs/divergences.md] [--figure docs/images/divergences-llm.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cppo.show.tables import Cells
from pages.scoring import fill

RESULTS = Path("benchmarks/results")
#: The models, in the order of the page.
MODELS = ("smollm2-135m", "gemma3-270m")
#: The largest K of the ragged store that is shown, beside 20.
LARGEST = "100"
#: K in the long tables; the JSON has more.
SHOWN = ("1", "5", "20", "100")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def percent(value: float) -> str:
    """Three significant digits."""
    return f"{100 * value:.3g}%"


def title(name: str) -> str:
    """A divergence as the page writes it."""
    kind, _, k = name.partition(", K=")
    kind = "`topk_tv`, replace_last" if kind == "topk_tv_replace" else f"`{kind}`"
    return f"{kind}, K = {k}" if k else kind


def shown(name: str) -> bool:
    """Whether the long tables have a divergence."""
    kind, _, k = name.partition(", K=")
    return not kind.startswith("exact") and (not k or k in SHOWN)


def moved(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lags with updates between mu and pi."""
    return [lag for key, lag in result["lags"].items() if key != "0"]


def distances(result: dict[str, Any]) -> Cells:
    """How far pi has moved, and what the exact TV holds back."""
    columns = ("updates", "tokens", "mean", "median", "P90", "P99", "KL, mean, nats", "CPPO holds", "DPPO holds")
    rows = []
    for lag in result["lags"].values():
        tv, held = lag["exact_tv"], lag["held_by_exact_tv"]
        figures = [f"{tv[name]:.2g}" for name in ("mean", "median", "p90", "p99")]
        shares = [percent(held[name]) for name in ("cppo", "dppo")]
        rows.append((lag["label"], f"{lag['tokens']:,}", *figures, f"{lag['exact_kl']['mean']:.2g}", *shares))
    return Cells("The exact TV between mu and pi", columns, rows)


def tails(result: dict[str, Any]) -> Cells:
    """What mu has outside its top K."""
    outside = next(iter(result["lags"].values()))["outside"]
    rows = [
        (name, *(f"{row[key]:.2g}" for row in outside.values()))
        for name, key in (("mean", "mean"), ("median", "median"), ("P90", "p90"), ("P99", "p99"))
    ]
    return Cells("Mass of mu outside its top K", ("", *(f"K = {k}" for k in outside)), rows)


def nearness(result: dict[str, Any]) -> Cells:
    """How much of the exact divergence each shows."""
    lags = moved(result)
    columns = ["divergence"]
    for lag in lags:
        columns += [f"{lag['label']} updates: mean", "10%, median, 90%"]
    rows = []
    for kind in lags[0]["kinds"]:
        if not shown(kind):
            continue
        row = [title(kind)]
        for lag in lags:
            found = lag["kinds"][kind]
            over = found.get("over_exact", {})
            row += [f"{found['mean_over_exact']:.2f}", ", ".join(f"{value:.2f}" for value in over.values())]
        rows.append(row)
    return Cells("D / exact D of the same kind: of the means, and over tokens with TV > 1e-4", columns, rows)


def decisions(result: dict[str, Any]) -> Cells:
    """Which share of decisions is another than by the exact TV."""
    lags = moved(result)
    columns = ["divergence", *(f"{rule}, {lag['label']} updates" for lag in lags for rule in ("CPPO", "DPPO"))]
    rows = []
    for kind, found in lags[0]["kinds"].items():
        if "decides_otherwise" in found and shown(kind):
            shares = [percent(share) for lag in lags for share in lag["kinds"][kind]["decides_otherwise"].values()]
            rows.append((title(kind), *shares))
    for k in SHOWN:
        found = [lag["adaptive"][k] for lag in lags]
        cells = [(f"{percent(row['decides_otherwise'])} (resolves {percent(row['resolved'])})", "") for row in found]
        rows.append((f"`adaptive_tv`, K = {k}", *(cell for both in cells for cell in both)))
    return Cells("Decisions that differ from those by the exact TV, of all tokens", columns, rows)


def positions(result: dict[str, Any]) -> Cells:
    """The first lag by position in the response."""
    columns = (
        "positions",
        "tokens",
        "exact TV",
        "`binary_tv` / exact",
        "`topk_tv`, K = 20 / exact",
        "outside the top 20",
    )
    rows = []
    for row in moved(result)[0]["positions"]:
        if not row["tokens"]:
            continue
        exact = row["exact_tv"]
        shares = (f"{row['binary_tv'] / exact:.2f}", f"{row['topk_tv, K=20'] / exact:.3f}")
        at = f"{row['from']} to {row['to']}"
        rows.append((at, f"{row['tokens']:,}", f"{exact:.3g}", *shares, f"{row['outside, K=20']:.2g}"))
    return Cells(f"By position, {moved(result)[0]['label']} updates", columns, rows)


def parts(result: dict[str, Any]) -> Iterator[str]:
    """Title and table, one after the other."""
    ragged = result["ragged"]
    yield (
        f"**{result['about']}**, {result['vocabulary']:,} tokens; {result['task']}, {result['rule']}, "
        f"{result['updates']} updates to a rollout batch; mu of {len(result['steps'])} checkpoints, responses "
        f"of {result['mean_length']:.1f} tokens on average. Kept ragged (as many entries as cover 99.9% of mu, at most "
        f"20 or {LARGEST}), mu takes {ragged['20']:.0f} or {ragged[LARGEST]:.0f} bytes per token; a fixed K = 20 takes "
        "160, K = 100 takes 800."
    )
    for table in (distances, tails, nearness, decisions, positions):
        cells = table(result)
        yield f"{cells.title}:"
        yield cells.markdown()


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Per model: mass outside the top K, how much of the exact TV is seen, decisions that differ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for (tail, near, other), result in zip(
        figure.subplots(len(results), 3, squeeze=False), results.values(), strict=True
    ):
        lags = moved(result)
        ks = list(map(int, lags[0]["outside"]))
        for name, colour in zip(("p99", "p90", "mean", "median"), COLOURS, strict=True):
            masses = [row[name] for row in lags[0]["outside"].values()]
            tail.plot(ks, masses, marker="o", color=colour, label=name.upper() if name[0] == "p" else name)
        tail.set(yscale="log")
        tail.set_title(f"{result['about']}: mass of mu outside its top K", fontsize=10)
        for kind, colour in zip(("topk_tv", "topk_tv_upper", "topk_kl"), COLOURS, strict=False):
            means = [lags[0]["kinds"][f"{kind}, K={k}"]["mean_over_exact"] for k in ks]
            near.plot(ks, means, marker="o", color=colour, label=kind)
        near.axhline(lags[0]["kinds"]["binary_tv"]["mean_over_exact"], color="black", linestyle="--", label="binary_tv")
        near.axhline(1, color="black", linewidth=0.8, linestyle=":")
        near.set(yscale="log", title=f"mean D / mean exact D, {lags[0]['label']} updates")
        for lag, colour in zip(lags, COLOURS, strict=False):
            for kind, style in (("topk_tv", "-"), ("topk_tv_upper", "--")):
                shares = [100 * lag["kinds"][f"{kind}, K={k}"]["decides_otherwise"]["cppo"] for k in ks]
                other.plot(ks, shares, style, marker="o", color=colour, label=f"{kind}, {lag['label']} updates")
        other.set(title="CPPO's decisions that differ, % of tokens", ylim=(0, None))
        for axes in (tail, near, other):
            axes.set(xscale="log", xlabel="K")
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="write the tables into this page, between its markers")
    parser.add_argument("--figure", type=Path, help="draw them into this PNG")
    options = parser.parse_args()
    read = {name: (RESULTS / f"divergences_{name}.json").read_text(encoding="utf-8") for name in MODELS}
    results = {name: json.loads(text) for name, text in read.items()}
    for name, result in results.items():
        text = "\n\n".join(parts(result))
        print(text)
        if options.docs:
            fill(options.docs, name, text)
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
