"""Which ports a local cluster uses: the usual ones where they are free."""

from __future__ import annotations

import socket

from services.config.flags import ConfigError

_ATTEMPTS = 50


class Ports:
    """Hands out ports, each once. A port can still be lost to somebody else before its process binds it."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    @property
    def given(self) -> frozenset[int]:
        """Every port handed out so far."""
        return frozenset(self._given)

    def pick(self, host: str, usual: int) -> int:
        """`usual` if nobody listens there, any free port otherwise."""
        for wanted in (usual, *([0] * _ATTEMPTS)):
            port = _bindable(host, wanted)
            if port is not None and port not in self._given:
                self._given.add(port)
                return port
        raise ConfigError(f"no free port on {host}")

    def take(self, host: str, port: int, flag: str) -> int:
        """Exactly `port`, or ConfigError naming `flag`. 0 means any."""
        if port == 0:
            return self.pick(host, 0)
        if port in self._given or _bindable(host, port) is None:
            raise ConfigError(f"{flag} {port} is taken on {host}")
        self._given.add(port)
        return port


def reachable_host(bind_host: str) -> str:
    """Where this machine reaches a server that binds `bind_host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind_host.strip("[]"), bind_host.strip("[]"))


def _bindable(host: str, port: int) -> int | None:
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
