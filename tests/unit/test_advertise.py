"""What a worker publishes must be reachable by those who read it."""

from __future__ import annotations

import pytest

from services.worker.advertise import AdvertiseError, advertised_host, bootstrap_host

LOCAL, REMOTE = ["127.0.0.1:2379"], ["203.0.113.7:2379"]


def test_everything_local_needs_no_flag() -> None:
    assert advertised_host(bind_host="127.0.0.1", advertise_host="", etcd_endpoints=LOCAL) == "127.0.0.1"


def test_a_wildcard_bind_publishes_the_address_towards_etcd() -> None:
    assert advertised_host(bind_host="0.0.0.0", advertise_host="", etcd_endpoints=LOCAL) == "127.0.0.1"


def test_an_explicit_address_wins() -> None:
    assert advertised_host(bind_host="0.0.0.0", advertise_host="192.0.2.9", etcd_endpoints=REMOTE) == "192.0.2.9"


@pytest.mark.parametrize(
    ("bind_host", "advertise_host", "etcd_endpoints", "named"),
    [
        ("127.0.0.1", "", REMOTE, "--host"),
        ("0.0.0.0", "localhost", REMOTE, "--advertise-host"),
        ("0.0.0.0", "127.0.0.1", [*LOCAL, *REMOTE], "--advertise-host"),
        ("127.0.0.1", "0.0.0.0", LOCAL, "--advertise-host"),
    ],
)
def test_unreachable_addresses_are_refused(
    bind_host: str, advertise_host: str, etcd_endpoints: list[str], named: str
) -> None:
    with pytest.raises(AdvertiseError, match=named):
        advertised_host(bind_host=bind_host, advertise_host=advertise_host, etcd_endpoints=etcd_endpoints)


@pytest.mark.parametrize(
    ("advertised", "dist_init_addr", "sglang_host_ip", "expected"),
    [
        ("10.0.0.1", "", "", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.9:5000", "", "10.0.0.9"),
        ("10.0.0.1", "node-0.workers:5000", "", "node-0.workers"),
        ("10.0.0.1", "10.0.0.9:5000", "10.0.0.7", "10.0.0.7"),
        ("10.0.0.1", "127.0.0.1:5000", "", "10.0.0.1"),
        ("10.0.0.1", "0.0.0.0:5000", "", "10.0.0.1"),
        ("fd00::1", "", "", "[fd00::1]"),
        ("[fd00::1]", "", "", "[fd00::1]"),
        ("10.0.0.1", "[fd00::9]:5000", "", "[fd00::9]"),
        ("10.0.0.1", "", "fd00::7", "[fd00::7]"),
    ],
)
def test_where_decode_workers_reach_the_bootstrap_server(
    advertised: str, dist_init_addr: str, sglang_host_ip: str, expected: str
) -> None:
    host = bootstrap_host(advertised=advertised, dist_init_addr=dist_init_addr, sglang_host_ip=sglang_host_ip)
    assert host == expected


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1"])
def test_a_bootstrap_address_that_nobody_else_reaches_is_refused(address: str) -> None:
    with pytest.raises(AdvertiseError, match=f"SGLANG_HOST_IP={address}"):
        bootstrap_host(advertised="10.0.0.1", dist_init_addr="", sglang_host_ip=address)
