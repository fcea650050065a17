"""The arithmetic task: right answers, an honest chance level, a split without overlap, the same in every process."""

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from cppo.tasks import Task, make_task
from cppo.tasks.arithmetic_families import COMMON

EXAMPLES = {  # prompt -> answer, worked out by hand
    "chain-3": ("3+8-2+5=", "1,9,4#194"),
    "chain-6": ("3+8-2+5-1+6-4=", "1,9,4,3,9,5#935"),
    "add-3": ("471+982=", "3,5,4,1#1453"),
}


@pytest.mark.parametrize("family", EXAMPLES)
def test_scratchpad_by_hand(family):
    prompt, response = EXAMPLES[family]
    solver = make_task("arithmetic", families=[family]).families[family]
    written, answer = solver.solve(prompt, lambda fact, right: right)
    assert ",".join(written) + "#" + answer == response


@pytest.mark.parametrize("family", COMMON)
def test_answers_agree_with_python_arithmetic(family):
    task = make_task("arithmetic", families=[family])
    for example in task.train(100, seed=5):
        expression = example.prompt.removesuffix("=")
        value = sum(int(term) for term in expression.replace("-", "+-").split("+"))
        if family.startswith("add"):
            assert example.answer == str(value)
        else:
            assert len(example.answer) == 3 and example.answer[-1] == str(value % 10)


@pytest.mark.parametrize("family", COMMON)
def test_a_perfect_demonstration_scores_one_and_fits(family):
    task = make_task("arithmetic", families=family, ignorance=0)
    rng = random.Random(0)
    responses = [(example, task.demonstration(example, rng)) for example in task.train(200, seed=1)]
    assert [task.score(example, response) for example, response in responses] == [1.0] * 200
    assert max(len(response) for _, response in responses) + 1 <= task.max_response_tokens
    assert {c for example, response in responses for c in example.prompt + response} <= set(task.alphabet)


def test_a_family_with_responses_of_more_than_200_tokens_exists():
    task = make_task("arithmetic", families=["chain-120"], ignorance=0)
    assert all(len(task.demonstration(example, random.Random(0))) > 200 for example in task.train(20, seed=0))


@pytest.mark.parametrize("family", COMMON)
def test_chance_level_is_below_one_percent(family):
    """Neither a random draw from the answers nor the best constant answer is right in 1% of the problems."""
    task = make_task("arithmetic", families=[family])
    examples = list(task.train(6_000, seed=2))
    guesses = [example.answer for example in task.train(6_000, seed=3)]
    random_guess = sum(task.score(example, "#" + guess) for example, guess in zip(examples, guesses, strict=True))
    constant, _ = Counter(guesses).most_common(1)[0]
    constant_guess = sum(task.score(example, "#" + constant) for example in examples)
    assert random_guess / 6_000 < 0.01
    assert constant_guess / 6_000 < 0.01


def test_train_and_validation_do_not_overlap():
    families = ["chain-3", "add-3", "chain-24"]  # the first two are small enough for overlaps to happen by chance
    task = make_task("arithmetic", families=families)
    train = {example.prompt for seed in range(2) for example in task.train(10_000, seed=seed)}
    validation = {example.prompt for problems in task.validation(2_000).values() for example in problems}
    assert len(validation) > 3_000
    assert not train & validation


def test_overlap_would_be_seen_without_the_split():
    """The test above can fail: with the split undone the same families do overlap."""
    task = make_task("arithmetic", families=["chain-3"])
    draw = task.families["chain-3"].draw
    sides = [{draw(random.Random(f"{side}{i}")) for i in range(10_000)} for side in "ab"]
    assert sides[0] & sides[1]


def test_validation_has_one_benchmark_a_family_and_a_stable_beginning():
    task = make_task("arithmetic", families="chain-12, add-3", validation_count=10)
    benchmarks = task.validation()
    assert {name: len(problems) for name, problems in benchmarks.items()} == {"chain-12": 10, "add-3": 10}
    assert list(task.validation(20)["add-3"])[:10] == list(benchmarks["add-3"])
    assert {example.family for example in benchmarks["add-3"]} == {"add-3"}


