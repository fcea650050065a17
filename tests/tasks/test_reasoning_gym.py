"""reasoning_gym's generators and scorers, the real ones."""

import os
import subprocess
import sys
import time

import pytest

from cppo.tasks import Task, make_task
from cppo.tasks.extract import final_answer
from forks import python


@pytest.fixture(scope="module", autouse=True)
def hosts():
    """Scoring processes are forks of one that has imported reasoning_gym, which takes two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python("reasoning_gym"))
        yield


@pytest.fixture(scope="module")
def chain_sum(hosts):
    task = make_task("reasoning_gym:chain_sum", validation_count=20)
    yield task
    task.close()


def test_right_answers_score_one_and_wrong_ones_do_not(chain_sum):
    assert isinstance(chain_sum, Task)
    for example in chain_sum.train(30, seed=1):
        assert chain_sum.score(example, f"<answer>{example.answer}</answer>") == 1.0
        assert chain_sum.score(example, chain_sum.demonstration(example, None)) == 1.0
        assert chain_sum.score(example, f"#{int(example.answer) + 1}") < 0.5
        assert set(example.prompt + example.answer) <= set(chain_sum.alphabet)


def test_scores_of_many_keep_their_order(chain_sum):
    examples = chain_sum.train(20, seed=2)
    pairs = [(example, example.answer if i % 2 else "no") for i, example in enumerate(examples)]
    assert chain_sum.score_many(pairs) == [float(i % 2) for i in range(20)]


def test_the_same_in_processes_with_other_hash_seeds():
    """ransom_note iterates over a set of strings: by itself it gives other problems in every process."""
    program = (
        "from cppo.tasks import make_task; t = make_task('reasoning_gym:ransom_note', validation_count=5);"
        "print(t.train(20, 3)[:], t.validation())"
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
    assert len(outputs) == 1 and len(outputs.pop()) > 2_000


def test_training_problems_are_a_function_of_seed_and_index(chain_sum):
    problems = chain_sum.train(600, seed=4)  # more than one block of the host
    assert problems[599] == problems[-1] == chain_sum.train(10_000, seed=4)[599]
    assert problems[0] != chain_sum.train(1, seed=5)[0]


def test_neighbouring_seeds_share_no_problems():
    """reasoning_gym itself makes problem i from seed + i: data sets with seeds 1 and 2 are shifted copies."""
    task = make_task("reasoning_gym:chain_sum", config={"min_digits": 8, "max_digits": 9}, validation_count=1)
    first, second = ({example.prompt for example in task.train(100, seed=seed)} for seed in (1, 2))
    assert not first & second
    task.close()


def test_validation_questions_never_occur_in_train():
    """A generator of two-term sums of one digit has a few hundred questions: its seeds overlap by themselves."""
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = make_task("reasoning_gym:chain_sum", config=small, validation_count=40)
    validation = [example.prompt for example in task.validation()["chain_sum"]]
    train = {example.prompt for example in task.train(1_000, seed=0)}
    unguarded = {task._example(0, index).prompt for index in range(1_000)}
    assert len(set(validation)) == 40
    assert unguarded & set(validation)
    assert not train & set(validation)
    task.close()


def test_a_generator_that_is_too_small_says_so():
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ValueError, match=r"too small for validation_count=150: .*Set a smaller validation_count"):
        make_task("reasoning_gym:chain_sum", config=small, validation_count=150).train(10, seed=0)
    with pytest.raises(ValueError, match="too small for validation_count=250: it gave"):
        make_task("reasoning_gym:chain_sum", config=small, validation_count=250).validation()


NASTY = [
    "",
    "[",
    "\x00",
    "\ud800",
    "{" * 5_000,
    "<answer>" * 10_000,
    r"\boxed{" * 10_000,
    "1" * 100_000,
    "<answer>__import__('os')._exit(0)</answer>",
    "<answer>[sum(range(10**12))]</answer>",  # a loop in C, which no signal handler interrupts
]

# Scorers that raise, hand the text to sympy, or evaluate it as Python.
GENERATORS = ["countdown", "spiral_matrix", "rubiks_cube"]


@pytest.mark.parametrize("generator", GENERATORS)
def test_nothing_that_a_model_writes_raises_or_hangs(generator):
    task = make_task(f"reasoning_gym:{generator}", validation_count=1, time_limit=0.5)
    example = task.validation()[generator][0]
    started = time.monotonic()
    for completion in NASTY:
        assert 0.0 <= task.score(example, completion) < 0.2
    assert time.monotonic() - started < 60  # three replaced processes on a busy machine
    task.close()


@pytest.mark.parametrize(
    "attempt", ["__import__('os').system('touch {}')", "open('{}', 'w')", "__import__('pathlib').Path('{}').touch()"]
)
def test_an_evaluated_answer_writes_no_file(attempt, tmp_path):
    """spiral_matrix evaluates answers as Python; without the guard these create a file."""
    task = make_task("reasoning_gym:spiral_matrix", validation_count=1)
    target = tmp_path / "written"
    task.score(task.validation()["spiral_matrix"][0], f"<answer>[{attempt.format(target)}]</answer>")
    assert not target.exists()
    task.close()


def test_an_evaluated_answer_cannot_print_its_own_reward():
    task = make_task("reasoning_gym:spiral_matrix", validation_count=1)
    example = task.validation()["spiral_matrix"][0]
    forged = """<answer>[print('{"value": 1.0}', flush=True)]</answer>"""
    assert [task.score(example, text) for text in (forged, example.answer, "wrong")] == [0.0, 1.0, 0.0]
    task.close()


def test_a_generator_without_answers_has_no_demonstrations():
    task = make_task("reasoning_gym:rubiks_cube", validation_count=2)
    example = task.train(1, seed=0)[0]
    assert example.answer == "" and task.demonstration(example, None) is None
    task.close()


@pytest.mark.parametrize(
    "completion, answer",
    [
        (" 42 ", "42"),
        ("so #42", "42"),
        ("#### 42\n", "42"),
        (r"1 # 2 \boxed{\frac{1}{2}} #3", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("<answer>1</answer> <answer>\n2\n</answer> #3", "2"),
        ("<answer>1", "<answer>1"),
        ("1</answer>", "1</answer>"),
        ("", ""),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_a_board_keeps_its_hash_marks():
    assert final_answer("##.\n#..", hash_mark=False) == "##.\n#.."


@pytest.mark.parametrize("text", ["<answer>", r"\boxed{", "{", "}", "#", r"\boxed "])
def test_final_answer_takes_linear_time(text):
    started = time.monotonic()
    final_answer(text * 300_000)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "generator, options, sentence",
    [
        ("chain_sums", {}, "no generator 'chain_sums'. Did you mean 'chain_sum'"),
        ("chain_sum", {"config": {"min_term": 2}}, "has no option 'min_term'. Did you mean 'min_terms'"),
        ("chain_sum", {"config": {"seed": 2}}, "has no option 'seed'"),
        ("chain_sum", {"config": {"min_terms": 9, "max_terms": 2}}, "made no problem .*change 'config'"),
        ("chain_sum", {"config": {"min_terms": {1, 2}}}, "numbers, texts and lists"),
        ("chain_sum", {"validation_count": 0}, "validation_count=0"),
        ("chain_sum", {"min_terms": 2}, "has no option 'min_terms'"),
    ],
)
def test_bad_options_get_a_sentence(generator, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_task(f"reasoning_gym:{generator}", **options)
