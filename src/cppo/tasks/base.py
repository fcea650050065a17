"""What a task is, and how one is made by name.

A task is any object with the four members of `Task`. The optional members that the trainer uses where they exist:

* `demonstration(example, rng) -> str | None`: target text for a supervised warm-up; may be wrong on purpose
* `score_many(pairs) -> list[float]`: the same as `score`, for a batch of (example, completion)
* `alphabet: str`: every character that prompts and answers use (for a character-level tokenizer)
* `max_response_tokens: int`: longest right response in characters, end of sequence included
* `notes: tuple[str, ...]`: sentences on what was dropped while the data were read
* `close()`: ends helper processes
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

from cppo.errors import UserError, as_user_error
from cppo.words import nearest

Prompt = str | list[dict[str, str]]  # plain text, or chat messages with "role" and "content"


class MissingDependency(UserError, ImportError):
    """An optional package is needed; the message says which pip extra brings it."""


@dataclass(frozen=True)
class Example:
    """One problem. `extra` holds whatever the task itself needs for scoring; it is never shown to the model."""

    prompt: Prompt
    answer: str
    family: str = ""
    id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


class LazyExamples(Sequence[Example]):
    """`count` examples, made when they are read by `make(position)`."""

    def __init__(self, count: int, make: Callable[[int], Example]) -> None:
        if count < 0:
            raise UserError(f"count={count}: a number of problems cannot be negative")
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        position = index + self._count if index < 0 else index
        if not 0 <= position < self._count:
            raise IndexError(f"problem {index} of {self._count}")
        return self._make(position)


@runtime_checkable
class Task(Protocol):
    """The members that a task must have. No subclassing is needed."""

    name: str

    def train(self, count: int, seed: int) -> Sequence[Example]:
        """`count` training problems, the same for the same seed in every process."""

    def validation(self, count: int | None = None) -> dict[str, Sequence[Example]]:
        """Held-out problems by benchmark name, at most `count` each; none of them is ever in `train`."""

    def score(self, example: Example, completion: str) -> float:
        """Reward in [0, 1]. Must not raise or hang, whatever a model wrote."""


def score_all(task: Task, pairs: Sequence[tuple[Example, str]]) -> list[float]:
    """The task's score of each (example, completion); at once where the task can (``score_many``)."""
    many = getattr(task, "score_many", None)
    return [float(score) for score in (many(pairs) if many else (task.score(*pair) for pair in pairs))]


_REQUIRED = ("name", "train", "validation", "score")
_BUILT_IN = {
    "arithmetic": "cppo.tasks.arithmetic:Arithmetic",
    "automaton": "cppo.tasks.automaton:CellularAutomaton",
    "math": "cppo.tasks.math:Math",
    "reasoning_gym": "cppo.tasks.reasoning_gym:ReasoningGym",
}
_FORMS = "arithmetic, automaton, math, reasoning_gym:<generator> or package.module:factory"


def make_task(spec: str, /, **options: Any) -> Task:
    """The task called `spec`, made with `options`.

    Args:
        spec: "arithmetic", "automaton", "math", "reasoning_gym:<generator>", or "package.module:factory" for a task
            of your own (a class or function that is imported and called with the options).
        options: passed on; see `docs/tasks.md` for what each task takes.

    Raises:
        UserError: unknown task, generator or option (the nearest right one is named), or a factory whose result is
            not a task (what is missing is named), or that raises ValueError.
        MissingDependency: the task needs a package that is not installed.
    """
    name, _, rest = spec.partition(":")
    if name == "reasoning_gym":
        if not rest:
            raise UserError(
                "task 'reasoning_gym' needs a generator: write 'reasoning_gym:<name>', e.g. 'reasoning_gym:chain_sum'"
            )
        if "generator" in options:
            raise UserError(f"task {spec!r} names its generator already: remove the option 'generator'")
        options = {"generator": rest, **options}
    elif name in _BUILT_IN and rest:
        raise UserError(f"task {spec!r}: {name!r} takes nothing after a colon; write {name!r} and set its options")
    elif name not in _BUILT_IN and not rest:
        raise UserError(f"unknown task {spec!r}.{nearest(spec, _BUILT_IN)} A task is {_FORMS}")
    factory = _import_factory(_BUILT_IN.get(name, spec), spec)
    _check_options(factory, spec, options)
    # a ValueError of the user's own factory is about the options it was given; one of ours is a fault
    with contextlib.nullcontext() if name in _BUILT_IN else as_user_error(f"task {spec!r}: "):
        task = factory(**options)
    missing = [member for member in _REQUIRED if not hasattr(task, member)]
    missing += [f"{member} (must be a method)" for member in _REQUIRED[1:] if not callable(getattr(task, member, len))]
    if missing:
        raise UserError(
            f"task {spec!r} gave a {type(task).__name__} that is not a task: it lacks {', '.join(missing)}; "
            f"a task has {', '.join(_REQUIRED)} (see cppo.tasks.Task)"
        )
    return task


def require(package: str, purpose: str) -> None:
    """Raise `MissingDependency` unless `package` can be imported; nothing is imported yet."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"{purpose} needs the package {package!r}, which is not installed: run pip install 'cppo[tasks]'"
        )


def _import_factory(path: str, spec: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UserError(f"unknown task {spec!r}. A task is {_FORMS}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module of that name exists but imports something that is missing: that error is the useful one.
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        hint = nearest(module_name, _BUILT_IN, cutoff=0.6)
        raise UserError(
            f"task {spec!r}: there is no Python module {error.name!r}.{hint} For a task of your own, "
            "install its package or put its folder on PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(
            f"task {spec!r}: module {module_name!r} has no {attribute!r}.{nearest(attribute, public, listed=True)}"
        )
    if not callable(factory):
        raise UserError(f"task {spec!r}: {attribute!r} is a {type(factory).__name__}; name a class or a function")
    return factory


def _check_options(factory: Callable[..., Any], spec: str, options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # built in C: no signature to check against
        return
    named = {p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in named:
                known = [name for name in named if spec.partition(":")[0] not in _BUILT_IN or name != "generator"]
                raise UserError(f"task {spec!r} has no option {option!r}.{nearest(option, known, listed=True)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"task {spec!r} needs the option {name!r}: set it")
