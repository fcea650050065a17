"""Speed and memory of the theory: exact enumeration, bounds of long responses, the linear program, the certificate.

    python -m benchmarks.theory [--json PATH] [--repeats 5] [--quick]

Claims: every exact quantity of a problem with 4 tokens and 6 positions takes less than a second, and at most a tenth of
loops over its responses; all bounds and schedules at T = 1,000,000 take less than a second, with memory proportional to
T; the tightest bound at T = 4096 takes less than 5 s, and less than a general solver (HiGHS).

How: repeats are interleaved, each figure is the median. HiGHS is given the program in its sparsest form, the sums S_t
for variables and 0 <= S_t - S_{t-1} <= limit for rows; a row a prefix would hold T^2 / 2 numbers. Memory is the peak of
what Python and numpy allocate (tracemalloc), in a run of its own. --quick: small sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.sparse
from scipy.optimize import linprog

from benchmarks.core import graded, interleaved, write_json
from cppo import theory
from cppo.theory import TabularProblem, make_schedule, tightest_residual

DELTA, DELTA_B, XI = 0.15, 0.02, 0.5
#: name -> (schedule, w_min): the first has a closed form, the second is not monotone and takes the greedy choice.
PROGRAMS = {"linear 0.8, closed form": ("linear", 0.8), "cosine 0.05, greedy": ("cosine", 0.05)}


# ---------------------------------------------------------------------------------------------------------- enumeration


def exact(problem: TabularProblem) -> dict[str, float]:
    """Every quantity of a problem; built anew, since a problem keeps what it has computed."""
    p = problem.with_policy(problem.policy)
    weighted, own = p.constraints(make_schedule("linear", p.horizon)), p.constraints(w_min=0.8)
    return {
        "gain": p.gain,
        "surrogate": p.surrogate,
        "residual": p.residual,
        "pathwise": p.pathwise_bound,
        "u": float(p.expected_divergence.sum()),
        "l": float(p.largest_divergence.sum()),
        "suffix": float(p.largest_suffix_tv.sum()),
        "delta_b": weighted.delta_b,
        "own delta_b": own.delta_b,
    }


def by_loops(problem: TabularProblem) -> dict[str, float]:
    """The same for responses of one length, a response at a time, and each prefix with all that can follow it."""
    V, T = problem.vocabulary, problem.horizon
    mu, pi = ([table.tolist() for table in levels] for levels in (problem.rollout, problem.policy))
    rewards, weights = problem.rewards.tolist(), make_schedule("linear", T).tolist()
    gain = surrogate = residual = pathwise = delta_b = 0.0
    u, largest, suffix = [0.0] * T, [0.0] * T, [0.0] * T
    for reward, y in zip(rewards, itertools.product(range(V), repeat=T), strict=True):
        row, m, p = 0, 1.0, 1.0
        rho, D = [], []
        for t, token in enumerate(y):
            a, b = mu[t][row], pi[t][row]
            rho.append(b[token] / a[token])
            D.append(sum(abs(x - z) for x, z in zip(a, b, strict=True)) / 2)
            m, p, row = m * a[token], p * b[token], row * V + token
        gain += (p - m) * reward
        surrogate += m * reward * sum(r - 1 for r in rho)
        residual += m * reward * sum((rho[t] - 1) * (1 - math.prod(rho[t + 1 :])) for t in range(T))
        pathwise += 2 * problem.xi * m * sum(abs(rho[t] - 1) * sum(D[t + 1 :]) for t in range(T))
        S = W = 0.0
        for t in range(T):
            u[t] += m * D[t]
            largest[t] = max(largest[t], D[t])
            S, W = S + weights[t] * D[t], W + weights[t]
            delta_b = max(delta_b, S / W) if t < T - 1 else delta_b
    for t in range(1, T):
        for start in range(V**t):
            difference = 0.0
            for ending in itertools.product(range(V), repeat=T - t):
                row, m, p = start, 1.0, 1.0
                for i, token in enumerate(ending, start=t):
                    m, p, row = m * mu[i][row][token], p * pi[i][row][token], row * V + token
                difference += abs(m - p)
            suffix[t - 1] = max(suffix[t - 1], difference / 2)
    return {
        "gain": gain,
        "surrogate": surrogate,
        "residual": residual,
        "pathwise": pathwise,
        "u": sum(u),
        "l": sum(largest),
        "suffix": sum(suffix),
        "delta_b": delta_b,
        "own delta_b": delta_b,  # one length: the weights by position are the own ones
    }


def enumeration(horizon: int, repeats: int) -> dict[str, float]:
    problem = TabularProblem.random(np.random.default_rng(0), 4, horizon, eos=False)
    got, want = exact(problem), by_loops(problem)
    assert all(math.isclose(got[name], want[name], rel_tol=1e-9, abs_tol=1e-12) for name in want), "the loops differ"
    median = interleaved({"package": partial(exact, problem), "loops": partial(by_loops, problem)}, repeats)
    return {**median, "loops over package": median["loops"] / median["package"]}


# --------------------------------------------------------------------------------------------------- bounds, schedules


def all_bounds(T: int) -> list[float]:
    """Every closed form and every schedule once."""
    u, largest = np.full(T, DELTA_B), np.full(T, DELTA)
    linear = make_schedule("linear", T)
    later = np.arange(T - 1, -1, -1, dtype=np.float64)
    monotone = [theory.is_monotone(later, make_schedule(name, T)) for name in theory.SCHEDULES]
    return [
        *map(float, monotone),
        theory.theorem_1(T, DELTA_B, DELTA / 0.8, weights=linear, xi=XI),
        theory.corollary_6(T, DELTA, DELTA_B, xi=XI),
        theory.corollary_7(T, DELTA, DELTA_B, 0.8, xi=XI),
        theory.implemented_rule(T, DELTA, DELTA_B, 0.8, xi=XI),
        theory.own_lengths(T, DELTA, DELTA_B, 0.8, xi=XI, slack=DELTA),
        theory.terminal_only(T, DELTA_B, DELTA, weights=linear, xi=XI),
        theory.product_form(T, DELTA_B, DELTA, xi=XI),
        theory.uniform(T, DELTA, xi=XI),
        theory.uniform(T, DELTA, xi=XI, form="product"),
        theory.trm_max_avg(T, 0.1, 0.002, xi=XI),
        theory.residual_bound(u, largest, xi=XI),
        theory.residual_bound(u, largest, xi=XI, form="product"),
    ]


def numbers_allocated(call: Callable[[], object]) -> float:
    """The peak, in float64 numbers."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 8
    finally:
        tracemalloc.stop()


