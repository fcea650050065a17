"""The automaton: rows by hand and by another program, an honest chance level, a split, a teacher with gaps."""

import itertools
import random
from collections import Counter

import pytest

from cppo.tasks import Task, make_task
from cppo.tasks.automaton import COMMON, LETTERS, RULE


def rows_of(response):
    scratchpad, answer = response.split("#")
    return [*scratchpad.split(","), answer]


def test_a_step_by_hand():
    task = make_task("automaton", families="4x2", ignorance=0)
    example = next(e for e in task.train(100_000, seed=0) if e.prompt.startswith("ab"))
    first = rows_of(task.demonstration(example, random.Random(0)))[0]
    assert first[0] == RULE["|"]["a"]  # the edge is the first cell's left neighbour
    assert first[1] == RULE["a"]["b"]


@pytest.mark.parametrize("family", COMMON)
def test_rows_follow_the_rule_and_fit(family):
    task = make_task("automaton", families=family, ignorance=0)
    width, steps = map(int, family.split("x"))
    for example in task.train(50, seed=3):
        response = task.demonstration(example, random.Random(0))
        rows = [example.prompt.removesuffix("="), *rows_of(response)]
        assert len(rows) == steps + 1 and {len(row) for row in rows} == {width}
        for above, below in itertools.pairwise(rows):
            for i in range(width):
                assert below[i] == RULE[above[i - 1] if i else "|"][above[i]]
        assert task.score(example, response) == 1.0 and rows[-1] == example.answer
        assert len(response) + 1 == task.max_response_tokens
        assert set(example.prompt + response) <= set(task.alphabet)


def test_a_step_is_a_bijection_so_no_error_is_forgotten():
    assert all(sorted(row.values()) == list(LETTERS) for row in RULE.values())
    task = make_task("automaton", families="4x3", ignorance=0)
    solve = task.families["4x3"].solve
    rows = ["".join(row) for row in itertools.product(LETTERS[:5], repeat=4)]
    assert len({solve(row + "=", lambda fact, right: right)[1] for row in rows}) == len(rows)


def test_chance_level_is_below_one_in_a_thousand():
    task = make_task("automaton", families="8x12")
    answers = [example.answer for example in task.train(5_000, seed=1)]
    assert Counter(answers).most_common(1)[0][1] <= 5
    assert len({letter for answer in answers[:100] for letter in answer}) == 8


def test_train_and_validation_do_not_overlap():
    task = make_task("automaton", families="4x2")  # 4,096 rows: they would overlap
    train = {example.prompt for example in task.train(5_000, seed=0)}
    validation = {example.prompt for example in task.validation(200)["4x2"]}
    assert len(validation) > 100 and not train & validation


def test_the_teacher_does_not_know_one_fact():
    task = make_task("automaton", families="8x12")
    (unknown,) = task._unknown["8x12"]
    rng = random.Random(0)
    wrong = Counter()
    for example in task.train(300, seed=0):
        rows = [example.prompt.removesuffix("="), *rows_of(task.demonstration(example, rng))]
        for above, below in itertools.pairwise(rows):
            for left, own, new in zip("|" + above[:-1], above, below, strict=True):
                if new != RULE[left][own]:
                    wrong[left + own, new] += 1
    assert {fact for fact, _ in wrong} == {unknown} and len(wrong) == 7
    # exp(-96 (7/8) / 72) = 0.31
    scores = [task.score(example, task.demonstration(example, rng)) for example in task.train(1_000, seed=0)]
    assert 0.25 < sum(scores) / 1_000 < 0.4


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"families": ["8-24"]}, "unknown automaton family '8-24'.*Did you mean"),
        ({"families": "3x9"}, "'3x9' is too small"),
        ({"families": "8x1"}, "'8x1' is too small"),
        ({"families": []}, "name at least one family"),
    ],
)
def test_bad_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_task("automaton", **options)


def test_it_is_a_task():
    assert isinstance(make_task("automaton"), Task)
