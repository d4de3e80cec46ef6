"""Makes every gRPC channel and server of Baton: TLS, keep-alive, size limits, reflection, port errors."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from services.grpc_errors import TypedErrors

# A prompt of a million tokens is 5 MB of varints; a tokenizer chunk is 1 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients of ours ping every 10 s, also without a call: the default server would answer GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A frozen client keeps its connection, and with it the credits of its session.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Two processes that silently share a port is a bug, not a feature.
    ("grpc.so_reuseport", 0),
)

_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that comes back is found at once; a dead one is not hammered.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # One connection a channel: its state is the state of that worker, not of an earlier channel to the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files of one side of a connection.

    A server needs `cert` and `key`; with `ca` and `require_client_cert` it asks for client certificates (mTLS).
    A client needs `ca` (None: the system's roots) and, for mTLS, `cert` and `key`.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    require_client_cert: bool = False

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.require_client_cert and self.cert is None:
            raise ValueError("--tls-client-auth needs --tls-cert and --tls-key: without them the server speaks no TLS")
        if self.require_client_cert and self.ca is None:
            raise ValueError("--tls-client-auth needs --tls-ca, the authority that signed the clients' certificates")
        for flag, path in (("--tls-cert", self.cert), ("--tls-key", self.key), ("--tls-ca", self.ca)):
            if path is not None and not path.is_file():
                raise ValueError(f"{flag}: no such file: {path}")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server. Raises ValueError without a certificate, or for one that can't be used."""
        cert, key = self.server_files()
        return grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())],
            root_certificates=_read(self.ca),
            require_client_auth=self.require_client_cert,
        )

    def server_files(self) -> tuple[Path, Path]:
        """The certificate and the key of a server. Raises ValueError without them, or when they can't be used.

        They are tried here because gRPC itself would only say that the port can't be bound.
        """
        if self.cert is None or self.key is None:
            raise ValueError("a TLS server needs --tls-cert and --tls-key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password="")  # never asks the terminal for one
        except OSError as error:
            raise ValueError(f"--tls-cert {self.cert} with --tls-key {self.key}: {error}") from error
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except OSError as error:
            raise ValueError(f"--tls-ca {self.ca}: {error}") from error
        return self.cert, self.key


class PortTakenError(Exception):
    """A server could not bind; the message names the address and the flag to change."""


def make_channel(
    target: str, *, tls: TlsConfig | None = None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel to `target` (host:port, or any gRPC target). It connects when it is first used."""
    merged = list({**dict(_CHANNEL_OPTIONS), **dict(options)}.items())
    if tls is None:
        return grpc.aio.insecure_channel(target, options=merged)
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=merged)


def make_server(
    register: Callable[[grpc.aio.Server], Sequence[str]],
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    options: Sequence[tuple[str, Any]] = (),
) -> grpc.aio.Server:
    """A server with everything that `register` adds, plus reflection.

    `register` adds servicers and returns the full names of their services, for reflection. What `interceptors` raise
    becomes a typed status, too. `options` go before those of every server.
    """
    merged = dict(_SERVER_OPTIONS) | dict(options)
    server = grpc.aio.server(interceptors=[TypedErrors(), *interceptors], options=list(merged.items()))
    names = register(server)
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    return server


def bind(server: grpc.aio.Server, host: str, port: int, *, tls: TlsConfig | None = None, flag: str = "--port") -> int:
    """Binds the server and returns the port (useful with port 0). Plain text only without `tls`.

    Raises PortTakenError, or ValueError for a `tls` that no server can use.
    """
    address = join_host_port(host, port)
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise PortTakenError(f"can't listen on {address}: is the port taken? choose another with {flag}") from error
    if bound == 0:
        raise PortTakenError(f"can't listen on {address}: is the port taken? choose another with {flag}")
    return bound


def require_free_port(host: str, port: int, *, flag: str) -> None:
    """Raises PortTakenError when nothing can listen there; for a server that binds later, in another library."""
    bound_socket(host, port, flag=flag).close()


def bound_socket(
    host: str, port: int, *, flag: str, reuse_port: bool = False, backlog: int | None = None
) -> socket.socket:
    """A TCP socket that is bound, and listens if there is a `backlog`. Raises PortTakenError.

    With `reuse_port` others of this user may bind the same address, if they say so, too.
    """
    bare = host.strip("[]")
    bound = socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((bare, port))
        if backlog is not None:
            bound.listen(backlog)
    except OSError as error:
        bound.close()
        address = join_host_port(host, port)
        raise PortTakenError(f"can't listen on {address} ({error.strerror}): choose another with {flag}") from error
    return bound


def bracketed(host: str) -> str:
    """The host as it stands before a colon and a port: an IPv6 address in brackets."""
    bare = host.strip("[]")
    try:
        return f"[{bare}]" if ipaddress.ip_address(bare).version == 6 else host
    except ValueError:
        return host


def join_host_port(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"{bracketed(host)}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """The inverse of `join_host_port`. Raises ValueError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or not host:
        raise ValueError(f"not host:port: {address!r}")
    return host.strip("[]"), int(port)


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None else None
