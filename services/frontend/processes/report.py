"""What a child tells its parent: that it listens, or why it can't. One line of JSON over its standard output."""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO


class Report:
    """The child's end. Whatever else prints goes to the log from then on."""

    def __init__(self) -> None:
        self._pipe: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def listening(self) -> None:
        """Clients can come."""
        self._say(listening=True)

    def cannot_start(self, error: str) -> None:
        """It ends now, and would again."""
        self._say(error=error)

    def _say(self, **message: object) -> None:
        # The parent may be gone.
        try:
            print(json.dumps(message), file=self._pipe, flush=True)
        except OSError:
            return


def read_report(line: bytes) -> tuple[bool, str]:
    """The parent's end: whether the child listens, and what keeps it from that."""
    message = json.loads(line)
    return bool(message.get("listening")), str(message.get("error", ""))
