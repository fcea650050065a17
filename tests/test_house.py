"""The house as `docs/code.md` draws it: what may import what, no circles, how large a file and a folder may be."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

#: From the ground up; a room may import from its own and from lower floors. Rooms of one floor do not know each other.
FLOORS = (
    ("errors", "words"),
    ("files",),
    ("show",),
    ("layout",),
    ("layout_sharded",),
    ("tokens",),
    ("divergence",),
    ("rules",),
    ("objective", "advantages"),
    ("thresholds",),
    ("scoring", "theory", "tasks"),
    ("engines",),
    ("config",),
    ("runs",),
    ("training", "launch", "dumps"),
    ("study",),
    ("report",),
    ("cli",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name -> file, packages under their own name."""
    found = {}
    for path in (SOURCE / "cppo").rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of this package that a module imports anywhere: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (node.module, alias.name) != ("cppo", "__version__"):
                    yield inner if inner in MODULES else node.module


GRAPH = {name: {found for found in imports(name) if found != name} for name in MODULES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_arrows_point_down() -> None:
    wrong = [
        f"{name} -> {found}"
        for name, targets in GRAPH.items()
        for found in sorted(targets)
        if room(name) and room(found) != room(name)  # the package itself lists its public names
        if not room(found) or FLOOR[room(found)] >= FLOOR[room(name)]
    ]
    assert not wrong, "imports upwards, or of the whole package:\n" + "\n".join(wrong)


def circles() -> list[list[str]]:
    """Groups of modules each of which reaches the others (strongly connected components of more than one)."""
    reach = {name: {name} for name in GRAPH}
    changed = True
    while changed:
        changed = False
        for name, targets in GRAPH.items():
            wider = reach[name].union(*(reach[found] for found in targets))
            changed |= wider != reach[name]
            reach[name] = wider
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in GRAPH}
    return [sorted(group) for group in groups if len(group) > 1]


def test_no_circles() -> None:
    assert circles() == []


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} - {""} == set(FLOOR)


@pytest.mark.parametrize("root", ["src/cppo", "benchmarks", "pages", "tests"])
def test_sizes(root: str) -> None:
    folder = SOURCE.parent / root
    sources = [path for path in folder.rglob("*") if path.suffix in (".py", ".js", ".css", ".j2")]
    long = {str(path): n for path in sources if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long, "files of more than 500 lines"
    by_folder = itertools.groupby(sorted(p for p in sources if p.suffix == ".py"), key=lambda path: path.parent)
    full = {str(parent): n for parent, paths in by_folder if (n := len(list(paths))) > 16}
    assert not full, "folders of more than 16 modules"
