"""Free ports for tests."""

from __future__ import annotations

import random
import socket

# Below the range from which connections get theirs: one of those could take a port between its choice and its use.
_RANGE = range(15_000, 32_000)
_given: set[int] = set()
_draw = random.Random()


def free_port() -> int:
    """A port that nobody has right now, and that this process has not been given before."""
    while len(_given) < len(_RANGE):
        port = _draw.choice(_RANGE)
        if port in _given:
            continue
        _given.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is left")
