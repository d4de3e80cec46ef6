"""The installed command without the packages that it needs: one line that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kvbaton(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The console script, in an interpreter that can't import the packages `without`."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r})); sys.argv[0] = 'kvbaton'\n"
        "from services.entry import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (("--help",), ("grpc_reflection", "grpc_reflection.v1alpha")),
        (("--help",), ("structlog",)),
        # Imported only once the subcommand runs.
        (("frontend",), ("fastapi",)),
        (("prefill", "--model-path", "m"), ("uvloop",)),
    ],
)
def test_a_missing_package_is_one_line(arguments: tuple[str, ...], without: tuple[str, ...]) -> None:
    done = kvbaton(*arguments, without=without)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert repr(without[0]) in line
    for extra in ("frontend", "worker", "local"):
        assert f'"kvbaton[{extra}]"' in line
    assert 'pip install "kvbaton[frontend]"' in line


def test_a_missing_module_of_our_own_is_a_bug_and_looks_like_one() -> None:
    done = kvbaton("--help", without=("services.version",))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


def test_with_everything_there_it_is_the_command_line() -> None:
    done = kvbaton("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kvbaton ")
