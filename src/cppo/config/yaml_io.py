"""YAML as people expect it, in both directions.

PyYAML reads YAML 1.1, which has traps for settings: ``1e-6`` is text, ``on`` and ``no`` are booleans, ``010`` is eight,
``1:30`` is ninety, ``2026-01-02`` is a date, and a key given twice silently wins. Here numbers are numbers, only
``true`` and ``false`` are booleans, and a repeated key is an error. The writer uses the same rules, so that what it
writes is read back exactly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_RULES: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
)


#: A run's own configuration, in its folder.
CONFIG_FILE = "config.yaml"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            if key.value != "<<":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # none of 1.1's
    for _tag, _pattern, _first in _RULES:
        _class.add_implicit_resolver(_tag, re.compile(_pattern), [c if c != "\0" else "" for c in _first])
# 1.1 reads a leading zero as octal.
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node).replace("_", "")),  # type: ignore[arg-type]
)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read(path: Path) -> Any:
    """The value of a YAML file.

    Raises
    ------
    ValueError : the file is not UTF-8 or not YAML; the sentence names file, line and column.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (UTF-8 expected; byte {error.start} is not).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ValueError(f"{where}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


def dump(value: Any) -> str:
    """YAML text of plain values (dict, list, str, numbers, bool, None), in their order; `parse` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
