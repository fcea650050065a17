"""Dumps: JSONL and parquet give the same arrays, a run folder is a dump, and every bad input is a sentence."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cppo
import synthetic
from cppo.dumps.dump import Dump, dump_observer, read_dump, verl_rows, write_dump
from cppo.engines.trl.batch import GROUP, REWARD, TOKENS
from cppo.errors import UserError

Row = dict[str, Any]
ARRAYS = (
    "cu_seqlens",
    "rollout_logp",
    "policy_logp",
    "mask",
    "sampled",
    "advantages",
    "divergence",
    "ids",
    "reward",
    "baseline",
)
MORE = ("group", "step", "update", "topk_ids", "topk_rollout_logp", "topk_policy_logp")


def rows(count: int = 6, seed: int = 0, K: int = 3) -> list[Row]:
    """Responses with every column, holes in the mask, and null where it is 0."""
    rng, made = np.random.default_rng(seed), []
    for at in range(count):
        T = int(rng.integers(4, 9))
        mask = (rng.random(T) < 0.8).astype(int)
        mask[0] = 1
        full = rng.dirichlet(np.ones(12), size=(2, T))
        top = np.argsort(-full[0], axis=1)[:, :K]
        ids = rng.integers(0, 12, T)
        mu, pi = np.log(full[0][np.arange(T), ids]), np.log(full[1][np.arange(T), ids])

        def held(values: Any, mask: Any = mask) -> list[Any]:
            return [value if inside else None for value, inside in zip(values.tolist(), mask, strict=True)]

        made.append(
            {
                "ids": ids.tolist(),
                "tokens": [f"t{i}" for i in ids],
                "rollout_logp": held(mu),
                "policy_logp": held(pi),
                "mask": mask.tolist(),
                "advantages": held(rng.normal(size=T)),
                "divergence": held(rng.random(T)),
                "divergence_name": "exact_tv",
                "topk_ids": held(top),
                "topk_rollout_logp": held(np.log(np.take_along_axis(full[0], top, 1))),
                "topk_policy_logp": held(np.log(np.take_along_axis(full[1], top, 1))),
                "reward": float(rng.random()),
                "group": at // 2,
                "step": 1,
                "update": at % 2,
                "prompt": f"p{at // 2}",
                "response": "x",
            }
        )
    return made


def small(**changes: Any) -> Row:
    """A short valid row, changed."""
    row = {"rollout_logp": [-1.0, -2.0, -0.5], "policy_logp": [-1.1, -1.9, -0.4], "advantage": 1.0}
    return {name: value for name, value in (row | changes).items() if value != "gone"}


def same(a: Dump, b: Dump) -> None:
    for name in (*ARRAYS, *MORE):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)
    assert (a.tokens, a.prompts, a.texts, a.divergence_name) == (b.tokens, b.prompts, b.texts, b.divergence_name)


def test_jsonl_and_parquet_give_the_same_and_what_was_written(tmp_path: Path) -> None:
    given = rows()
    lines, table = (read_dump(write_dump(tmp_path / f"d.{kind}", given)) for kind in ("jsonl", "parquet"))
    same(lines, table)
    assert lines.notes == table.notes == ()
    for name in ("rollout_logp", "policy_logp", "advantages", "divergence"):
        flat = [np.nan if x is None else x for row in given for x in row[name]]
        np.testing.assert_array_equal(getattr(lines, name), np.array(flat, dtype=np.float32))
    assert lines.mask.tolist() == [bool(x) for row in given for x in row["mask"]]
    assert lines.ids is not None and lines.ids.tolist() == [x for row in given for x in row["ids"]]
    top = [[np.nan] * 3 if x is None else x for row in given for x in row["topk_rollout_logp"]]
    np.testing.assert_array_equal(lines.topk_rollout_logp, np.array(top, dtype=np.float32))
    assert lines.group is not None and lines.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert lines.prompts == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_many_parquet_rows_come_in_batches(tmp_path: Path) -> None:
    given = rows(300)
    same(*(read_dump(write_dump(tmp_path / f"d.{kind}", given)) for kind in ("jsonl", "parquet")))


def test_arrays_tensors_and_floats_of_32_bits_survive(tmp_path: Path) -> None:
    mu = -torch.rand(5, generator=torch.Generator().manual_seed(0))
    row = {"rollout_logp": mu, "policy_logp": (mu * 1.1).numpy(), "advantage": np.float32(0.1), "ids": torch.arange(5)}
    for kind in ("jsonl", "parquet"):
        dump = read_dump(write_dump(tmp_path / f"d.{kind}", [row]))
        np.testing.assert_array_equal(dump.rollout_logp, mu.numpy())
        np.testing.assert_array_equal(dump.policy_logp, (mu * 1.1).numpy())
        assert dump.advantages is not None and (dump.advantages == np.float32(0.1)).all()


def test_a_folder_of_files_is_one_dump(tmp_path: Path) -> None:
    given = rows()
    write_dump(tmp_path / "a.jsonl", given[:2])
    write_dump(tmp_path / "b.jsonl", given[2:])
    same(read_dump(tmp_path), read_dump(write_dump(tmp_path / "sub" / "all.jsonl", given)))


@pytest.mark.parametrize("which", ["run", "file"])
def test_a_run_folder_and_its_samples(tmp_path: Path, which: str) -> None:
    run = synthetic.write_run(tmp_path / "run", steps=10, updates=2, evaluate=False)
    path = run if which == "run" else run / "samples" / "step-000010.jsonl"
    dump = read_dump(path)
    given = [json.loads(line) for line in (run / "samples" / "step-000010.jsonl").read_text().splitlines()]
    assert len(dump.lengths) == len(given) and dump.divergence_name == "binary_tv" and dump.excerpt
    flat = [x for row in given for x in row["policy_logp"] if x is not None]
    np.testing.assert_array_equal(dump.policy_logp[dump.mask], np.array(flat, dtype=np.float32))
    assert "samples of a run" in dump.notes[0]


def test_advantages_from_rewards(tmp_path: Path) -> None:
    given = [small(advantage="gone", reward=r, group=g) for r, g in ((1, "a"), (0, "a"), (1, "b"), (1, "b"))]
    dump = read_dump(write_dump(tmp_path / "d.jsonl", given))
    assert dump.advantages is not None and dump.advantages[::3].tolist() == [0.5, -0.5, 0, 0]
    assert "reward less the mean of its group" in dump.notes[0]
    assert read_dump(write_dump(tmp_path / "d.jsonl", [small(advantage="gone")])).advantages is None


def test_layouts_blocks_and_selection(tmp_path: Path) -> None:
    dump = read_dump(write_dump(tmp_path / "d.jsonl", rows(9)))
    packed, padded = dump.packed(dump.divergence), dump.padded(dump.divergence)
    for batch in (packed.check(), padded.check()):
        assert int(batch.loss_mask.sum()) == int(dump.mask.sum())
    torch.testing.assert_close(padded.policy_logp[padded.loss_mask], packed.policy_logp[packed.loss_mask])
    blocks = list(dump.blocks(10))
    assert len(blocks) > 2 and sum(len(block.lengths) for block in blocks) == 9
    for name in ("policy_logp", "topk_ids", "reward"):
        np.testing.assert_array_equal(np.concatenate([getattr(b, name) for b in blocks]), getattr(dump, name))
    odd = dump.select(np.arange(9) % 2 == 1)
    assert odd.prompts == ["p0", "p1", "p2", "p3"] and odd.cu_seqlens[-1] == len(odd.policy_logp) == odd.lengths.sum()
    expected = [t for row in rows(9) for t in np.cumsum(row["mask"]) - row["mask"]]
    assert dump.positions().tolist() == expected


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "missing": (small(policy_logp="gone"), "line 2, column policy_logp: missing"),
    "misspelt": (small(policy_logp="gone", policy_logps=[-1.0]), "Did you mean 'policy_logps'"),
    "unequal": (small(policy_logp=[-1.0, -2.0]), "column policy_logp: 2 entries, but rollout_logp has 3"),
    "mask length": (small(mask=[1, 1]), "column mask: 2 entries"),
    "tokens length": (small(tokens=["a"]), "column tokens: 1 entries"),
    "positive": (small(policy_logp=[-1.0, 0.5, -2.0]), "column policy_logp: positive"),
    "null": (small(rollout_logp=[-1.0, None, -1.0]), "column rollout_logp: null, NaN or infinite at a loss token"),
    "infinite": (small(rollout_logp=[-1.0, -math.inf, -1.0]), "first at token 2: -inf"),
    "text": (small(policy_logp=[-1.0, "-2", -1.0]), r"holds something else than numbers \(str\)"),
    "no list": (small(policy_logp=-1.0), "a float, expected a list"),
    "mask": (small(mask=[1, 2, 0]), "column mask: holds 2, expected 0 or 1"),
    "advantage": (small(advantage="high"), "column advantage: 'high', expected a number"),
    "no advantage": (small(advantage="gone"), "column advantage: null, NaN"),
    "negative divergence": (small(divergence=[0.1, -0.1, 0]), "column divergence: negative"),
    "tv above 1": (small(divergence=[1.5, 0.1, 0], divergence_name="exact_tv"), "column divergence: above 1"),
    "half ids": (small(ids=[1, 2, 3]), r"ids is in 1 of 2 rows \(such as .*d.jsonl, number 2\)"),
    "broken ids": (small(ids=[1, 2.5, 3]), "holds 2.5, expected token ids"),
    "step": (small(step=1.5), "column step: 1.5, expected an integer"),
    "reward": (small(reward=[1]), r"column reward: \[1\], expected a number"),
    "uneven K": (small(topk_ids=[[1, 2], [1], [1, 2]]), "1 numbers at token 2, elsewhere 2"),
    "flat K": (small(topk_ids=[1, 2, 3]), "a list of K numbers for each token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_sentences(tmp_path: Path, case: str) -> None:
    row, wanted = BAD[case]
    first = small(**{name: [0.1, 0.1, 0.1] for name in ("divergence",) if name in row})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (first, row)))
    with pytest.raises(UserError, match=wanted):
        read_dump(tmp_path / "d.jsonl")


@pytest.mark.parametrize("case", ["missing", "unequal", "positive", "null", "mask", "no advantage", "half ids"])
def test_bad_parquet_rows_say_the_row(tmp_path: Path, case: str) -> None:
    row, wanted = BAD[case]
    path = write_dump(tmp_path / "d.parquet", [small(), row])
    with pytest.raises(UserError, match=wanted.replace("line 2", "row 2").replace("jsonl", "parquet")):
        read_dump(path)


def test_bad_parquet_types(tmp_path: Path) -> None:
    for column, wanted in (
        (["a", "b", "c"], "holds string, expected numbers"),
        (-1.0, "of type double, expected a list"),
    ):
        with pytest.raises(UserError, match=f"row 1, column policy_logp: {wanted}"):
            read_dump(write_dump(tmp_path / "d.parquet", [small(policy_logp=column)]))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_dump(tmp_path / "cut.parquet")


def test_a_top_k_must_be_whole_and_sum_to_one(tmp_path: Path) -> None:
    def read(**changes: Any) -> Dump:
        return read_dump(write_dump(tmp_path / "d.jsonl", [rows(1)[0] | changes]))

    T = len(rows(1)[0]["ids"])
    with pytest.raises(UserError, match="the dump has no topk_policy_logp"):
        read(topk_policy_logp=None)
    with pytest.raises(UserError, match="topk_rollout_logp: probabilities that sum to more than 1"):
        read(topk_rollout_logp=[[-0.1, -0.1, -0.1]] * T)
    with pytest.raises(UserError, match="topk_policy_logp: null or NaN where mu's is a number"):
        read(topk_policy_logp=[[None, -2.0, -2.0]] * T)
    with pytest.raises(UserError, match="without any number"):
        read(topk_rollout_logp=[[None, None, None]] * T)
    with pytest.raises(UserError, match="hold no number at all"):
        read(topk_ids=[None] * T, topk_rollout_logp=[None] * T, topk_policy_logp=[None] * T)


def test_files_that_are_none(tmp_path: Path) -> None:
    def refused(text: str, content: str | None = None, name: str = "d.jsonl") -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=text):
            read_dump(tmp_path / name)

    refused("there is no file")
    refused("is empty: it holds no response", "")
    refused("is empty: .*It says: the last line .* is cut off", '{"rollout_logp": [-1')
    refused(r"of an unknown type \(.csv\)", "a,b", "d.csv")
    refused("line 1: not a JSON object", "[\n" + json.dumps(small()) + "\n]")
    refused("has no loss token", json.dumps(small(mask=[0, 0, 0])))
    refused("not the same in all rows", "".join(json.dumps(small(divergence_name=n)) + "\n" for n in "ab"))
    (tmp_path / "empty").mkdir()
    refused("holds neither .jsonl or .parquet files nor a run", name="empty")
    (tmp_path / "empty" / "config.yaml").write_text("{}")
    refused("the run .* has no samples", name="empty")
    with pytest.raises(UserError, match=r"has the suffix '.csv'"):
        write_dump(tmp_path / "d.csv", [small()])
    with pytest.raises(UserError, match="no rows"):
        write_dump(tmp_path / "d.jsonl", [])


def test_a_last_line_cut_off_is_said_and_the_rest_used(tmp_path: Path) -> None:
    line = json.dumps(small())
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n{line[:30]}")
    dump = read_dump(tmp_path / "d.jsonl")
    assert len(dump.lengths) == 2 and "last line" in dump.notes[0] and "line 4" in dump.notes[0]
    (tmp_path / "d.jsonl").write_text(f"{line}\n{line}")  # whole, without an end marker
    assert len(read_dump(tmp_path / "d.jsonl").lengths) == 2


def test_a_misspelt_optional_column_is_noted(tmp_path: Path) -> None:
    dump = read_dump(write_dump(tmp_path / "d.jsonl", [small(rewards=1.0, extra=3)]))
    assert dump.notes == ("the column 'rewards' is not read. Did you mean 'reward'?",)


def test_parquet_without_pyarrow_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dump(tmp_path / "d.parquet", [small()])
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_dump(path)
    with pytest.raises(UserError, match="pip install pyarrow"):
        write_dump(path, [small()])


# ------------------------------------------------------------------------------------------------------------ exporters


def test_observer_writes_what_it_saw(tmp_path: Path) -> None:
    rule, path = synthetic.rule(), tmp_path / "d.jsonl"
    observer, seen = dump_observer(path, rule, synthetic.CharTokenizer()), []
    for update in (0, 1, 0):  # two rollout batches
        batch, inputs = synthetic.minibatch(seed=len(seen))
        if update:  # a response that the zero-spread filter left out
            mask = batch.loss_mask.clone()
            mask[2] = False
            batch = cppo.TokenBatch(batch.policy_logp, batch.rollout_logp, batch.advantages, mask)
        verdict = rule(batch)
        observer(batch, verdict, inputs, update)
        seen.append((batch, verdict, inputs))
    dump = read_dump(path)
    assert len(dump.lengths) == 24 and dump.divergence_name == "binary_tv"
    assert dump.step is not None and dump.step[::8].tolist() == [1, 1, 2]
    assert dump.update is not None and dump.update[::8].tolist() == [0, 1, 0]
    for name in ("policy_logp", "rollout_logp"):
        flat = torch.cat([getattr(batch, name)[batch.loss_mask] for batch, _, _ in seen])
        np.testing.assert_array_equal(getattr(dump, name)[dump.mask], flat.numpy())
    scores = torch.cat([verdict.divergence[batch.loss_mask] for batch, verdict, _ in seen])
    assert dump.divergence is not None
    np.testing.assert_array_equal(dump.divergence[dump.mask], scores.numpy())
    np.testing.assert_array_equal(dump.reward, torch.cat([inputs[REWARD] for *_, inputs in seen]).numpy())
    tokens = torch.cat([inputs[TOKENS].sum(1) for *_, inputs in seen])
    assert np.bincount(dump.owner[dump.sampled]).tolist() == tokens.tolist()
    assert dump.loss_tokens[10] == 0 and dump.group is not None and len(np.unique(dump.group)) == 8
    assert dump.tokens is not None and dump.texts is not None and "".join(dump.tokens[0]) == dump.texts[0]
    assert GROUP in seen[0][2]


def test_observer_of_one_update_and_its_suffix(tmp_path: Path) -> None:
    batch, inputs = synthetic.minibatch()
    observer = dump_observer(tmp_path / "d.jsonl", cppo.make_rule("ppo_clip"), update=1)
    for update in (0, 1):
        observer(batch, cppo.make_rule("ppo_clip")(batch), inputs, update)
    dump = read_dump(tmp_path / "d.jsonl")
    assert dump.update is not None and set(dump.update.tolist()) == {1} and dump.divergence is None
    with pytest.raises(UserError, match=r"'.parquet', expected .jsonl"):
        dump_observer(tmp_path / "d.parquet", cppo.CPPO())


class DataProto:
    """verl's layout: tensors in `batch`, the rest in `non_tensor_batch`."""

    def __init__(self, batch: Row, other: Row) -> None:
        self.batch, self.non_tensor_batch = batch, other


