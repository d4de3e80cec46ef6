"""Command-line tools that come with the development packages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def tool(name: str) -> str:
    """A command of the environment that runs the tests, else of PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    assert found, f"no {name}: make setup"
    return found
