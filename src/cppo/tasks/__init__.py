"""Verifiable tasks: prompts, a way to score answers, and (where one exists) demonstrations for a warm-up.

`make_task("arithmetic")`, `make_task("reasoning_gym:chain_sum")`, `make_task("math", train=...)` or a task of your own
by dotted name, `make_task("package.module:Factory")`. This package imports nothing else of cppo, and no torch.
"""

from cppo.tasks.base import Example, MissingDependency, Task, make_task, score_all

__all__ = ["Example", "MissingDependency", "Task", "make_task", "score_all"]
