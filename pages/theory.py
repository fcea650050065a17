"""The figures and tables of docs/theory.md: how far the bounds are from the exact residual, and what schedules cost.

    python -m pages.theory [--docs docs] [--problems 400]

Small tabular problems (vocabulary 2 to 4, 2 to 6 tokens, half of them with an end-of-sequence token, divergences from
tiny to near 1) are solved exactly, each with its own random rewards and with the rewards in [-1, 1] for which its
residual is largest. The constraints of Theorem 1 are taken as tight as the problem's rollouts allow (linear schedule,
w_min = 0.8). Everything is seeded and exact, without a network; a run takes seconds. `--docs` writes the figures to
its images/ and the tables into its theory.md, between their markers; otherwise they are only printed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cppo import theory
from cppo.theory.tightest import prefix_budgets, spend
from pages.scoring import fill

#: The paper's settings for base models, and the range of a reward of 0 or 1.
T, DELTA, DELTA_B, W_MIN, XI = 8192, 0.15, 0.02, 0.8, 0.5
KL_MAX, KL_AVG = 0.05, 0.001
#: From the loosest to the tightest: name, colour, marker.
BOUNDS = (
    ("Theorem 1", "#D55E00", "s"),
    ("tightest (LP)", "#E69F00", "D"),
    ("Prop. 4", "#0072B2", "^"),
    ("product form", "#009E73", "v"),
    ("pathwise", "#CC79A7", "o"),
    ("ratios alone", "#000000", "x"),
)
#: Of the schedules' figure, in its order.
STYLES = {
    "constant": ("#000000", ":"),
    "linear": ("#0072B2", "-"),
    "cosine": ("#E69F00", "-."),
    "matched": ("#009E73", "--"),
    "reversed": ("#CC79A7", (0, (5, 1, 1, 1, 1, 1))),
}


# -- bounds against exact residuals ------------------------------------------------------------------------------------


class Solved(NamedTuple):
    """One problem: its horizon, |Delta| for random and for the worst rewards, and its bounds (with xi = 1)."""

    horizon: int
    residual: float
    worst: float
    bounds: dict[str, float]


def solve(problem: theory.TabularProblem) -> Solved:
    """The exact residual beside every bound of it."""
    rho, later, T = problem.path_ratio, problem.later_ratio, problem.horizon
    # Delta = sum_y R(y) c(y): the worst rewards are the signs of c
    c = problem.rollout_probability * ((rho - 1) * (1 - later)).sum(1)
    u, l = problem.expected_divergence, problem.largest_divergence  # noqa: E741
    w = theory.make_schedule("linear", T, W_MIN)
    found = problem.constraints(w)
    L = min(found.delta / W_MIN, 1.0)
    bounds = {
        "Theorem 1": theory.theorem_1(T, found.delta_b, L, weights=w),
        "tightest (LP)": theory.tightest_residual(w, found.delta, found.delta_b).bound,
        "Prop. 4": theory.residual_bound(u, l),
        "product form": theory.residual_bound(u, l, form="product"),
        "pathwise": problem.pathwise_bound,
        "ratios alone": problem.ratio_bound,
    }
    return Solved(T, abs(problem.residual), float(np.abs(c).sum()), bounds)


def solved_problems(count: int) -> list[Solved]:
    rng = np.random.default_rng(0)
    drawn = []
    for index in range(count):
        vocabulary, horizon = int(rng.integers(2, 5)), int(rng.integers(2, 7))
        scale = 10 ** rng.uniform(-2, 0.5)
        drawn.append(solve(theory.TabularProblem.random(rng, vocabulary, horizon, scale=scale, eos=index % 2 == 0)))
    return drawn


def gaps(solved: list[Solved], name: str, worst: bool) -> Any:
    """bound / |Delta| of each problem."""
    return np.array([one.bounds[name] / (one.worst if worst else one.residual) for one in solved])


def draw_bounds(solved: list[Solved], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 0.95))
    for axes, worst in zip(panels[:2], (False, True), strict=True):
        for name, colour, marker in BOUNDS[:-1]:
            x = [one.worst if worst else one.residual for one in solved]
            y = [one.bounds[name] for one in solved]
            behind = name in ("Theorem 1", "Prop. 4")  # the next one nearly coincides with it
            axes.scatter(x, y, s=24 if behind else 7, color=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
        axes.plot([1e-6, 10], [1e-6, 10], color="black", linewidth=1, label="bound = |Delta|")
        axes.set(xscale="log", yscale="log", xlabel="exact |Delta|", xlim=(3e-6, 5), ylim=(3e-6, 100))
        axes.set_title("rewards that make |Delta| largest" if worst else "random rewards")
    panels[0].set_ylabel(f"bound, {len(solved)} random problems")
    panels[0].legend(fontsize=9, loc="lower right", handletextpad=0.3)
    right = panels[2]
    for row, (name, colour, marker) in enumerate(reversed(BOUNDS)):
        for shift, worst in ((0.17, True), (-0.2, False)):
            low, median, high = np.quantile(gaps(solved, name, worst), (0.1, 0.5, 0.9))
            face = colour if worst or marker == "x" else "white"
            right.plot([low, high], [row + shift] * 2, color=colour, linewidth=2, alpha=1.0 if worst else 0.5)
            right.plot(median, row + shift, marker=marker, markersize=7, color=colour, markerfacecolor=face)
            right.annotate(
                f"{median:.3g}", (median, row + shift), (0, 6), textcoords="offset points", ha="center", fontsize=9
            )
    right.axvline(1, color="black", linewidth=1)
    right.set(xscale="log", xlabel="bound / |Delta|: median, 10% to 90%", ylim=(-1.4, len(BOUNDS) - 0.3))
    right.set_yticks(range(len(BOUNDS)), [name for name, *_ in reversed(BOUNDS)])
    for face, label in (("black", "largest |Delta|"), ("white", "random rewards")):
        right.plot([], [], "o", color="black", markerfacecolor=face, label=label)
    right.legend(fontsize=9, loc="lower right", ncols=2, handletextpad=0.1, columnspacing=1)
    right.set_title("how loose each bound is")
    for axes in panels:
        axes.grid(alpha=0.3)
    save(figure, path)


# -- schedules ---------------------------------------------------------------------------------------------------------


def roomiest(w: Any, rule: bool = False) -> Any:
    """u with the largest sum that the constraints allow, of these the one that comes latest."""
    return (
        spend(np.linspace(1, 1 + 1e-6, w.size), w, np.minimum(DELTA, w), prefix_budgets(w, DELTA, DELTA_B, rule=rule))
        / w
    )


class Cost(NamedTuple):
    """A w_min of the linear schedule: bounds over those of the constant one, and the room it gives. late : Prop. 4 of
    the u that uses all of the room and as late as possible, over the tightest bound of the constant schedule.
    """

    w_min: float
    theorem: float
    tightest: float
    product: float
    room: float
    late: float


def costs_of_w_min(w_mins: list[float]) -> list[Cost]:
    one = theory.schedule_cost("constant", np.ones(T), DELTA, DELTA_B)
    found = []
    for w_min in w_mins:
        w = theory.make_schedule("linear", T, w_min)
        cost = theory.schedule_cost("linear", w, DELTA, DELTA_B)
        late = theory.residual_bound(roomiest(w), theory.tightest_residual(w, DELTA, DELTA_B).largest)
        assert cost.theorem is not None and one.theorem is not None
        ratios = cost.theorem / one.theorem, cost.tightest / one.tightest
        found.append(
            Cost(
                w_min, *ratios, cost.tightest_product / one.tightest_product, cost.room / one.room, late / one.tightest
            )
        )
    return found


def draw_schedules(costs: list[Cost], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    t = np.arange(1, T + 1)
    for name, (colour, dashes) in STYLES.items():
        w = theory.make_schedule(name, T, W_MIN)
        left.plot(t, w, color=colour, linestyle=dashes, linewidth=2, label=name)
        middle.plot(t, DELTA / w, color=colour, linestyle=dashes, linewidth=2)
    left.set(xlabel="position t", title=f"weight w_t (w_min = {W_MIN:g})")
    middle.set(xlabel="position t", title=f"largest D_t of a token, {DELTA:g} / w_t")
    figure.legend(*left.get_legend_handles_labels(), fontsize=9, loc="outside lower left", ncols=5)
    x = [cost.w_min for cost in costs]
    for label, key, colour, dashes in (
        ("Cor. 7: 1 / w_min", "theorem", "#D55E00", "--"),
        ("tightest (LP)", "tightest", "#0072B2", "-"),
        ("tightest, product form", "product", "#009E73", "-."),
        ("room: sum of D_t", "room", "#000000", ":"),
    ):
        right.plot(x, [getattr(cost, key) for cost in costs], color=colour, linestyle=dashes, linewidth=2, label=label)
    right.axvline(W_MIN, color="black", linewidth=0.8, alpha=0.5)
    right.set(xlabel="w_min", ylim=(0.9, 3.4), title="linear schedule / constant schedule")
    right.legend(fontsize=9)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, metadata={"Software": None})  # without matplotlib's version: the same bytes


# -- tables ------------------------------------------------------------------------------------------------------------


def largest_horizon(bound: Callable[[int], float], limit: Callable[[int], float]) -> int:
    """The largest T at which bound(T) is below limit(T), and at every T before it."""
    horizon = 1
    while bound(horizon + 1) < limit(horizon + 1):
        horizon += 1
        if horizon >= 100_000:
            raise RuntimeError("the bound never reaches its limit")
    return horizon


def most(horizon: int, w_min: float, rule: bool = False) -> float:
    """The largest sum_t u_t that the constraints allow."""
    return float(roomiest(theory.make_schedule("linear", horizon, w_min), rule).sum())


class Row(NamedTuple):
    """A bound as a function of T; `moved`: the largest sum of u_t under the same constraints."""

    what: str
    call: str
    bound: Callable[[int], float]
    moved: Callable[[int], float]


def rows() -> list[Row]:
    def lp(w_min: float, **options: Any) -> Callable[[int], float]:
        return lambda n: (
            theory.tightest_residual(theory.make_schedule("linear", n, w_min), DELTA, DELTA_B, xi=XI, **options).bound
        )

    def cppo(w_min: float, rule: bool = False) -> Callable[[int], float]:
        return lambda n: most(n, w_min, rule)

    own = lambda n: theory.own_lengths(n, DELTA, DELTA_B, W_MIN, xi=XI, slack=DELTA)  # noqa: E731
    return [
        Row("DPPO", "uniform", lambda n: theory.uniform(n, DELTA, xi=XI), lambda n: DELTA * n),
        Row(
            "DPPO, product form",
            'uniform(form="product")',
            lambda n: theory.uniform(n, DELTA, xi=XI, form="product"),
            lambda n: DELTA * n,
        ),
        Row("TRM-Max", "trm_max", lambda n: theory.trm_max(n, KL_MAX, xi=XI), lambda n: n * math.sqrt(KL_MAX / 2)),
        Row("TRM-Avg", "trm_avg", lambda n: theory.trm_avg(n, KL_AVG, xi=XI), lambda n: n * math.sqrt(KL_AVG / 2)),
        Row(
            "CPPO, w = 1: Theorem 1, Cor. 6",
            "corollary_6",
            lambda n: theory.corollary_6(n, DELTA, DELTA_B, xi=XI),
            cppo(1),
        ),
        Row("- tightest", "tightest_residual", lp(1), cppo(1)),
        Row("- tightest, product form", 'tightest_residual(form="product")', lp(1, form="product"), cppo(1)),
        Row(
            f"CPPO, w_min = {W_MIN:g}: Theorem 1, Cor. 7",
            "corollary_7",
            lambda n: theory.corollary_7(n, DELTA, DELTA_B, W_MIN, xi=XI),
            cppo(W_MIN),
        ),
        Row("- tightest", "tightest_residual", lp(W_MIN), cppo(W_MIN)),
        Row("- tightest, product form", 'tightest_residual(form="product")', lp(W_MIN, form="product"), cppo(W_MIN)),
        Row(
            "- rule (8), Prop. 8",
            "implemented_rule",
            lambda n: theory.implemented_rule(n, DELTA, DELTA_B, W_MIN, xi=XI),
            cppo(W_MIN, True),
        ),
        Row("- rule (8), tightest", "tightest_residual(rule=True)", lp(W_MIN, rule=True), cppo(W_MIN, True)),
        Row(
            "- rule (8), tightest, product form",
            'tightest_residual(rule=True, form="product")',
            lp(W_MIN, rule=True, form="product"),
            cppo(W_MIN, True),
        ),
        Row("- rule (8), own lengths, mu may have to end", "own_lengths(slack=delta)", own, cppo(W_MIN, True)),
    ]


def constants_table() -> str:
    """Every constant at T = 8192, over the uniform rule's, and how long a response may be for it to say something."""
    reference = theory.uniform(T, DELTA, xi=XI)
    lines = [
        f"| rule and statement | `cppo.theory` | bound at T = {T} | / DPPO's | without a theorem | below 1 up to T = | "
        'below "without a theorem" up to T = |',
        "|---|---|---|---|---|---|---|",
    ]
    for what, call, bound, moved in rows():
        trivial = lambda n, moved=moved: 2 * XI * (1 + moved(n))  # noqa: E731
        value = bound(T)
        lines.append(
            f"| {what} | `{call}` | {number(value)} | {value / reference:.2g} | {number(trivial(T))} | "
            f"{largest_horizon(bound, lambda n: 2 * XI)} | {largest_horizon(bound, trivial)} |"
        )
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:,.1f}"


