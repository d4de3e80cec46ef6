"""Where users of comparable systems suffer, by number, and which tests name which: `@pytest.mark.peers(3)`.

Read from the source files, not by collecting: `scripts/gen_faults_docs.py` and a unit test need the names only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Suffering:
    """One kind of failure that users of other systems have reported."""

    name: str
    here: str
    """What must hold instead."""


SUFFERINGS = {
    1: Suffering("Half-failed pairs hang", "one leg dies: error or retry within 2 s, decode's slot free within 5 s"),
    2: Suffering("Replaced peers", "a prefill worker is replaced at the same address: the next request works"),
    3: Suffering("Pages reused under a running write", "no other request's tokens change, whatever freezes"),
    4: Suffering("Deadlines that measure a full queue", "a burst of 32 on a window of 4: no failure"),
    5: Suffering("etcd", "killed, restarted, frozen or compacted: traffic goes on, no ghost, no lost worker"),
    6: Suffering("Cancellation", "it reaches the engines in each phase, and what was held is free"),
    7: Suffering("Health that lies", "green only after a proven request, red when the engine stops answering"),
    8: Suffering("Breakers", "only the workers' own faults count, and a worker that has gone is never picked"),
    9: Suffering("Wrong status", "never OK with an error inside"),
    10: Suffering("The frontend as bottleneck", "long prompts hold nobody up; messages are shared by all legs"),
    11: Suffering("Router memory, and names taken for models", "the index is bounded; only --model-path is downloaded"),
    12: Suffering("dp ranks", "the room names the rank that was chosen"),
    13: Suffering("Leaks", "thousands of requests, cancelled and failed ones too: memory, files and tasks are flat"),
}


@cache
def named_tests(root: Path = TESTS) -> dict[int, list[str]]:
    """For each number the tests that name it, as pytest names them."""
    found: dict[int, list[str]] = {}
    for file in sorted(root.rglob("test_*.py")):
        for test, number in _marks(ast.parse(file.read_text())):
            found.setdefault(number, []).append(f"{file.relative_to(root.parent)}::{test}")
    return found


def _marks(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _marks(node, f"{prefix}{node.name}::")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                yield from ((prefix + node.name, number) for number in _numbers(decorator))


def _numbers(decorator: ast.expr) -> list[int]:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.peers":
        return []
    return [int(ast.literal_eval(argument)) for argument in decorator.args]
