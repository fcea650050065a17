"""Making tasks by name, and the example of docs/tasks.md."""

import re
import sys
from pathlib import Path

import pytest

from cppo.errors import UserError
from cppo.tasks import MissingDependency, make_task
from cppo.tasks.base import require

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module where it can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_the_task_of_the_documentation_works(module):
    source = re.search(r"```python\n(# palindromes\.py.*?)```", DOCS.read_text(), flags=re.DOTALL)
    name = module("palindromes", source[1])
    task = make_task(f"{name}:Palindromes", length=6)
    examples = task.train(500, seed=0)
    assert list(examples) == list(task.train(500, seed=0))
    assert [task.score(example, example.answer) for example in examples] == [1.0] * 500
    assert task.score(examples[0], "") == 0.0
    held_out = {example.prompt for problems in task.validation().values() for example in problems}
    assert held_out and not held_out & {example.prompt for example in examples}
    with pytest.raises(ValueError, match=r"no option 'lenght'\. Did you mean 'length'"):
        make_task(f"{name}:Palindromes", lenght=6)


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("arithmatic", "unknown task 'arithmatic'. Did you mean 'arithmetic'"),
        ("reasoning_gym", "needs a generator"),
        ("reasoning_gim:chain_sum", "Did you mean 'reasoning_gym'"),
        ("arithmetic:chain-24", "takes nothing after a colon"),
        ("no_such_package.tasks:Task", "no Python module 'no_such_package'.*PYTHONPATH"),
        ("json:lods", "module 'json' has no 'lods'. Did you mean 'loads'"),
        ("json:", "unknown task 'json:'"),
        ("sys:path", "'path' is a list; name a class or a function"),
        ("", "unknown task ''"),
    ],
)
def test_unknown_tasks_get_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_task(spec)


def test_what_a_task_lacks_is_named(module):
    name = module(
        "incomplete", "class Half:\n    name = 'half'\n    train = 3\n    def score(self, e, c): return 0.0\n"
    )
    with pytest.raises(ValueError, match=r"gave a Half that is not a task: it lacks validation, train \(must be"):
        make_task(f"{name}:Half")


def test_a_missing_option_is_named(module):
    name = module("needy", "def make(folder): ...\n")
    with pytest.raises(ValueError, match="needs the option 'folder'"):
        make_task(f"{name}:make")


def test_a_value_that_a_factory_of_ones_own_refuses_is_a_sentence(module):
    name = module("strict", "def make(size): raise ValueError(f'size is {size}, expected 1')\n")
    with pytest.raises(UserError, match=rf"task '{name}:make': size is 2, expected 1"):
        make_task(f"{name}:make", size=2)


def test_an_import_error_inside_a_module_of_ones_own_is_not_hidden(module):
    name = module("broken_inside", "import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        make_task(f"{name}:Task")


def test_a_missing_package_names_the_extra():
    with pytest.raises(MissingDependency, match=r"needs the package 'no_such_package'.*pip install 'cppo\[tasks\]'"):
        require("no_such_package", "this test")
