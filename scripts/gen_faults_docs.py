"""Writes docs/faults.md: the promises, what the last recorded run measured, and who proves what.

The table of times comes from build/faults.json, which tests/chaos/test_matrix.py writes; without that file the table
that the document has is kept, and only the list of tests is made anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.faults_document import DOCUMENT, RESULTS, matrix_section, render, section_of


def main() -> int:
    """Returns the exit status."""
    if RESULTS.exists():
        matrix = matrix_section({(each["phase"], each["fault"]): each for each in json.loads(RESULTS.read_text())})
    elif DOCUMENT.exists():
        matrix = section_of(DOCUMENT.read_text(), "matrix")
    else:
        print(f"no {RESULTS.relative_to(Path.cwd())}: run tests/chaos/test_matrix.py first", file=sys.stderr)
        return 1
    DOCUMENT.write_text(render(matrix))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