def schedules_table() -> str:
    lines = [
        "| schedule | Theorem 1 | tightest | rule (8), tightest | tightest, product form | "
        "limit of D_t: first, last token | room |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in theory.compare_schedules(T, DELTA, DELTA_B, w_min=W_MIN, xi=XI):
        theorem = "no: not monotone" if cost.theorem is None else number(cost.theorem)
        lines.append(
            f"| `{cost.name}` | {theorem} | {number(cost.tightest)} | {number(cost.tightest_rule)} | "
            f"{number(cost.tightest_product)} | {cost.first:.4g}, {cost.last:.4g} | {cost.room:.3f} |"
        )
    return "\n".join(lines)


def w_min_table() -> str:
    lines = [
        "| w_min of `linear` | Cor. 7 | tightest | 2 (ln(1 / w_min) - (1 - w_min)) / (1 - w_min)^2 | "
        "tightest, product form | room | the room, spent late, in Prop. 4 | limit of the last token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs_of_w_min([1.0, 0.9, 0.8, 0.6, 0.4]):
        w = cost.w_min
        closed = 2 * (math.log(1 / w) - (1 - w)) / (1 - w) ** 2 if w < 1 else 1.0  # its limit
        ratios = " | ".join(
            f"{x:.3f}" for x in (cost.theorem, cost.tightest, closed, cost.product, cost.room, cost.late)
        )
        lines.append(f"| {w:g} | {ratios} | {DELTA / w:.4g} |")
    return "\n".join(lines)


def thresholds_table() -> str:
    """Thresholds at which each bound is the reward's range, at T = 8192."""
    w = theory.make_schedule("linear", T, W_MIN)
    one = np.ones(T)
    share = DELTA_B / DELTA

    def lp(weights: Any, delta: float, delta_b: float, form: Any = "sum") -> float:
        return theory.tightest_residual(weights, delta, delta_b, xi=XI, form=form).bound

    def pair(x: float) -> str:
        return f"delta = {x:.2e}, delta_b = {share * x:.2e}"

    same = f"delta_b / delta = {DELTA_B:g} / {DELTA:g}"
    cases: list[tuple[str, Callable[[float], float], Callable[[float], str]]] = [
        ("DPPO, sum", lambda x: theory.uniform(T, x, xi=XI), lambda x: f"delta = {x:.2e}"),
        ("DPPO, product form", lambda x: theory.uniform(T, x, xi=XI, form="product"), lambda x: f"delta = {x:.2e}"),
        (
            f"CPPO, Cor. 7, w_min = {W_MIN:g}, {same}",
            lambda x: theory.corollary_7(T, x, share * x, W_MIN, xi=XI),
            pair,
        ),
        (f"CPPO, tightest, w_min = {W_MIN:g}, {same}", lambda x: lp(w, x, share * x), pair),
        (f"CPPO, tightest, product form, w_min = {W_MIN:g}, {same}", lambda x: lp(w, x, share * x, "product"), pair),
        (
            f"CPPO, Cor. 7, w_min = {W_MIN:g}, delta = {DELTA:g}",
            lambda x: theory.corollary_7(T, DELTA, x, W_MIN, xi=XI),
            lambda x: f"delta_b = {x:.2e}",
        ),
        (
            f"CPPO, tightest, product form, w = 1, delta = {DELTA:g}",
            lambda x: lp(one, DELTA, x, "product"),
            lambda x: f"delta_b = {x:.2e}",
        ),
        ("TRM-Max", lambda x: theory.trm_max(T, x, xi=XI), lambda x: f"delta = {x:.2e} nats"),
        ("TRM-Avg", lambda x: theory.trm_avg(T, x, xi=XI), lambda x: f"delta = {x:.2e} nats"),
    ]
    lines = [f"| bound | is 1 at T = {T}, xi = {XI:g} where |", "|---|---|"]
    lines += [f"| {what} | {say(solve_for_1(bound))} |" for what, bound, say in cases]
    return "\n".join(lines)


def solve_for_1(bound: Callable[[float], float]) -> float:
    """x with bound(x) = 1, for an increasing function, by bisection of log x."""
    low, high = math.log(1e-12), math.log(0.5)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(math.exp(middle)) < 1 else (low, middle)
    return math.exp(low)


def tightness_table(solved: list[Solved]) -> str:
    horizons = (2, 4, 6)
    lines = [
        "| bound / exact abs(Delta): 10%, median, 90% | random rewards | the worst rewards | "
        + " | ".join(f"median at T = {n}" for n in horizons)
        + " |",
        "|---|---|---|" + "---|" * len(horizons),
    ]
    for name, *_ in BOUNDS:
        cells = []
        for worst in (False, True):
            cells.append(", ".join(f"{q:.3g}" for q in np.quantile(gaps(solved, name, worst), (0.1, 0.5, 0.9))))
        for n in horizons:
            cells.append(f"{np.median(gaps([one for one in solved if one.horizon == n], name, True)):.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exact_tables() -> dict[str, str]:
    """The tables that take no random problem."""
    return {
        "constants": constants_table(),
        "thresholds": thresholds_table(),
        "schedules": schedules_table(),
        "w_min": w_min_table(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="write figures and tables of theory.md in this folder")
    parser.add_argument("--problems", type=int, default=400)
    options = parser.parse_args()
    solved = solved_problems(options.problems)
    for one in solved:
        for name, bound in one.bounds.items():
            assert bound >= one.worst - 1e-12, f"{name} is below the exact residual"
    tables = {"tightness": tightness_table(solved), **exact_tables()}
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    if options.docs:
        draw_bounds(solved, options.docs / "images" / "theory_bounds.png")
        draw_schedules(
            costs_of_w_min(np.linspace(0.3, 1.0, 36).tolist()), options.docs / "images" / "theory_schedules.png"
        )
        for name, table in tables.items():
            fill(options.docs / "theory.md", name, table)


if __name__ == "__main__":
    main()