def long_responses(horizons: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Seconds, and numbers allocated for each of T, at two lengths: the latter is the same if memory is O(T)."""
    calls: dict[str, Callable[[int], object]] = {
        "all bounds": all_bounds,
        **{f"tightest, {name}": partial(one_program, name) for name in PROGRAMS},
    }
    result: dict[str, Any] = {}
    for name, call in calls.items():
        few = repeats if name == "all bounds" else 1
        result[name] = {
            str(T): {
                "seconds": interleaved({"": partial(call, T)}, few)[""],
                "numbers for each of T": numbers_allocated(partial(call, T)) / T,
            }
            for T in horizons
        }
    return result


# ----------------------------------------------------------------------------------------------------- linear programs


def one_program(name: str, T: int) -> float:
    schedule, w_min = PROGRAMS[name]
    return tightest_residual(make_schedule(schedule, T, w_min), DELTA, DELTA_B, xi=XI).bound


def by_highs(name: str, T: int) -> float:
    """The same by HiGHS: maximise sum_t (a_t - a_{t+1}) S_t with 0 <= S_t <= B_t and 0 <= S_t - S_{t-1} <= limit."""
    schedule, w_min = PROGRAMS[name]
    w = make_schedule(schedule, T, w_min)
    budgets = DELTA_B * np.cumsum(w)
    budgets[-1] = budgets[-2] + DELTA
    allowed = np.minimum(np.minimum(DELTA, budgets) / w, 1.0)
    rate = np.append(np.cumsum(allowed[:0:-1])[::-1], 0.0) / w
    steps = scipy.sparse.diags([np.ones(T), -np.ones(T - 1)], [0, -1], format="csr")
    found = linprog(
        np.append(rate[1:], 0.0) - rate,
        A_ub=scipy.sparse.vstack([steps, -steps]),
        b_ub=np.concatenate([np.minimum(DELTA, w), np.zeros(T)]),
        bounds=np.stack([np.zeros(T), budgets], axis=1),
        method="highs",
    )
    assert found.status == 0, found.message
    return -4 * XI * float(found.fun)


def programs(horizons: tuple[int, ...], repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, T in itertools.product(PROGRAMS, horizons):
        got, want = one_program(name, T), by_highs(name, T)
        assert math.isclose(got, want, rel_tol=1e-6), f"{name}, T = {T}: {got} here, {want} by HiGHS"
        median = interleaved({"package": partial(one_program, name, T), "HiGHS": partial(by_highs, name, T)}, repeats)
        ratio = median["HiGHS"] / median["package"]
        result[f"{name}, T = {T}"] = {**median, "HiGHS over package": ratio, "bound": got}
    return result


# --------------------------------------------------------------------------------------------------------- certificate


def certify(N: int, T: int, repeats: int) -> dict[str, float]:
    """N responses of T / 2 to T tokens in groups of 8, 1000 resamples."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(T // 2, T + 1, (N, 1))
    divergence, log_ratio = rng.random((N, T)) ** 4, 0.1 * rng.standard_normal((N, T))
    rewards, groups = rng.integers(0, 2, N), np.arange(N) // 8
    call = partial(theory.certificate, divergence, log_ratio, mask, rewards, xi=XI, groups=groups)
    return {
        "seconds": interleaved({"": call}, repeats)[""],
        "numbers for each token": numbers_allocated(call) / (N * T),
    }


def measure(quick: bool, repeats: int) -> dict[str, Any]:
    horizon, long, short = (4, 20_000, (256, 512)) if quick else (6, 1_000_000, (4096, 8192))
    N, T = (64, 128) if quick else (1024, 2048)
    result: dict[str, Any] = {
        "sizes": {"enumeration": [4, horizon], "long": [long // 10, long], "programs": short, "certificate": [N, T]},
        "enumeration": enumeration(horizon, repeats),
        "long responses": long_responses((long // 10, long), repeats),
        "programs": programs(short, repeats),
        "certificate": certify(N, T, min(repeats, 3)),
    }
    long_bounds = result["long responses"]["all bounds"]
    few, many = (long_bounds[str(T)]["numbers for each of T"] for T in (long // 10, long))
    solved = {key: value for key, value in result["programs"].items() if key.endswith(f"T = {short[0]}")}
    targets = [
        (f"enumeration, 4 tokens, {horizon} positions (s)", result["enumeration"]["package"], "<=", 1.0),
        ("loops / enumeration", result["enumeration"]["loops over package"], ">=", 10.0),
        (f"all bounds, T = {long:,} (s)", long_bounds[str(long)]["seconds"], "<=", 1.0),
        ("their memory per T, at T over at T / 10", many / few, "<=", 1.1),
        *((f"{name} (s)", value["package"], "<=", 5.0) for name, value in solved.items()),
        *((f"{name}, HiGHS / package", value["HiGHS over package"], ">=", 1.0) for name, value in solved.items()),
    ]
    result["targets"] = graded(targets)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args()
    result = {
        "repeats": options.repeats,
        "machine": {
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        **measure(options.quick, options.repeats),
    }
    print(
        f"theory, median of {options.repeats}" + (" (quick: small sizes, the targets are for others)" * options.quick)
    )
    for row in result["targets"]:
        print(
            f"  {row['claim']:55s} {row['value']:9.4f}   target {row['target']:6s} {'met' if row['met'] else 'MISSED'}"
        )
    print("long responses:")
    for name, values in result["long responses"].items():
        for T, value in values.items():
            print(
                f"  {name + ', T = ' + format(int(T), ','):55s} {value['seconds']:9.4f} s   "
                f"{value['numbers for each of T']:.1f} numbers for each of T"
            )
    print("linear programs against HiGHS:")
    for name, value in result["programs"].items():
        ratio = f"{value['HiGHS over package']:.1f} x"
        print(f"  {name:55s} {value['package']:9.4f} s   HiGHS {value['HiGHS']:.4f} s, {ratio}")
    N, T = result["sizes"]["certificate"]
    print(
        f"certificate of {N} responses of up to {T} tokens: {result['certificate']['seconds']:.3f} s, "
        f"{result['certificate']['numbers for each token']:.1f} numbers for each token"
    )
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