@pytest.mark.parametrize("layout", ["padded", "nested"])
def test_verl_rows(tmp_path: Path, layout: str) -> None:
    lengths, g = (5, 3), torch.Generator().manual_seed(0)
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    mask[0, 2] = False  # tool output
    mu = -torch.rand(2, 5, generator=g)
    pi = mu * 1.2
    scores = torch.zeros(2, 5)
    scores[0, 4], scores[1, 2] = 1.0, 0.5
    padded = {
        "responses": torch.arange(10).view(2, 5),
        "response_mask": mask.long(),
        "rollout_log_probs": mu,
        "old_log_probs": mu.clone(),
        "advantages": torch.tensor([[1.0], [-1.0]]).expand(2, 5) * mask,
        "token_level_rewards": scores,
    }
    if layout == "nested":
        cut = {k: [row[:n] for row, n in zip(v, lengths, strict=True)] for k, v in padded.items()}
        tensors: Row = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in cut.items()}
        policy = torch.nested.as_nested_tensor(
            [row[:n] for row, n in zip(pi, lengths, strict=True)], layout=torch.jagged
        )
    else:
        tensors, policy = padded, pi
    uid = {"uid": np.array(["a", "b"], dtype=object)}
    batch = DataProto(tensors, uid)
    with pytest.raises(UserError, match=r"old_log_probs are the sampler's own \(bypass mode\)"):
        verl_rows(batch)
    found = verl_rows(batch, policy, step=3, update=1)
    dump = read_dump(write_dump(tmp_path / "d.jsonl", found))
    assert dump.lengths.tolist() == [5, 3] and dump.mask.tolist() == mask[0].tolist() + mask[1, :3].tolist()
    np.testing.assert_array_equal(dump.policy_logp, torch.cat([pi[0], pi[1, :3]]).numpy())
    assert dump.reward is not None and dump.reward.tolist() == [1.0, 0.5]
    assert dump.ids is not None and dump.ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert dump.step is not None and dump.step.tolist() == [3, 3] and [row["group"] for row in found] == ["a", "b"]
    recomputed = verl_rows({**tensors, **uid, "old_log_probs": policy})
    assert [row["policy_logp"] for row in recomputed] == [row["policy_logp"] for row in found]
    for name, wanted in (("rollout_log_probs", "calculate_log_probs=True"), ("response_mask", "no response_mask")):
        with pytest.raises(UserError, match=wanted):
            verl_rows({key: value for key, value in tensors.items() if key != name})
