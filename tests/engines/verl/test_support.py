"""The support code itself: what a test harness gets wrong, its tests cannot see."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl.trainer", reason="verl is not installed: make setup-verl")

import psutil
import torch
import trainer_runs
from cppo_cpu.decoding import Request, decode, score_prompt
from transformers import AutoModelForCausalLM

STOP = frozenset([1])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def request(seed: str, prompt: list[int] | None = None, **changes: Any) -> Request:
    settings = {"max_tokens": 12, "temperature": 1.0, "stop": STOP} | changes
    return Request(prompt=prompt or [5, 6, 7], seed=seed, **settings)


def test_what_is_sampled_is_what_is_scored(model: Any) -> None:
    """Log-probabilities and top K are those of one plain forward over prompt and response, at the temperature."""
    requests = [request(f"{i}", [5] * (1 + 3 * i), temperature=0.5 + 0.5 * i) for i in range(4)]
    asyncio.run(decode(model, requests, top_k=7))
    for one in requests:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.prompt + one.tokens])).logits[0, len(one.prompt) - 1 : -1]
        logp = torch.log_softmax(logits / one.temperature, -1)
        index = torch.tensor(one.tokens)[:, None]
        torch.testing.assert_close(torch.tensor(one.logp), logp.gather(-1, index)[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(one.top_logp), logp.topk(7).values, atol=1e-5, rtol=0)
        assert one.top_ids == logp.topk(7).indices.tolist()
        assert one.stop_reason == "completed" and (one.tokens[-1] in STOP or len(one.tokens) == 12)


def test_samples_follow_the_distribution(model: Any) -> None:
    """First tokens of many requests against the model's probabilities (chi-squared, far above its 99.99% quantile)."""
    count = 2000
    requests = [request(f"{i}", max_tokens=1) for i in range(count)]
    asyncio.run(decode(model, requests, top_k=0))
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1)
    seen = torch.bincount(torch.tensor([one.tokens[0] for one in requests]), minlength=len(p)).double()
    often = p * count >= 5
    expected = torch.cat([p[often], p[~often].sum()[None]]) * count
    found = torch.cat([seen[often], seen[~often].sum()[None]])
    freedom = len(expected) - 1
    assert float(((found - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def test_samples_do_not_depend_on_the_batch(model: Any) -> None:
    alone, together = request("a"), [request("b", [9] * 20), request("a")]
    asyncio.run(decode(model, [alone], top_k=0))
    asyncio.run(decode(model, together, top_k=0))
    assert alone.tokens == together[1].tokens != together[0].tokens


def test_interruption(model: Any) -> None:
    soon, later = request("a", interrupt_after=2), request("a")
    asyncio.run(decode(model, [soon, later], top_k=3))
    assert (soon.stop_reason, soon.tokens) == ("aborted", later.tokens[:2])
    assert len(soon.logp) == len(soon.top_ids) == 2
    stopped = request("a")
    asyncio.run(decode(model, [stopped], top_k=0, aborted=lambda: len(stopped.tokens) >= 3))
    assert (stopped.stop_reason, stopped.tokens) == ("aborted", later.tokens[:3])


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"temperature": 0.0}])
def test_impossible_requests_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|samples"):
        request("a", **changes)


def test_scored_prompt_is_verls_contract(model: Any) -> None:
    """Row t belongs to token t + 1; the last row is a dummy (verl's `extract_prompt_logprobs`)."""
    ids, logp = score_prompt(model, [5, 6, 7, 8], 4)
    assert [len(ids), len(logp), len(ids[0]), ids[-1], logp[-1]] == [4, 4, 4, [0] * 4, [0.0] * 4]
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0], -1)
    assert ids[1] == expected[1].topk(4).indices.tolist()
    sampled, own = score_prompt(model, [5, 6, 7, 8], 0)
    assert sampled[:3] == [[6], [7], [8]] and own[0][0] == pytest.approx(float(expected[0, 6]), abs=1e-5)


