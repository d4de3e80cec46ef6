"""Which ports a local cluster uses."""

import socket

import pytest

from services.config.flags import ConfigError
from services.tools.ports import Ports, reachable_host

HOST = "127.0.0.1"


@pytest.fixture
def listener():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        yield taken.getsockname()[1]


def a_free_port() -> int:
    return Ports().pick(HOST, 0)


def test_the_usual_port_is_taken_where_it_is_free():
    usual = a_free_port()
    assert Ports().pick(HOST, usual) == usual


def test_another_one_is_taken_where_somebody_listens(listener: int):
    assert Ports().pick(HOST, listener) != listener


def test_no_port_is_given_twice():
    ports, usual = Ports(), a_free_port()
    given = [ports.pick(HOST, usual) for _ in range(20)]
    assert len(set(given)) == 20
    assert ports.given == set(given)


def test_a_port_that_was_asked_for_by_name_is_taken_or_refused_by_name(listener: int):
    free = a_free_port()
    assert Ports().take(HOST, free, "--grpc-port") == free
    with pytest.raises(ConfigError, match=rf"--grpc-port {listener} is taken"):
        Ports().take(HOST, listener, "--grpc-port")


def test_one_port_cannot_be_asked_for_twice():
    ports, free = Ports(), a_free_port()
    ports.take(HOST, free, "--grpc-port")
    with pytest.raises(ConfigError, match="--http-port"):
        ports.take(HOST, free, "--http-port")


@pytest.mark.parametrize(
    ("bind", "reach"), [("0.0.0.0", "127.0.0.1"), ("[::]", "::1"), ("10.0.0.7", "10.0.0.7"), ("[fe80::1]", "fe80::1")]
)
def test_a_wildcard_is_reached_over_loopback(bind: str, reach: str):
    assert reachable_host(bind) == reach