def test_training_problems_are_a_function_of_seed_and_index():
    task = make_task("arithmetic", families=["chain-12", "add-3"])
    problems = task.train(50, seed=7)
    assert problems[49] == problems[-1] == list(problems)[49] == task.train(1_000_000, seed=7)[49]
    assert [example.family for example in problems[:4]] == ["chain-12", "add-3"] * 2
    assert task.train(50, seed=8)[0] != problems[0]
    assert len({example.id for example in problems}) == 50
    with pytest.raises(IndexError):
        problems[50]


def test_the_same_in_processes_with_other_hash_seeds():
    program = (
        "import random; from cppo.tasks import make_task; t = make_task('arithmetic', families='chain-24,add-4');"
        "r = random.Random(1); print([(e, t.demonstration(e, r)) for e in t.train(40, 3)], t.validation(5)['add-4'][:])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 5_000


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("1,9,4#194", 1.0),
        ("#194", 1.0),
        ("#000#194", 1.0),
        ("#194 \n", 1.0),
        ("194", 0.0),
        ("#194#", 0.0),
        ("#1944", 0.0),
        ("#19", 0.0),
        ("", 0.0),
        ("\x00#\ud800", 0.0),
        ("#" * 1_000_000, 0.0),
    ],
)
def test_only_what_follows_the_last_mark_counts(completion, reward):
    task = make_task("arithmetic", families=["chain-3"])
    example = next(example for example in task.train(100_000, seed=0) if example.answer == "194")
    assert task.score(example, completion) == reward


class TestTheTeacher:
    def test_does_not_know_a_fixed_share_of_the_facts(self):
        task = make_task("arithmetic", families=["chain-24", "add-4"], ignorance=0.05)
        same = make_task("arithmetic", families=["add-4", "chain-24"], ignorance=0.05)
        assert {name: len(facts) for name, facts in task._unknown.items()} == {"chain-24": 10, "add-4": 10}
        assert task._unknown == same._unknown

    def test_is_right_about_as_often_as_the_share_says(self):
        task = make_task("arithmetic", families=["chain-24"], ignorance=0.05)
        rng = random.Random(0)
        scores = [task.score(example, task.demonstration(example, rng)) for example in task.train(2_000, seed=0)]
        assert 0.25 < sum(scores) / len(scores) < 0.5  # (1 - 0.05 * 0.9)^24 = 0.33, and some errors cancel

    def test_carries_its_errors_on(self):
        task = make_task("arithmetic", families=["chain-6"], ignorance=1.0)
        for example in task.train(50, seed=0):
            scratchpad, answer = task.demonstration(example, random.Random(3)).split("#")
            values = scratchpad.split(",")
            assert answer == values[1] + values[3] + values[5]

    def test_follows_the_generator_it_is_given(self):
        task = make_task("arithmetic", ignorance=0.5)
        example = task.train(1, seed=0)[0]
        assert task.demonstration(example, random.Random(1)) == task.demonstration(example, random.Random(1))
        assert task.demonstration(example, random.Random(1)) != task.demonstration(example, random.Random(2))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"families": ["chian-24"]}, "unknown arithmetic family 'chian-24'. Did you mean 'chain-24'"),
        ({"families": ["add-2"]}, "'add-2' is too short.*set n >= 3"),
        ({"families": ["chain-2"]}, "'chain-2' is too short"),
        ({"families": []}, "name at least one family"),
        ({"families": "add-3,add-3"}, "each of them once"),
        ({"ignorance": 5}, "ignorance=5 is a share"),
        ({"validation_count": 0}, "validation_count=0"),
        ({"ignorence": 0.1}, "has no option 'ignorence'. Did you mean 'ignorance'"),
    ],
)
def test_bad_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_task("arithmetic", **options)


def test_it_is_a_task():
    assert isinstance(make_task("arithmetic"), Task)
