"""How far the divergences are from the exact ones on a real language model, and which decisions that changes.

    python -m benchmarks.llm.divergences --run RUN --name smollm2-135m [--lags 0 1 2 4]
    python -m pages.divergences --docs docs/divergences.md

RUN is the folder of `cppo train` with every checkpoint kept (`save_every=1 keep_checkpoints=N`). mu is the policy of a
checkpoint, pi the one `lag` rollout batches later, after `lag` x `updates` updates; lag 0 compares mu in bfloat16 with
mu in float32: the mismatch of a sampler that rounds. mu samples new responses to the prompts of the batch that it
would have sampled for, and both whole distributions are computed at every token, in float32.

Written: figures (`benchmarks/results/divergences_NAME.json`) and every token (`..._NAME.parquet`: position, lag,
masses outside the top K, every divergence), from which the figures can be made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import cppo
from benchmarks.core import write_json
from benchmarks.divergences import quantiles
from cppo import divergence
from cppo.advantages import group_advantages
from cppo.config.load import Config, load_config
from cppo.engines.trl.sampler import sample
from cppo.runs.checkpoints import Checkpoints
from cppo.scoring import adaptive_for_rule
from cppo.tasks import make_task, score_all
from cppo.training.models import load_tokenizer
from cppo.training.prompts import PromptFormat

KS = (1, 2, 5, 10, 20, 50, 100)
RESULTS = Path("benchmarks/results")
#: Responses whose whole distributions are held at once: rows x tokens x vocabulary x 4 bytes, twice and more.
CHUNK = 4
#: Positions of a response are summed up in these ranges.
RANGES = ((1, 2), (3, 5), (6, 10), (11, 20), (21, 10**6))


def rollout(config: Config, source: Path, step: int, repeat: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mu's responses: ids and attention of prompt and response ``[B, P + T]``, tokens and mask ``[B, T]``, and their
    advantages.
    """
    tokenizer = load_tokenizer(str(source))
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    task = make_task(config.task.name, **config.task.options)
    count, each = config.rollout.prompts, config.rollout.responses
    rows = list(task.train(config.steps * count, seed=config.seed))
    examples = [rows[(step * count + at) % len(rows)] for at in range(count * repeat) for _ in range(each)]
    prompts = PromptFormat(tokenizer, config.prompt)
    torch.manual_seed(step)
    given = [prompts.ids(example.prompt) for example in examples]
    ends = model.generation_config.eos_token_id
    sampled = sample(
        model,
        given,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=1.0,
        ends=ends if isinstance(ends, list) else [ends],
        pad=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode([tokens.tolist() for tokens in sampled.tokens], skip_special_tokens=True)
    rewards = torch.tensor(score_all(task, list(zip(examples, texts, strict=True))))
    getattr(task, "close", lambda: None)()
    width, length = max(map(len, given)), max(map(len, sampled.tokens))
    ids = torch.full((len(given), width + length), tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, (prompt, tokens) in enumerate(zip(given, sampled.tokens, strict=True)):
        at = slice(width - len(prompt), width + len(tokens))
        ids[row, at] = torch.cat([torch.tensor(prompt), tokens])
        attention[row, at] = 1
    return ids, attention, ids[:, width:], attention[:, width:].bool(), group_advantages(rewards, each)


def rows_of(model: Any, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """Log-probabilities ``[b, T, V]``, float32."""
    position = (attention.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=attention, position_ids=position, logits_to_keep=length + 1)
    return out.logits[:, :-1].float().log_softmax(-1)


def divergences(pi: Tensor, mu: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Every divergence of ``[..., V]`` rows, and what mu has outside its top K."""
    logp, mu_logp = (rows.gather(-1, tokens[..., None])[..., 0] for rows in (pi, mu))
    found = {"logp": logp, "mu_logp": mu_logp}
    found |= {"exact_tv": divergence.exact_tv(pi, mu), "exact_kl": divergence.exact_kl(pi, mu)}
    found |= {"binary_tv": divergence.binary_tv(logp, mu_logp), "binary_kl": divergence.binary_kl(logp, mu_logp)}
    top, top_ids = mu.topk(max(KS))
    of_pi = pi.gather(-1, top_ids)
    for k in KS:
        given = (of_pi[..., :k], top[..., :k], logp, mu_logp, (top_ids[..., :k] == tokens[..., None]).any(-1))
        found[f"topk_tv, K={k}"], found[f"topk_tv_upper, K={k}"] = divergence.topk_interval(*given)
        found[f"topk_tv_replace, K={k}"] = divergence.topk_tv(*given, variant="replace_last")
        found[f"topk_kl, K={k}"] = divergence.topk_kl(*given)
        found[f"outside, K={k}"] = (1 - top[..., :k].exp().sum(-1)).clamp(min=0)
    found["entries"] = (top.exp().cumsum(-1) < 0.999).sum(-1) + 1.0
    return found


class Part:
    """Responses of one mu and what every pi makes of them."""

    def __init__(self, lag: int, batch: cppo.TokenBatch, found: dict[str, Tensor]) -> None:
        self.lag, self.batch, self.found = lag, batch, found

    def tokens(self, name: str) -> Tensor:
        """A divergence at the loss tokens."""
        return self.found[name][self.batch.loss_mask]


@torch.no_grad()
def parts(config: Config, folder: Path, step: int, lags: Sequence[int], repeat: int) -> Iterator[Part]:
    """One part for every lag."""
    checkpoints = Checkpoints(folder / "checkpoints")
    source = checkpoints.path(step)
    ids, attention, tokens, mask, advantages = rollout(config, source, step, repeat)
    mu = AutoModelForCausalLM.from_pretrained(source).eval()
    for lag in lags:
        if lag:
            pi = AutoModelForCausalLM.from_pretrained(checkpoints.path(step + lag)).eval()
        else:
            pi = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        kept: dict[str, list[Tensor]] = {}
        for start in range(0, len(ids), CHUNK):
            at = slice(start, start + CHUNK)
            of_pi, of_mu = (rows_of(model, ids[at], attention[at], tokens.shape[1]) for model in (pi, mu))
            for name, values in divergences(of_pi, of_mu, tokens[at]).items():
                kept.setdefault(name, []).append(values)
        found = {name: torch.cat(values) for name, values in kept.items()}
        yield Part(lag, cppo.TokenBatch(found.pop("logp"), found.pop("mu_logp"), advantages, mask), found)
        print(f"step {step}, lag {lag}: {int(mask.sum()):,} tokens", file=sys.stderr, flush=True)


# -- figures -----------------------------------------------------------------------------------------------------------


def rules(rule: cppo.CPPO) -> dict[str, cppo.TrustRegion]:
    """The rules whose decisions are compared: the run's, and DPPO with its limit."""
    return {"cppo": rule, "dppo": cppo.make_rule("dppo", delta=rule.delta)}


def coefficients(found: list[Part], rule: cppo.TrustRegion, name: str) -> Tensor:
    """c_t of all loss tokens with the divergence `name` in place."""
    kind = {"divergence": "exact_tv"}
    judge = replace(rule, **kind)  # type: ignore[type-var]
    return torch.cat(
        [judge(part.batch.with_divergence(part.found[name])).coefficient[part.batch.loss_mask] for part in found]
    )


def of_lag(found: list[Part], rule: cppo.CPPO) -> dict[str, Any]:
    """Figures of the parts of one lag."""
    flat = {name: torch.cat([part.tokens(name) for part in found]) for name in found[0].found}
    exact, levels = flat["exact_tv"], ("median", "p90", "p99", "max")
    truth = {which: coefficients(found, judge, "exact_tv") for which, judge in rules(rule).items()}
    result: dict[str, Any] = {
        "tokens": exact.numel(),
        "exact_tv": {"mean": exact.mean().item()}
        | dict(zip(levels, quantiles(exact, 0.5, 0.9, 0.99, 1.0), strict=True)),
        "exact_kl": {"mean": flat["exact_kl"].mean().item()},
        "held_by_exact_tv": {which: (c == 0).double().mean().item() for which, c in truth.items()},
        "outside": {str(k): spread(flat[f"outside, K={k}"]) for k in KS},
        "kinds": {},
    }
    moved = exact > 1e-4
    for name, values in flat.items():
        if name.startswith("outside"):
            continue
        against = flat["exact_kl"] if "_kl" in name else exact
        row: dict[str, Any] = {"mean_over_exact": (values.sum() / against.sum()).item()}
        if bool(moved.any()):
            row["over_exact"] = dict(
                zip(("p10", "median", "p90"), quantiles((values / against)[moved], 0.1, 0.5, 0.9), strict=True)
            )
        if "_tv" in name:
            row["decides_otherwise"] = {
                which: (coefficients(found, judge, name) != truth[which]).double().mean().item()
                for which, judge in rules(rule).items()
            }
        result["kinds"][name] = row
    result["adaptive"] = {str(k): adaptive(found, rule, k, truth["cppo"]) for k in KS}
    result["positions"] = [of_range(found, low, high) for low, high in RANGES]
    return result


def spread(values: Tensor) -> dict[str, float]:
    """Mean and quantiles."""
    return {"mean": values.mean().item()} | dict(
        zip(("median", "p90", "p99"), quantiles(values, 0.5, 0.9, 0.99), strict=True)
    )


def of_range(found: list[Part], low: int, high: int) -> dict[str, Any]:
    """Means over the loss tokens at positions low ... high."""
    position = torch.cat([part.batch.loss_mask.cumsum(-1)[part.batch.loss_mask] for part in found])
    inside = (position >= low) & (position <= high)
    names = ("exact_tv", "exact_kl", "binary_tv", "topk_tv, K=20", "topk_tv_upper, K=20", "outside, K=20")
    means = {name: torch.cat([part.tokens(name) for part in found])[inside].mean().item() for name in names}
    return {"from": low, "to": min(high, int(position.max())), "tokens": int(inside.sum()), **means}


def adaptive(found: list[Part], rule: cppo.CPPO, k: int, truth: Tensor) -> dict[str, float]:
    """What `adaptive_tv` resolves, and whether it decides as the exact TV does."""
    judge = replace(rule, divergence="adaptive_tv")
    resolved, chosen = 0, []
    for part in found:
        exact = part.found["exact_tv"].flatten()
        ends = part.found[f"topk_tv, K={k}"], part.found[f"topk_tv_upper, K={k}"]
        answer = adaptive_for_rule(judge, part.batch, *ends, exact.__getitem__)
        resolved += int((answer.resolved & part.batch.loss_mask).sum())
        chosen.append(judge(part.batch.with_divergence(answer.divergence)).coefficient[part.batch.loss_mask])
    different = (torch.cat(chosen) != truth).double().mean().item()
    return {"resolved": resolved / len(truth), "decides_otherwise": different}


def write_tokens(found: list[Part], path: Path) -> None:
    """Every loss token: position, lag, response, sign of the advantage, and every divergence (float16 would round)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: dict[str, list[np.ndarray]] = {}
    for part in found:
        mask = part.batch.loss_mask
        which = torch.arange(mask.shape[0])[:, None].expand_as(mask)
        entries = {"lag": torch.full_like(which, part.lag), "response": which, "position": mask.cumsum(-1)}
        advantages = part.batch.token_advantages().expand(mask.shape)
        entries |= {"advantage": advantages, "policy_logp": part.batch.policy_logp}
        entries |= {"rollout_logp": part.batch.rollout_logp, **part.found}
        for name, values in entries.items():
            numbers = values[mask].numpy()
            kind = np.int16 if numbers.dtype.kind == "i" else np.float32
            table.setdefault(name, []).append(short(numbers.astype(kind)))
    arrays = {name: np.concatenate(values) for name, values in table.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd", compression_level=19)


def short(values: np.ndarray) -> np.ndarray:
    """float32 with the last 10 of 23 bits of the fraction rounded off (1e-4 of the value): half the space on disk."""
    if values.dtype != np.float32:
        return values
    return ((values.view(np.uint32) + np.uint32(1 << 9)) & np.uint32(0xFFFFFC00)).view(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run folder with every checkpoint")
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("--about", default="", help="the model, in words")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 8, 12], help="checkpoints that are mu")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4], help="rollout batches between mu and pi")
    parser.add_argument("--repeat", type=int, default=1, help="rollout batches of prompts for each mu")
    options = parser.parse_args()
    config = load_config(str(options.run / "config.yaml"), ["output_dir=null"])
    rule = config.make_rule()
    assert isinstance(rule, cppo.CPPO)
    found = [part for step in options.steps for part in parts(config, options.run, step, options.lags, options.repeat)]
    by_lag = {lag: [part for part in found if part.lag == lag] for lag in options.lags}
    first = by_lag[options.lags[0]]
    tokens = sum(int(part.batch.loss_mask.sum()) for part in first)
    entries = torch.cat([part.tokens("entries") for part in first])
    for part in found:
        part.found.pop("entries")
    labels = {lag: str(lag * config.updates) if lag else "0, mu in bfloat16" for lag in options.lags}
    result = {
        "about": options.about or config.model,
        "torch": torch.__version__,
        "task": config.task.name,
        "rule": f"cppo(delta={rule.delta:g}, delta_b={rule.delta_b:g})",
        "vocabulary": AutoModelForCausalLM.from_pretrained(
            Checkpoints(options.run / "checkpoints").path(options.steps[0])
        ).config.vocab_size,
        "steps": options.steps,
        "updates": config.updates,
        "mean_length": tokens / sum(part.batch.loss_mask.shape[0] for part in first),
        "ragged": {str(k): 1 + 5 * entries.clamp(max=k).mean().item() for k in (20, 100)},
        "lags": {str(lag): {"label": labels[lag], **of_lag(kept, rule)} for lag, kept in by_lag.items()},
    }
    target = RESULTS / f"divergences_{options.name}.json"
    write_json(target, result)
    write_tokens(found, target.with_suffix(".parquet"))


if __name__ == "__main__":
    main()
