"""What a child tells its parent: that it listens, or why it can't; then that it lives. Lines of JSON over a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import sys


class Report:
    """The child's end of its standard output. Whatever else prints goes to the log from then on."""

    def __init__(self) -> None:
        self._pipe = os.dup(sys.stdout.fileno())
        # A parent that is frozen doesn't read, and nobody waits for it.
        os.set_blocking(self._pipe, False)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def listening(self) -> None:
        """Clients can come."""
        self._say(listening=True)

    def cannot_start(self, error: str) -> None:
        """It ends now, and would again."""
        self._say(error=error)

    def keep_saying_alive(self, every: float) -> None:
        """From the event loop, while that turns; `every` is in seconds."""
        self._say()
        asyncio.get_running_loop().call_later(every, self.keep_saying_alive, every)

    def _say(self, **message: object) -> None:
        # The parent may be gone.
        try:
            os.write(self._pipe, json.dumps(message).encode() + b"\n")
        except OSError:
            return


def read_report(line: bytes) -> tuple[bool, str]:
    """The parent's end: whether the child says that it listens, and what keeps it from that."""
    message = json.loads(line)
    return bool(message.get("listening")), str(message.get("error", ""))
