"""The ports of a frontend with several processes: all of them may listen there, and nobody else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator

from services.transport import bound_socket


@contextlib.contextmanager
def reserved_port(host: str, port: int, *, flag: str) -> Generator[int]:
    """The port, or the one chosen for 0, that sockets with SO_REUSEPORT of this user can bind meanwhile (Linux).

    Raises PortTakenError when somebody listens there, with SO_REUSEPORT or without, or another reservation holds it.
    Nobody is connected to a reservation: it doesn't listen.
    """
    # The first one is as exclusive as that of a server of its own; only listening finds those that were bound and did
    # not listen yet. The second one is there before the first one goes, so that nobody comes in between.
    with bound_socket(host, port, flag=flag, backlog=1) as exclusive:
        port = exclusive.getsockname()[1]
        exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation = bound_socket(host, port, flag=flag, reuse_port=True)
    with reservation:
        # It was only for connections of earlier servers that the kernel still remembers. With it, another exclusive
        # socket could be bound here.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield port