def test_a_server_that_aborts_holds_new_requests(tiny_model: Path) -> None:
    """A request of before the abort comes back short; one that arrives after it waits until generation resumes."""
    from cppo_cpu.rollout import Server

    async def scene() -> None:
        server = Server.__ray_metadata__.modified_class(str(tiny_model), "s", 400, {"cppo_top_k": 2})
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
        server.stop = frozenset()
        first = asyncio.create_task(server.generate("a", [5, 6, 7], settings))
        await asyncio.sleep(0.2)
        await server.abort_all_requests()
        short = await first
        assert short.stop_reason == "aborted" and 0 < len(short.token_ids) < 397
        assert len(short.extra_fields["mu_topk_ids"]) == len(short.token_ids)
        held = asyncio.create_task(server.generate("b", [5, 6, 7], {**settings, "max_tokens": 3}))
        await asyncio.sleep(0.2)
        assert not held.done()
        weights = {name: tensor + 1 for name, tensor in server.model.state_dict().items()}
        await server.load(weights, 7)
        await server.resume_generation()
        answer = await held
        assert (len(answer.token_ids), answer.extra_fields["global_steps"]) == (3, 7)
        with pytest.raises(ValueError, match="top_p"):
            await server.generate("c", [5], {**settings, "top_p": 0.9})
        with pytest.raises(RuntimeError, match="do not fit"):
            await server.load({"model.norm.weight": torch.zeros(64)}, 8)

    asyncio.run(scene())


# -- processes ---------------------------------------------------------------------------------------------------------

#: Starts two processes in sessions of their own, as Ray's daemons are, one without the environment; and waits.
DAEMONS = """
import os, subprocess, time
subprocess.Popen(["sleep", "300"], start_new_session=True)
log = open(os.environ["RAY_TMPDIR"] + "/agent.log", "w")
subprocess.Popen(["sleep", "301"], start_new_session=True, env={"PATH": os.environ["PATH"]}, stdout=log)
time.sleep(300)
"""


def test_a_run_that_takes_too_long_leaves_nothing(tmp_path: Path) -> None:
    folder, most = tmp_path / "ray", 0
    folder.mkdir()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.2):
            most = max(most, len(trainer_runs.users(str(folder))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with (tmp_path / "log.txt").open("w") as log:
            env = {**os.environ, "RAY_TMPDIR": str(folder)}
            assert trainer_runs.run_group([sys.executable, "-c", DAEMONS], env, log, timeout=6) is None
    finally:
        ended.set()
        watcher.join()
    assert most == 3
    assert not trainer_runs.users(str(folder))


def test_a_failed_rollout_ends_the_run(tmp_path: Path) -> None:
    """verl only logs it, and tries again for ever."""
    env = {**os.environ, "RAY_TMPDIR": str(tmp_path / "ray")}
    program = f"print({trainer_runs.FATAL!r}, flush=True); import time; time.sleep(300)"
    with (tmp_path / "log.txt").open("w") as log:
        assert trainer_runs.run_group([sys.executable, "-c", program], env, log, timeout=60) == -1


@pytest.mark.e2e
def test_forks(forks: trainer_runs.Forks, tmp_path: Path) -> None:
    """A fork is ``python <file> <arguments>`` with the caller's environment, folder and streams, and dies with it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print(__name__, sys.argv[1:], os.environ['WORD'], os.getcwd(), 'verl' in sys.modules)\n"
        "sys.stderr.write('err')\n"
        "time.sleep(float(sys.argv[1]))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    env = {"WORD": "w", "CPPO_FORKS": str(forks.socket), "PATH": os.environ["PATH"]}
    command = [*forks.python, str(script)]
    done = subprocess.run([*command, "0", "3"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr == "err"
    assert done.stdout == f"__main__ ['0', '3'] w {tmp_path} True\n"
    caller = subprocess.Popen([*command, "300", "0"], env=env, cwd=tmp_path, stdout=subprocess.PIPE)
    assert caller.stdout is not None

    def forked() -> int:
        return len(psutil.Process(forks.process.pid).children(recursive=True))

    until = time.monotonic() + 20
    while forked() < 2 and time.monotonic() < until:  # the supervisor and the fork
        time.sleep(0.05)
    assert forked() >= 2
    caller.kill()
    caller.wait()
    while forked() and time.monotonic() < until:
        time.sleep(0.05)
    assert forked() == 0
