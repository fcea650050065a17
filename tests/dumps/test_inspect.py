"""`inspect_dump` equals direct computations: rules on a `TokenBatch`, loops over positions, and `certificate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cppo
import synthetic
from cppo import divergence
from cppo.cli import inspect as cli_inspect
from cppo.dumps.dump import Dump, dump_observer, read_dump, write_dump
from cppo.dumps.figures import write_figures
from cppo.dumps.inspect import inspect_dump, judge
from cppo.dumps.scores import Scores
from cppo.engines.trl.batch import GROUP
from cppo.errors import UserError
from cppo.runs.certificates import certificate_row
from cppo.theory import certificate
from cppo.training.recorder import _Call
from dumps.test_dump import rows, small
from engines.trl import trl_setup
from said import said

TIGHT: dict[str, dict[str, Any]] = {
    "cppo": {"delta": 0.15, "delta_b": 0.05},
    "dppo": {"delta": 0.3},
    "trm_max": {"delta": 1.0},
    "trm_avg": {"delta": 0.4},
    "trm_max_avg": {"delta": 1.2, "delta_avg": 0.4},
}
OPTIONAL = ("divergence", "divergence_name", "topk_ids", "topk_rollout_logp", "topk_policy_logp")


def dump_of(folder: Path, count: int = 40, without: tuple[str, ...] = (), **changes: Any) -> Dump:
    made = [{k: v for k, v in (row | changes).items() if k not in without} for row in rows(count)]
    return read_dump(write_dump(folder / "d.jsonl", made))


def direct(dump: Dump, name: str) -> torch.Tensor:
    """A divergence of the padded dump by `cppo.divergence`, loss tokens in order."""
    batch = dump.padded()
    if name == "exact_tv":
        return dump.padded(dump.divergence).divergence[batch.loss_mask]
    if name.startswith("binary"):
        return getattr(divergence, name)(batch.policy_logp, batch.rollout_logp)[batch.loss_mask]
    ids, top, pi, mu = (
        torch.from_numpy(getattr(dump, n)[dump.mask])
        for n in ("ids", "topk_ids", "topk_policy_logp", "topk_rollout_logp")
    )
    inside = (top == ids[:, None]).any(1)
    return getattr(divergence, name)(
        pi, mu, batch.policy_logp[batch.loss_mask], batch.rollout_logp[batch.loss_mask], inside
    )


@pytest.mark.parametrize("name", cppo.RULES)
@pytest.mark.parametrize(
    "source", [("exact_tv", "topk_kl", ()), ("topk_tv", "topk_kl", OPTIONAL[:2]), ("binary_tv", "binary_kl", OPTIONAL)]
)
def test_every_rule_equals_the_rule_on_the_padded_batch(tmp_path: Path, name: str, source: Any) -> None:
    tv, kl, without = source
    dump = dump_of(tmp_path, without=without)
    rule = cppo.make_rule(name, **TIGHT.get(name, {}))
    found = inspect_dump(dump, [rule], "all")["rules"][name]
    asked = None if rule.divergence is None else kl if rule.divergence.endswith("_kl") else tv
    assert found["divergence"] == asked
    batch = dump.padded()
    if asked is not None:
        scored = torch.zeros_like(batch.policy_logp)
        scored[batch.loss_mask] = direct(dump, asked)
        batch = batch.with_divergence(scored)
    verdict, inside = rule(batch), batch.loss_mask
    stats = cppo.metrics(batch, verdict)
    assert found["masked"] == pytest.approx(stats["trust/masked_fraction"])
    assert found["kept"] == pytest.approx(1 - stats["trust/masked_fraction"])
    for reason, share in found["reasons"].items():
        assert share == pytest.approx(stats[f"trust/{reason}_fraction"])
    hit = ((verdict.coefficient == 0) & inside).any(1).double().mean()
    assert found["responses_with_masked"] == pytest.approx(float(hit))
    if name in TIGHT:
        assert 0 < found["masked"] < 1  # both branches are seen


def test_disagreement_is_counted_token_by_token(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, without=OPTIONAL)
    judges = [cppo.make_rule(name, **TIGHT.get(name, {})) for name in cppo.RULES]
    table = inspect_dump(dump, judges, "all")["disagreement"]
    assert table["rules"] == list(cppo.RULES)
    dropped = {}
    for rule in judges:
        batch = dump.padded(dump_rows(dump, rule))
        dropped[rule.name] = (rule(batch).coefficient == 0)[batch.loss_mask].tolist()
    for i, a in enumerate(table["rules"]):
        for j, b in enumerate(table["rules"]):
            pairs = list(zip(dropped[a], dropped[b], strict=True))
            assert table["share"][i][j] == sum(x != y for x, y in pairs) / len(pairs)


def dump_rows(dump: Dump, rule: cppo.TrustRegion) -> Any:
    """D_t ``[N]`` that the rule asks for, of the sampled token."""
    if rule.divergence is None:
        return None
    out = np.zeros(len(dump.mask), dtype=np.float32)
    out[dump.mask] = direct(dump, "binary_kl" if rule.divergence.endswith("_kl") else "binary_tv").numpy()
    return out


def test_positions_and_tail_by_a_loop(tmp_path: Path) -> None:
    dump = dump_of(tmp_path)
    D = inspect_dump(dump, [], "all")["divergence"]
    assert D["name"] == "exact_tv" and D["by_position"]["width"] == 1
    at: dict[int, list[float]] = {}
    for row in rows(40):
        values = [d for d, inside in zip(row["divergence"], row["mask"], strict=True) if inside]
        for t, value in enumerate(values):
            at.setdefault(t, []).append(value)
    assert D["by_position"]["count"] == [len(at[t]) for t in range(len(at))]
    for t, values in at.items():
        tail = sorted(values, reverse=True)[: math.ceil(len(values) / 10)]
        assert D["by_position"]["mean"][t] == pytest.approx(np.mean(values), rel=1e-5)
        assert D["by_position"]["tail_mean"][t] == pytest.approx(np.mean(tail), rel=1e-5)
    everything = np.concatenate(list(at.values()))
    assert D["mean"] == pytest.approx(everything.mean(), rel=1e-5) and D["max"] == pytest.approx(
        everything.max(), rel=1e-5
    )
    assert D["p90"] == pytest.approx(np.quantile(everything, 0.9), rel=1e-4)


@pytest.mark.parametrize("weights", ["linear", "none", "shuffled"])
def test_budget_by_the_papers_recursion(tmp_path: Path, weights: str) -> None:
    dump = dump_of(tmp_path)
    rule = cppo.CPPO(delta=0.3, delta_b=0.2, w_min=0.5, weights=weights)
    found = inspect_dump(dump, [rule], "all")["budget"]
    judged = judge(rule, dump, np.where(dump.mask, dump.divergence, np.float32(0)))
    w_all = np.zeros(len(dump.mask))
    w_all[dump.mask] = rule.position_weights(dump.packed(dump.divergence))[0].numpy()[dump.mask]
    shares, ends, budgets = [], [], []
    for low, high in zip(dump.cu_seqlens[:-1], dump.cu_seqlens[1:], strict=True):
        inside = dump.mask[low:high]
        D, w = dump.divergence[low:high][inside].astype(float), w_all[low:high][inside]  # type: ignore[index]
        if weights == "linear" and len(w) > 1:
            np.testing.assert_allclose(w, 1 - 0.5 * np.arange(len(w)) / (len(w) - 1), rtol=1e-5)
        budgets.append(min(0.4, max(0.2, np.quantile(D, 0.9))))
        S = W = 0.0
        for d, weight in zip(D, w, strict=True):
            S += weight * d
            shares.append(S / (0.3 + budgets[-1] * W))
            W += weight
        ends.append(shares[-1])
    np.testing.assert_allclose(judged.share, shares, rtol=1e-4)
    np.testing.assert_allclose(judged.budget_used, ends, rtol=1e-4)  # the verdict's own
    np.testing.assert_allclose(judged.delta_b, budgets, rtol=1e-5)
    assert found["overdrawn"] == np.mean(np.array(ends) > 1) and found["delta_b"]["mean"] == pytest.approx(
        np.mean(budgets)
    )
    assert found["at_minimum"] == np.mean(np.isclose(budgets, 0.2)) and found["at_maximum"] == np.mean(
        np.isclose(budgets, 0.4)
    )
    assert sum(found["share_by_position"]["count"]) == len(shares)


def test_padding_holes_order_and_files_change_nothing(tmp_path: Path) -> None:
    given = rows(30)
    wanted = inspect_dump(read_dump(write_dump(tmp_path / "a.jsonl", given)), update="all")

    def padded(row: dict[str, Any]) -> dict[str, Any]:
        """Two columns of padding in front, one hole, three behind."""
        T = len(row["mask"])
        fill = {"mask": 0, "ids": 5, "tokens": "pad"}

        def wide(name: str, values: Any) -> Any:
            if not isinstance(values, list) or len(values) != T:
                return values
            x = fill.get(name)
            return [x, x, *values[:2], x, *values[2:], x, x, x]

        return {name: wide(name, values) for name, values in row.items()}

    moved = inspect_dump(read_dump(write_dump(tmp_path / "b.parquet", map(padded, given))), update="all")
    wanted["dump"].pop("path"), moved["dump"].pop("path")
    assert moved["dump"].pop("other_tokens") == wanted["dump"].pop("other_tokens") + 30 * 6
    assert moved == wanted


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = dump_of(tmp_path)
    whole = inspect_dump(dump)
    blocks = Dump.blocks
    monkeypatch.setattr(Dump, "blocks", lambda self, most=0: blocks(self, 20))
    assert inspect_dump(dump) == whole


def test_updates_and_the_mismatch_floor(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, 10, without=OPTIONAL)  # updates 0 and 1 by turns
    last, every, first = (inspect_dump(dump, update=which) for which in ("last", "all", 0))
    assert (last["dump"]["responses"], every["dump"]["responses"], first["dump"]["responses"]) == (5, 10, 5)
    assert last["dump"]["at_other_updates"] == 5 and last["dump"]["update"] == 1
    assert last["mismatch"] == every["mismatch"]
    start = dump.select(dump.update == 0)  # type: ignore[arg-type]
    gap = np.abs(start.policy_logp - start.rollout_logp)[start.mask].mean()
    assert (
        last["mismatch"]["abs_log_ratio"] == pytest.approx(gap, rel=1e-5) and "update 0" in last["mismatch"]["source"]
    )
    assert last["mismatch"]["divergence"] == pytest.approx(first["divergence"]["mean"])
    plain = inspect_dump(dump_of(tmp_path, 10, without=(*OPTIONAL, "update")))
    assert plain["mismatch"]["divergence"] == plain["divergence"]["p50"] and "median" in plain["mismatch"]["source"]
    for update, wanted in ((7, r"has the updates \[0, 1\], not 7"),):
        with pytest.raises(UserError, match=wanted):
            inspect_dump(dump, update=update)
    with pytest.raises(UserError, match="does not say at which update"):
        inspect_dump(dump_of(tmp_path, 4, without=("update",)), update=1)
    with pytest.raises(UserError, match="a rule is given twice"):
        inspect_dump(dump, [cppo.CPPO(), cppo.CPPO(delta=0.1)])


@pytest.mark.parametrize("kind", ["exact_tv", "topk_tv_upper", "binary_tv"])
def test_certificate_is_that_of_the_theory(tmp_path: Path, kind: str) -> None:
    without = {"exact_tv": (), "topk_tv_upper": OPTIONAL[:2], "binary_tv": OPTIONAL}[kind]
    dump = dump_of(tmp_path, 24, without=(*without, "update"))
    found = inspect_dump(dump)["certificate"]
    assert (found["divergence"], found["certified"], found["unit"]) == (kind, kind != "binary_tv", "reward")
    R, group = dump.reward, dump.group
    assert R is not None and group is not None
    baseline = [np.mean([R[j] for j in range(24) if group[j] == group[i] and j != i]) for i in range(24)]
    D = np.zeros(len(dump.mask))
    D[dump.mask] = direct(dump, kind).double().numpy()
    batch = dump.padded()
    gap = (batch.policy_logp - batch.rollout_logp).numpy()
    wanted = certificate(dump.rows(D), gap, batch.loss_mask.numpy(), R - baseline, xi=0.5, groups=group).figures()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_certificate_of_advantages_and_of_none(tmp_path: Path) -> None:
    made = [
        row | {"advantages": None, "advantage": float(at % 2) - 0.5, "reward": None} for at, row in enumerate(rows(8))
    ]
    dump = read_dump(write_dump(tmp_path / "d.jsonl", made))
    found = inspect_dump(dump, update="all")
    assert found["certificate"]["unit"] == "advantage" and found["certificate"]["of"] == "step 1, update 1"
    bare = read_dump(write_dump(tmp_path / "d.jsonl", [small(), small()]))
    found = inspect_dump(bare)
    assert found["certificate"] is None and "no certificate" in found["notes"][0]
    scored = read_dump(write_dump(tmp_path / "d.jsonl", [small(reward=1.0), small(reward=0.0)]))
    assert inspect_dump(scored)["certificate"]["groups"] == 2


def test_rewards_that_are_missing_where_they_are_asked_for(tmp_path: Path) -> None:
    given = [row | {"reward": row["reward"] if row["update"] == 0 else None} for row in rows(8)]
    found = inspect_dump(read_dump(write_dump(tmp_path / "d.jsonl", given)))
    assert found["dump"]["reward"] is None and found["certificate"] is None
    assert "no certificate: no response has a reward." in found["notes"]


def test_large_certificates_take_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = dump_of(tmp_path, 20, without=("update",))
    monkeypatch.setattr("cppo.dumps.scores.LARGEST_CERTIFICATE", 7 * int(dump.lengths.max()))
    found = inspect_dump(dump)
    assert found["certificate"]["responses"] == 6 and any("6 of 20 responses" in note for note in found["notes"])


def test_without_advantages_divergence_is_shown_all_the_same(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, 6, without=("advantages", "group", "prompt"))
    found = inspect_dump(dump)
    assert found["rules"] == {} and found["budget"] is None and found["divergence"]["name"] == "exact_tv"
    assert any("left out" in note for note in found["notes"])
    cli_inspect.tables(found)
    assert len(write_figures(found, tmp_path / "out")) == 2


def test_names_of_divergences(tmp_path: Path) -> None:
    kl = Scores(dump_of(tmp_path, divergence_name="topk_kl"))
    assert kl.main()[0] == kl.of("kl")[0] == "topk_kl" and kl.of("tv")[0] == "topk_tv"
    np.testing.assert_array_equal(kl.of("kl")[1][kl.dump.mask], kl.dump.divergence[kl.dump.mask])  # type: ignore[index]
    unnamed = dump_of(tmp_path, without=("divergence_name", *OPTIONAL[2:]))
    found = inspect_dump(unnamed)
    assert (
        found["divergence"]["name"] == "divergence of the dump"
        and found["rules"]["trm_max"]["divergence"] == "binary_kl"
    )
    assert any("does not say which divergence" in note for note in found["notes"])


def test_unused_slots_of_the_top_k_have_no_mass(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, without=OPTIONAL[:2])
    wider = [
        row
        | {
            name: [None if x is None else [*x, 3 if name == "topk_ids" else None] for x in row[name]]
            for name in ("topk_ids", "topk_rollout_logp", "topk_policy_logp")
        }
        for row in rows(40)
    ]
    for row in wider:
        row.pop("divergence"), row.pop("divergence_name")
    other = read_dump(write_dump(tmp_path / "e.jsonl", wider))
    for kind in ("tv", "kl"):
        np.testing.assert_allclose(Scores(other).of(kind)[1], Scores(dump).of(kind)[1], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- from real runs


def test_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic.write_run(tmp_path / "run", steps=10, updates=2, evaluate=False)
    cli_inspect.inspect(run, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["name"] == "binary_tv" and found["certificate"] is None
    assert any("cppo bound --run" in note for note in found["notes"])
    lines = (run / "samples" / "step-000010.jsonl").read_text().splitlines()
    codes = [reason for line in lines for reason in json.loads(line)["reason"] if reason != "outside"]
    # the run's rule is CPPO with its default parameters: the recorder has written the same reasons
    for name, share in found["rules"]["cppo"]["reasons"].items():
        assert share == pytest.approx(codes.count(name) / len(codes)), name


@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv"])
def test_a_dump_from_trl(tmp_path: Path, kind: str) -> None:
    rule, path = trl_setup.make("cppo", kind), tmp_path / "d.jsonl"
    verdicts = []
    observer = dump_observer(path, rule, trl_setup.tokenizer())

    def both(batch: Any, verdict: Any, inputs: Any, update: int) -> None:
        verdicts.append((batch, verdict))
        observer(batch, verdict, inputs, update)

    run = trl_setup.trainer(rule, observer=both)
    inputs, _ = trl_setup.rollout_and_drift(run)
    run._compute_loss(run.model, inputs)
    dump = read_dump(path)
    found = inspect_dump(dump, [rule])
    (batch, verdict), shares = verdicts[0], found["rules"]["cppo"]
    stats = cppo.metrics(batch, verdict)
    assert shares["masked"] == pytest.approx(stats["trust/masked_fraction"]) and shares["masked"] > 0
    for reason, share in shares["reasons"].items():
        assert share == pytest.approx(stats[f"trust/{reason}_fraction"])
    assert found["budget"]["budget_used"]["mean"] == pytest.approx(stats["trust/budget_used"], rel=1e-4)
    assert (found["divergence"]["name"], shares["divergence"]) == (kind, kind)
    assert dump.tokens is not None and dump.group is not None and found["certificate"]["unit"] == "reward"
    assert found["certificate"]["responses"] == batch.loss_mask.shape[0]
    assert found["certificate"]["groups"] == len(set(inputs[GROUP].tolist()))
    row = certificate_row([_Call(batch, verdict, inputs).responses()], kind)  # what the recorder writes
    assert row is not None
    for name in ("surrogate", "ratios", "pathwise", "product", "prop4"):  # intervals: groups are drawn in another order
        assert found["certificate"][name] == pytest.approx(row[name], rel=1e-4), name


# ------------------------------------------------------------------------------------------------------- command, files


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    write_dump(tmp_path / "d.parquet", rows(30))
    text = said(cli_inspect.inspect, tmp_path / "d.parquet", out=tmp_path / "out")
    for wanted in (
        "exact_tv",
        "topk_kl",
        "mismatch floor",
        "prefix budget",
        "Certificate",
        "trm_max_avg",
        "Written to",
    ):
        assert wanted in text
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        ["inspect.json", *(f"{n}.{s}" for n in ("budget", "disagreement", "divergence") for s in ("png", "svg"))]
    )
    assert (tmp_path / "out" / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "budget.svg").read_text()
    before = (tmp_path / "out" / "divergence.svg").read_bytes()
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    write_figures(report, tmp_path / "out")
    assert (tmp_path / "out" / "divergence.svg").read_bytes() == before  # the same figures from the JSON


def test_rules_and_settings() -> None:
    (rule,) = cli_inspect.chosen_rules(["cppo"], ["cppo.delta=0.1", "cppo.budget=fixed", "cppo.gate=none"])
    assert rule == cppo.CPPO(delta=0.1, budget="fixed")
    assert [rule.name for rule in cli_inspect.chosen_rules([], [])] == list(cppo.RULES)
    for names, settings, wanted in (
        (["cpo"], [], "there is no rule 'cpo'"),
        (["cppo"], ["delta=0.1"], "expected RULE.PARAMETER=VALUE"),
        (["cppo"], ["dppo.delta=0.1"], "the rule dppo is not shown; add --rule dppo"),
        (["cppo"], ["cppo.dleta=0.1"], "Did you mean 'delta'"),
        (["cppo"], ["cppo.delta=-1"], "expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            cli_inspect.chosen_rules(names, settings)
    with pytest.raises(UserError, match="--update is 'first'"):
        cli_inspect.inspect(Path("d.jsonl"), update="first")
