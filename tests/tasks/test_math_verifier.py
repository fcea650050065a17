"""math-verify behind its process: right answers, and everything that a model might write."""

import os
import signal
import time

import pytest

from cppo.tasks.math_verifier import TAIL, MathVerifier


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(time_limit=2.0) as verifier:
        yield verifier


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        (r"so \boxed{34}", "34", 1.0),
        (r"so \boxed{35}", "34", 0.0),
        (r"\boxed{33}", "033", 1.0),
        (r"\boxed{033}", "33", 1.0),
        (r"\boxed{\frac12}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\dfrac{1}{2}}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("Step 1: 12.\nAnswer: 34", "34", 1.0),
        ("Answer: $34$", "34", 1.0),
        (r"first \boxed{34}, no: \boxed{35}", "34", 0.0),
        ("no number at all", "34", 0.0),
        ("", "34", 0.0),
    ],
)
def test_answers(verifier, completion, answer, reward):
    assert verifier.score(completion, answer) == reward


NASTY = {
    "a megabyte": "x" * 1_000_000,
    "a megabyte of digits": "7" * 1_000_000,
    "a megabyte of open boxes": r"\boxed{" * 140_000,
    "a tower of powers": r"\boxed{9**9**9**9}",
    "NUL": "\x00\x00 \\boxed{\x00}",
    "surrogates": "\ud800\udfff \\boxed{\ud800}",
    "open braces": "\\boxed{" + "{" * 3_000,
    "deep fractions": "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 201,
    "deep roots": "$" + "\\sqrt{" * 500 + "2" + "}" * 500 + "$",
    "parentheses": "\\boxed{" + "(" * 1_500 + "1" + ")" * 1_500 + "}",
    "code": r"\boxed{__import__('os').system('exit')}",
    "a format string": r"\boxed{{}{0}%s%n}",
}


@pytest.fixture(scope="module")
def hasty():
    """Some of what follows takes any time: a short limit is waited for."""
    with MathVerifier(time_limit=0.3) as verifier:
        yield verifier


@pytest.mark.parametrize("name", NASTY)
def test_nothing_that_a_model_writes_raises(hasty, name):
    started = time.monotonic()
    assert hasty.score(NASTY[name], "34") == 0.0
    assert time.monotonic() - started < 30


def test_nested_braces_and_surroundings_do_not_hide_a_right_answer(verifier):
    assert verifier.score("\ud800\x00" + "{" * 50 + r" so \boxed{\frac{{1}}{{2}}}", "1/2") == 1.0


def test_only_the_end_is_read(verifier):
    assert verifier.score("7" * 1_000_000 + r" and so \boxed{34}", "34") == 1.0
    assert verifier.score(r"\boxed{34}" + " no" * TAIL, "34") == 0.0


@pytest.mark.parametrize("completion", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1000000000!}"])
def test_real_inputs_that_hang_math_verify_are_timeouts(completion):
    with MathVerifier(time_limit=1.0) as verifier:
        assert verifier.score(r"\boxed{34}", "34") == 1.0
        started = time.monotonic()
        assert verifier.score(completion, "34") == 0.0
        assert time.monotonic() - started < 30
        assert verifier.timeouts == 1
        assert verifier.score(r"\boxed{34}", "34") == 1.0


def test_a_killed_verifier_recovers():
    with MathVerifier() as verifier:
        assert verifier.score(r"\boxed{1}", "1") == 1.0
        os.kill(verifier.pool.workers[-1].pid, signal.SIGKILL)
        assert verifier.score(r"\boxed{2}", "2") == 1.0
        assert (verifier.timeouts, verifier.crashes) == (0, 1)


def test_many_at_once_keep_their_order(verifier):
    pairs = [(rf"\boxed{{{i}}}", str(i - i % 2)) for i in range(40)]
    assert verifier.score_many(pairs) == [float(i % 2 == 0) for i in range(40)]


@pytest.mark.parametrize("options, sentence", [({"time_limit": 0}, "time_limit=0"), ({"workers": 0}, "workers=0")])
def test_bad_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MathVerifier(**options)
