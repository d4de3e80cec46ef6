"""One of a frontend's processes, as its parent starts it: its arguments are number, count and folder.

Its standard input is the configuration, pickled: it is the parent's, also when files and variables have changed since.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import sys
from pathlib import Path

from services.frontend.processes.place import Place, lock_folder
from services.frontend.processes.report import Report
from services.telemetry.shared import share_metrics


def main() -> int:
    """Runs the process until a signal ends it; returns its exit status."""
    number, count, folder = sys.argv[1:]
    place = Place(int(number), int(count), Path(folder))
    held = lock_folder(place.folder)
    parent = os.getppid()
    # Before anything makes a metric, and so before any other import of ours.
    share_metrics(place.folder, place.number)
    from services.frontend.process import run_child

    try:
        return run_child(pickle.load(sys.stdin.buffer), place, Report())
    finally:
        if os.getppid() != parent:
            # It was killed, so nobody else removes the folder: the last one does.
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
