"""The examples of docs/theory.md run, and its tables are what the code gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pages.theory import exact_tables

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"


def test_the_examples_of_the_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 3
    run = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "non-increasing" in run.stdout  # the sentence that refuses the steep weights


def test_the_tables_of_the_page() -> None:
    """`python -m pages.theory --docs docs` has been run since a bound changed."""
    page = PAGE.read_text()
    for name, text in exact_tables().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert page.partition(begin)[2].partition(end)[0].strip() == text.strip(), name
