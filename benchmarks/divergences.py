"""How far the divergences are from the exact total variation on real rollouts, and which thresholds correspond.

    python -m benchmarks.divergences [--json PATH] [--figure PATH] [--docs PATH] [--steps 40] [--run FOLDER]

Trains the default job (`cppo train`, recipe arithmetic) with a checkpoint after every rollout batch. For every fourth
one, mu is the policy that samples and pi the policy after the eight updates on that batch. New responses to the
batch's prompts are sampled from mu, and both policies' whole distributions (18 tokens) are computed at every token. So
top K with K = 20 is exact here, and K = 1, 2, 4, 8 show what a top K leaves out; a large vocabulary has a longer tail.

A divergence drops a token that moves away from mu and exceeds its limit (DPPO's rule). Thresholds correspond if they
drop the same share of tokens as the recipe's delta does with the exact TV.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import cppo
from benchmarks.core import write_json
from cppo import divergence
from cppo.advantages import group_advantages
from cppo.config.load import Config, load_config
from cppo.rules.base import moves_away
from cppo.runs.checkpoints import Checkpoints
from cppo.scoring import RaggedTopK, adaptive_for_rule
from cppo.tasks import make_task, score_all
from cppo.training.models import load_tokenizer
from cppo.training.run import train
from pages.scoring import fill

KS = (1, 2, 4, 8)
EVERY = 4
#: Tokens whose exact TV is smaller than this are left out of ratios.
SMALLEST = 1e-4
#: In the figure; those with a shaded range.
SHOWN = ("binary_tv", "topk_tv, K=1", "topk_tv, K=2", "topk_tv, K=4", "topk_tv_upper, K=4", "topk_tv_upper, K=8")
BANDS = ("binary_tv", "topk_tv, K=4")
COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#000000")


# -- rollouts ----------------------------------------------------------------------------------------------------------


def job(steps: int, folder: str) -> Config:
    """The default job, with all checkpoints kept and little evaluation."""
    return load_config(
        "arithmetic",
        [
            f"steps={steps}",
            f"output_dir={folder}",
            f"keep_checkpoints={steps}",
            f"evaluation.every={steps}",
            "evaluation.problems=16",
        ],
    )


class Part(NamedTuple):
    """One rollout batch; `found`: every divergence by name, ``[B, T]``; `stored`: bytes a token of mu, kept ragged."""

    batch: cppo.TokenBatch
    found: dict[str, Tensor]
    stored: float

    def tokens(self, name: str) -> Tensor:
        """A divergence at the loss tokens."""
        return self.found[name][self.batch.loss_mask]


@torch.no_grad()
def rollouts(config: Config, folder: Path, step: int) -> Part:
    """mu's responses to the prompts of rollout batch `step`, and how far pi is from mu along them."""
    checkpoints = Checkpoints(folder / "checkpoints")
    source = checkpoints.path(step) if step else folder / "warmup" / "model"
    tokenizer = load_tokenizer(str(source))
    mu, pi = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, checkpoints.path(step + 1)))
    task = make_task(config.task.name, **config.task.options)
    count, each = config.rollout.prompts, config.rollout.responses
    examples = list(task.train(config.steps * count, seed=config.seed))[step * count : (step + 1) * count]
    examples = [example for example in examples for _ in range(each)]
    prompts = tokenizer.pad({"input_ids": tokenizer([e.prompt for e in examples])["input_ids"]}, return_tensors="pt")
    torch.manual_seed(step)
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=config.rollout.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = mu.generate(**prompts, generation_config=sampling)
    tokens = ids[:, prompts["input_ids"].shape[1] :]
    ended = (tokens == tokenizer.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0  # the end token is part of the response
    attention = torch.cat([prompts["attention_mask"], mask.long()], 1)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rewards = torch.tensor(score_all(task, list(zip(examples, texts, strict=True))))
    pi_rows, mu_rows = (
        model(input_ids=ids, attention_mask=attention).logits[:, -tokens.shape[1] - 1 : -1].log_softmax(-1)
        for model in (pi, mu)
    )
    logp, mu_logp = (rows.gather(-1, tokens[..., None])[..., 0] for rows in (pi_rows, mu_rows))
    found = {
        "exact_tv": divergence.exact_tv(pi_rows, mu_rows),
        "exact_kl": divergence.exact_kl(pi_rows, mu_rows),
        "binary_tv": divergence.binary_tv(logp, mu_logp),
        "binary_kl": divergence.binary_kl(logp, mu_logp),
    }
    for k in KS:
        top, top_ids = mu_rows.topk(k)
        given = (pi_rows.gather(-1, top_ids), top, logp, mu_logp, (top_ids == tokens[..., None]).any(-1))
        found[f"topk_tv, K={k}"], found[f"topk_tv_upper, K={k}"] = divergence.topk_interval(*given)
        found[f"topk_kl, K={k}"] = divergence.topk_kl(*given)
    top, top_ids = mu_rows.topk(mu_rows.shape[-1])
    stored = RaggedTopK.pack(top_ids[mask], top[mask]).bytes_per_token
    return Part(cppo.TokenBatch(logp, mu_logp, group_advantages(rewards, each), mask), found, stored)


# -- figures -----------------------------------------------------------------------------------------------------------


def quantiles(values: Tensor, *levels: float) -> list[float]:
    ordered = values.double().sort().values
    return [ordered[min(int(level * len(ordered)), len(ordered) - 1)].item() for level in levels]


def summarise(parts: list[Part], rule: cppo.CPPO) -> dict[str, Any]:
    """Figures of all rollouts together; `rule` is the recipe's."""
    flat = {name: torch.cat([part.tokens(name) for part in parts]) for name in parts[0].found}
    batches = [part.batch for part in parts]
    away = torch.cat([moves_away(b.token_advantages(), b.log_ratio())[b.loss_mask] for b in batches])
    exact = flat["exact_tv"]
    moved = exact > SMALLEST
    dropped = (exact > rule.delta) & away
    result: dict[str, Any] = {
        "tokens": exact.numel(),
        "away": away.double().mean().item(),
        "delta": rule.delta,
        "ragged_bytes": sum(part.stored * int(part.batch.loss_mask.sum()) for part in parts) / exact.numel(),
        "dropped_by_exact_tv": dropped.double().mean().item(),
        "exact_tv": dict(zip(("median", "p90", "p99", "max"), quantiles(exact, 0.5, 0.9, 0.99, 1.0), strict=True)),
        "kinds": {},
        "interval": {},
    }
    verdicts = {name: verdict(parts, rule, name) for name in flat if "_tv" in name}
    truth = verdicts["exact_tv"]
    for name, values in flat.items():
        row: dict[str, Any] = {"threshold": same_share(values[away], int(dropped.sum()))}
        if name in verdicts:
            ratio = (values / exact)[moved]
            row["over_exact"] = dict(zip(("p10", "median", "p90"), quantiles(ratio, 0.1, 0.5, 0.9), strict=True))
            row["mean_over_mean"] = (values.sum() / exact.sum()).item()
            row["cppo_decides_differently"] = (verdicts[name] != truth).double().mean().item()
            row["cppo_keeps_what_exact_drops"] = ((verdicts[name] > 0) & (truth == 0)).double().mean().item()
        result["kinds"][name] = row
    for k in KS:
        low, high = flat[f"topk_tv, K={k}"], flat[f"topk_tv_upper, K={k}"]
        width = high - low
        names = ("median", "p90", "p99", "max")
        result["interval"][str(k)] = {
            "width": dict(zip(names, quantiles(width, 0.5, 0.9, 0.99, 1.0), strict=True)),
            "outside": ((exact < low - 1e-5) | (exact > high + 1e-5)).double().mean().item(),
            "undecided_at_delta": ((low <= rule.delta) & (high > rule.delta)).double().mean().item(),
            **adaptive(parts, rule, k, truth),
        }
    return result


def verdict(parts: list[Part], rule: cppo.CPPO, name: str) -> Tensor:
    """The recipe's coefficients with another divergence in place, of all loss tokens."""
    judged = [(part.batch, rule(part.batch.with_divergence(part.found[name]))) for part in parts]
    return torch.cat([found.coefficient[batch.loss_mask] for batch, found in judged])


def adaptive(parts: list[Part], rule: cppo.CPPO, k: int, truth: Tensor) -> dict[str, float]:
    """What `adaptive_tv` resolves under the recipe's rule, and whether it decides as the exact TV does."""
    rule = replace(rule, divergence="adaptive_tv")
    resolved = tokens = passes = 0
    coefficients = []
    for batch, found, _ in parts:
        exact = found["exact_tv"].flatten()
        ends = found[f"topk_tv, K={k}"], found[f"topk_tv_upper, K={k}"]
        answer = adaptive_for_rule(rule, batch, *ends, exact.__getitem__)
        inside = batch.loss_mask
        resolved += int((answer.resolved & inside).sum())
        tokens += int(inside.sum())
        passes = max(passes, answer.passes)
        coefficients.append(rule(batch.with_divergence(answer.divergence)).coefficient[inside])
    different = (torch.cat(coefficients) != truth).double().mean().item()
    return {"cppo_resolved": resolved / tokens, "cppo_passes": passes, "cppo_adaptive_decides_differently": different}


def same_share(values: Tensor, count: int) -> float:
    """The limit that exactly `count` of the values exceed."""
    ordered = values.double().sort(descending=True).values
    if count == 0 or count >= len(ordered):
        return float("nan")
    return 0.5 * (ordered[count - 1] + ordered[count]).item()


def bands(parts: list[Part], names: tuple[str, ...]) -> dict[str, Any]:
    """Quantiles of D / exact TV in bins of the exact TV."""
    exact = torch.cat([part.tokens("exact_tv") for part in parts])
    edges = torch.logspace(-4, 0, 17)
    result: dict[str, Any] = {}
    for name in names:
        values = torch.cat([part.tokens(name) for part in parts])
        rows = []
        for left, right in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            inside = (exact > left) & (exact <= right)
            if int(inside.sum()) >= 30:
                low, middle, high = quantiles((values / exact)[inside], 0.1, 0.5, 0.9)
                rows.append({"exact": (left * right) ** 0.5, "p10": low, "median": middle, "p90": high})
        result[name] = rows
    return result


# -- report ------------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for (name, rows), colour, marker in zip(result["bands"].items(), COLOURS, "os^vDX", strict=True):
        x = [row["exact"] for row in rows]
        if name in BANDS:
            low, high = [row["p10"] for row in rows], [row["p90"] for row in rows]
            left.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        left.plot(x, [row["median"] for row in rows], color=colour, marker=marker, markersize=4, label=name)
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.axvline(result["delta"], color="black", linewidth=0.8, linestyle="--")
    left.set(xscale="log", ylim=(0, 2), xlabel="exact TV", title="D / exact TV: median (shaded: 10% to 90%)")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=6)
    ks = [int(k) for k in result["interval"]]
    interval = list(result["interval"].values())
    for (quantile, colour), marker in zip((("p99", "#D55E00"), ("p90", "#0072B2")), "s^", strict=True):
        widths = [max(row["width"][quantile], 1e-8) for row in interval]
        middle.plot(ks, widths, color=colour, marker=marker, label=f"width, {quantile.upper()}")
    middle.axhline(result["delta"], color="black", linewidth=0.8, linestyle="--", label="the recipe's delta")
    middle.set(xscale="log", yscale="log", xlabel="K", title="width of the top-K interval")
    middle.legend(fontsize=8)
    for key, label, colour, marker in (
        ("undecided_at_delta", "interval contains delta", "#0072B2", "^"),
        ("cppo_resolved", "resolved for CPPO (adaptive_tv)", "#009E73", "D"),
    ):
        right.plot(ks, [100 * row[key] for row in interval], color=colour, marker=marker, label=label)
    right.set(xscale="log", xlabel="K", ylim=(0, None), title="tokens that need the exact TV, %")
    right.legend(fontsize=8)
    for axes in (middle, right):
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def to_markdown(result: dict[str, Any]) -> str:
    tv = result["exact_tv"]
    lines = [
        f"{result['tokens']:,} tokens of {len(result['steps'])} rollout batches; the exact TV is {tv['median']:.2g} in "
        f"the median, {tv['p90']:.2g} at P90, {tv['p99']:.2g} at P99. {result['away']:.0%} of the tokens move away "
        f"from mu. With the exact TV, a limit of {result['delta']:g} drops {result['dropped_by_exact_tv']:.2%} of all "
        f"tokens. Kept ragged (99.9% of mu, `cppo.scoring.RaggedTopK`), mu takes {result['ragged_bytes']:.1f} bytes a "
        "token.",
        "",
        "| divergence | D / exact TV: 10%, median, 90% | mean D / mean exact TV | CPPO decides otherwise than by the "
        "exact TV | and keeps what the exact TV drops | corresponding limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["kinds"].items():
        cells = [
            f"`{name}`" if "," not in name else f"`{name.split(',')[0]}`, {name.split(', ')[1].replace('=', ' = ')}"
        ]
        if "over_exact" in row:
            o = row["over_exact"]
            cells += [f"{o['p10']:.2f}, {o['median']:.2f}, {o['p90']:.2f}", f"{row['mean_over_mean']:.2f}"]
            cells += [f"{row['cppo_decides_differently']:.2%}", f"{row['cppo_keeps_what_exact_drops']:.2%}"]
        else:
            cells += [""] * 4
        cells.append(f"{row['threshold']:.3g}" + (" nats" if "_kl" in name else ""))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| K | width of the interval: median, P90, P99 | exact TV outside of it | interval contains delta | resolved "
        "for CPPO by `adaptive_tv` | CPPO then decides otherwise |",
        "|---|---|---|---|---|---|",
    ]
    for k, row in result["interval"].items():
        w = row["width"]
        lines.append(
            f"| {k} | {w['median']:.1e}, {w['p90']:.1e}, {w['p99']:.1e} | {row['outside']:.0%} | "
            f"{row['undecided_at_delta']:.2%} | {row['cppo_resolved']:.2%} | "
            f"{row['cppo_adaptive_decides_differently']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--docs", type=Path, help="write the tables into this page, between its markers")
    parser.add_argument("--steps", type=int, default=40, help="rollout batches to train")
    parser.add_argument("--run", type=Path, help="keep the run in this folder, or use the one that is there")
    parser.add_argument("--only-docs", action="store_true", help="train nothing: figure and tables from --json")
    options = parser.parse_args()
    if options.only_docs:
        result = json.loads(options.json.read_text())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.run or Path(temporary) / "run"
            config = job(options.steps, str(folder))
            if not (folder / "checkpoints").exists():
                train(config)
            chosen = list(range(0, options.steps, EVERY))
            parts = [rollouts(config, folder, step) for step in chosen]
        rule = config.make_rule()
        assert isinstance(rule, cppo.CPPO)
        result = {"torch": torch.__version__, "steps": chosen, "updates": config.updates, **summarise(parts, rule)}
        result["bands"] = bands(parts, SHOWN)
    print(to_markdown(result))
    if options.json and not options.only_docs:
        write_json(options.json, result)
    if options.figure:
        draw(result, options.figure)
    if options.docs:
        fill(options.docs, "divergences", to_markdown(result))


if __name__ == "__main__":
    main()
