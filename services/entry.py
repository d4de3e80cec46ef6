"""The installed `kvbaton` command: `services.cli`, or one line about the extra that it needs.

`pip install kvbaton` brings the client alone; the command comes with it, its packages come with an extra.
"""

from __future__ import annotations

import sys

_OWN = frozenset({"kvbaton", "services"})


def main() -> int:
    """Runs the command line; returns the exit status, 1 when a package is missing."""
    try:
        from services import cli

        return cli.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in _OWN:
            raise
        print(
            f"kvbaton: the Python package {package!r} is not installed:"
            ' pip install "kvbaton[frontend]", "kvbaton[worker]" or "kvbaton[local]", whichever runs here',
            file=sys.stderr,
        )
        return 1
