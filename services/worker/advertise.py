"""The address that a worker publishes: one that frontends and peers can really reach."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from services.transport import bracketed, split_host_port


class AdvertiseError(Exception):
    """No usable address; the message names the flag to set."""


def advertised_host(*, bind_host: str, advertise_host: str, etcd_endpoints: Sequence[str]) -> str:
    """The address to publish.

    `advertise_host` if given, else the bind address if it is one, else the local address that routes to etcd: whoever
    reaches etcd from elsewhere comes that way. Loopback and wildcard are refused when etcd is on another machine.
    Raises AdvertiseError.
    """
    remote = not all(_is_loopback(_host_of(endpoint)) for endpoint in etcd_endpoints)
    host = advertise_host or ("" if _is_wildcard(bind_host) else bind_host) or _local_address_towards(etcd_endpoints[0])
    if _is_wildcard(host):
        raise AdvertiseError(f"--advertise-host {host}: nobody can connect to a wildcard address")
    if remote and _is_loopback(host):
        flag = "--advertise-host" if advertise_host else "--host"
        raise AdvertiseError(
            f"{flag} {host} is reachable from this machine only, but etcd ({', '.join(etcd_endpoints)}) is on another:"
            " bind with --host 0.0.0.0, or set --advertise-host"
        )
    if _is_loopback(bind_host) and not _is_loopback(host):
        raise AdvertiseError(
            f"--advertise-host {host} leads here, but --host {bind_host} listens on loopback only:"
            " bind with --host 0.0.0.0"
        )
    return host


def bootstrap_host(*, advertised: str, dist_init_addr: str, sglang_host_ip: str) -> str:
    """Where decode workers reach SGLang's bootstrap server; an IPv6 address in brackets.

    `sglang_host_ip` (the variable SGLANG_HOST_IP) if set, because SGLang obeys it too; else the host of
    `dist_init_addr`, which is node rank 0 and runs the bootstrap server of an engine on several machines; else the
    `advertised` address. Raises AdvertiseError.
    """
    if sglang_host_ip:
        if _is_wildcard(sglang_host_ip):
            raise AdvertiseError(f"SGLANG_HOST_IP={sglang_host_ip}: nobody can connect to a wildcard address")
        if _is_loopback(sglang_host_ip) and not _is_loopback(advertised):
            raise AdvertiseError(
                f"SGLANG_HOST_IP={sglang_host_ip} is reachable from this machine only, but this worker serves others"
                f" at {advertised}"
            )
        return bracketed(sglang_host_ip)
    first_node = split_host_port(dist_init_addr)[0] if dist_init_addr else ""
    # An engine on one machine may meet at its own loopback or wildcard address.
    here = not first_node or _is_loopback(first_node) or _is_wildcard(first_node)
    return bracketed(advertised if here else first_node)


def _host_of(endpoint: str) -> str:
    return split_host_port(endpoint.rpartition("://")[2].rstrip("/"))[0]


def _local_address_towards(endpoint: str) -> str:
    bare = endpoint.rpartition("://")[2].rstrip("/")
    host, port = split_host_port(bare)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # UDP: picks the route, sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise AdvertiseError(f"no route to etcd at {bare} ({error}): set --advertise-host") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    return host.strip("[]") in ("0.0.0.0", "::", "")
