"""Mathematical data in the schemas of DAPO-Math-17k and AIME: read, cleaned, refused with a sentence."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cppo.errors import UserError
from cppo.tasks import Task, make_task
from cppo.tasks.math import INSTRUCTION

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def dapo_row(problem, answer, index=0):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO_PROMPT.format(problem)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(index)},
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a Parquet or JSON lines file and gives its path."""

    def write(name, rows):
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("name", ["dapo.parquet", "dapo.jsonl"])
def test_dapo_rows_are_read_once_each_and_scored(write, name, caplog):
    rows = [dapo_row(f"What is {i}+{i}?", str(2 * i), i) for i in range(5)] * 100
    task = make_task("math", train=write(name, rows))
    assert isinstance(task, Task)
    examples = task.train(5, seed=0)
    assert {example.answer for example in examples} == {"0", "2", "4", "6", "8"}
    assert "495 of 500 rows repeat a problem and were dropped" in task.notes[0]
    assert task.notes[0] in caplog.text
    example = examples[0]
    assert example.prompt == [{"role": "user", "content": example.prompt[0]["content"]}]
    assert INSTRUCTION not in example.prompt[0]["content"]  # this data set says itself how to answer
    assert task.score(example, f"Adding up.\nAnswer: {example.answer}") == 1.0
    assert task.score(example, f"Adding up.\nAnswer: {example.answer}1") == 0.0
    assert task.score_many([(example, f"\\boxed{{{example.answer}}}"), (example, "")]) == [1.0, 0.0]
    task.close()


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"prompt": "Find x.", "solution": "34"}, "34"),
        ({"prompt": "Find x.", "solution": "34", "reward_model": {"ground_truth": "34", "style": "rule"}}, "34"),
        ({"problem": "Find x.", "answer": 33}, "33"),
        ({"problem": "Find x.", "answer": 33.0}, "33"),
        ({"question": "Find x.", "answer": "033"}, "033"),
        ({"ID": "2024-I-1", "Problem": "Find x.", "Solution": "A long way ...", "Answer": 204}, "204"),
        ({"problem": "Find x.", "solution": "Since " * 50 + r"we get \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),
        ({"problem": "Find x.", "answer": 0}, "0"),
    ],
)
def test_other_schemas(write, row, answer):
    for name in ("data.jsonl", "data.parquet"):
        task = make_task("math", validation={"aime": write(name, [row])})
        (example,) = task.validation()["aime"]
        assert example.answer == answer
        assert example.prompt == [{"role": "user", "content": f"Find x.\n{INSTRUCTION}"}]


def test_the_instruction_can_be_changed_or_left_out(write):
    path = write("aime.jsonl", [{"problem": "Find x.", "answer": 1}])
    for instruction, content in (("Think.", "Find x.\nThink."), ("", "Find x.")):
        task = make_task("math", validation=path, instruction=instruction)
        assert task.validation()["validation"][0].prompt[0]["content"] == content


def test_validation_problems_are_removed_from_train_in_whatever_wrapping(write):
    train = write("train.parquet", [dapo_row(f"What is  {i}+{i}?", str(2 * i)) for i in range(6)])
    aime24 = write("aime24.jsonl", [{"problem": "What is 1+1?", "answer": 2}])
    aime25 = write("aime25.jsonl", [{"problem": f"What is 3+3? {INSTRUCTION}", "answer": 6}])
    task = make_task("math", train=train, validation={"aime24": aime24, "aime25": aime25})
    assert {example.answer for example in task.train(100, seed=1)} == {"0", "4", "8", "10"}
    assert "2 problems are validation problems and were removed" in task.notes[-1]
    assert list(task.validation()) == ["aime24", "aime25"]
    with pytest.raises(ValueError, match="every training problem is a validation problem"):
        make_task("math", train=aime24, validation=aime24)


def test_training_order_is_a_function_of_the_seed(write):
    path = write("train.jsonl", [{"problem": f"p{i}", "answer": i} for i in range(10)])
    task, again = make_task("math", train=path), make_task("math", train=path)
    problems = task.train(25, seed=3)
    assert list(problems) == list(again.train(25, seed=3))
    assert list(problems) != list(task.train(25, seed=4))
    assert {example.answer for example in problems[:10]} == {example.answer for example in problems[10:20]}
    assert [example.id for example in problems[:10]] != [example.id for example in problems[10:20]]


ROW = {"problem": "p", "answer": "1"}


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("empty.jsonl", b"", "holds no problem"),
        ("blank.jsonl", b"\n\n", "holds no problem"),
        ("bad.jsonl", json.dumps(ROW).encode() + b"\n\n{'problem'\n", "bad.jsonl, line 3 is not JSON"),
        ("bytes.jsonl", b"\xff\xfe\x00\n", "line 1 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1 holds a list: each line must be one JSON object"),
        (
            "none.jsonl",
            b'{"problem": "p", "difficulty": 3}\n',
            "no answer: its columns are problem, difficulty, and acc",
        ),
        ("null.jsonl", b'{"problem": "p", "answer": null}\n', "line 1 has no answer"),
        ("long.jsonl", b'{"problem": "p", "solution": "' + b"so " * 99 + b'"}\n', "line 1 has no answer"),
        ("text.jsonl", b'{"text": "p", "answer": 1}\n', "no prompt: its columns are text, answer.*prompt, problem"),
        ("chat.jsonl", b'{"prompt": [{"role": "user"}], "answer": 1}\n', "list of messages with the texts 'role'"),
        ("role.jsonl", b'{"prompt": [{"role": "system", "content": "x"}], "answer": 1}\n', "must be by 'user'"),
        ("bad.parquet", b"PAR1 no", "bad.parquet is not a readable Parquet file"),
        ("empty.parquet", b"", "is not a readable Parquet file"),
        ("data.csv", b"problem,answer\n", "is a .csv: give a .parquet or .jsonl file"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        make_task("math", train=str(tmp_path / name))


def test_parquet_without_answers_names_its_columns(write):
    with pytest.raises(
        ValueError, match=r"row 1 has no answer: its columns are problem, and accepted are reward_model"
    ):
        make_task("math", train=write("a.parquet", [{"problem": "p", "level": 3}]))
    with pytest.raises(ValueError, match="row 1 has no prompt: its columns are text, level"):
        make_task("math", train=write("b.parquet", [{"text": "p", "level": 3}]))


def test_missing_sources_get_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.parquet"):
        make_task("math", train=str(tmp_path / "nowhere.parquet"))
    with pytest.raises(ValueError, match=r"needs data: set train="):
        make_task("math")
    with pytest.raises(ValueError, match="is a folder"):
        make_task("math", train=str(tmp_path))


def test_a_hub_id_without_network_says_what_to_do():
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with pytest.raises(UserError, match=r"could not be loaded from the hub.*download its Parquet file"):
            make_task("math", train="nobody-at-all/no-such-data-set")
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def test_evaluation_alone_has_no_training_problems(write):
    task = make_task("math", validation=write("aime.jsonl", [ROW]))
    with pytest.raises(ValueError, match="set train="):
        task.train(1, seed=0)
