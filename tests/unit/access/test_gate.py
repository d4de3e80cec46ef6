"""The gate: whose key, which models, how much at once, and what survives a new file."""

from __future__ import annotations

import hmac

import grpc
import pytest
import structlog
from prometheus_client import REGISTRY

from kvbaton.errors import Reason, RequestError
from services.frontend.access.gate import Gate, current_admission, require_model
from tests.unit.access.support import ALICE, BOB, Clock, key


def refusals(name: str, reason: Reason) -> float:
    labels = {"key": name, "reason": reason.value}
    return REGISTRY.get_sample_value("kvbaton_refused_by_access_total", labels) or 0.0


@pytest.mark.parametrize("value", [b"Bearer kvb-alice", b"bearer kvb-alice", b"BEARER  kvb-alice "])
def test_a_key_opens_it(value: bytes) -> None:
    assert Gate([key(), key("bob", BOB)]).identify(value).name == "alice"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"kvb-alice",
        b"Bearer",
        b"Bearer ",
        b"Bearer kvb-alic",
        b"Bearer kvb-alicee",
        b"Bearer kvb-alice kvb-alice",
        b"Bearer kvb-alice, Bearer kvb-alice",
        b"Basic kvb-alice",
        b"Bearer \xff\x00",
    ],
)
def test_anything_else_does_not(value: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        Gate([key()]).identify(value)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.INVALID_API_KEY)
    assert "alic" not in caught.value.message


def test_no_key_at_all_is_another_error() -> None:
    with pytest.raises(RequestError) as caught:
        Gate([key()]).identify(None)
    assert caught.value.reason is Reason.API_KEY_MISSING


def test_every_entry_is_compared_wherever_the_key_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = [key(), *(key(f"k{number}", f"kvb-{number}") for number in range(4))]
    gate = Gate(keys)
    for secret in (ALICE, "kvb-2", "kvb-3"):
        compared.clear()
        gate.identify(f"Bearer {secret}".encode())
        assert compared == [each.digest for each in keys]


def test_concurrency_is_held_until_the_end() -> None:
    gate = Gate([key(concurrent_requests=2)])
    alice = gate.identify(b"Bearer kvb-alice")
    with gate.admit(alice), gate.admit(alice):
        with pytest.raises(RequestError) as caught, gate.admit(alice):
            pass
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason is Reason.CONCURRENCY_LIMIT_EXCEEDED
        assert caught.value.retry_after == 1.0
        with gate.admit(alice, counted=False):
            pass
    assert alice.running == 0
    with gate.admit(alice):
        assert alice.running == 1


def test_a_failed_request_gives_its_place_back() -> None:
    gate = Gate([key(concurrent_requests=1)])
    alice = gate.identify(b"Bearer kvb-alice")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gate.admit(alice):
            raise ZeroDivisionError
    assert alice.running == 0


def test_the_rate_says_when_to_come_back() -> None:
    clock = Clock()
    gate = Gate([key(requests_per_minute=2)], clock=clock)
    alice = gate.identify(b"Bearer kvb-alice")
    for _ in range(2):
        with gate.admit(alice):
            pass
    with gate.admit(alice, counted=False):
        pass
    with pytest.raises(RequestError) as caught, gate.admit(alice):
        pass
    assert caught.value.reason is Reason.RATE_LIMIT_EXCEEDED
    assert caught.value.retry_after == pytest.approx(30)
    assert alice.running == 0
    state = gate.rate_of(alice)
    assert state is not None
    assert (state.limit, state.remaining, state.reset) == (2, 0, pytest.approx(60))
    clock.now += 30
    with gate.admit(alice):
        pass


def test_what_concurrency_refuses_costs_no_rate() -> None:
    gate = Gate([key(concurrent_requests=1, requests_per_minute=2)], clock=Clock())
    alice = gate.identify(b"Bearer kvb-alice")
    with gate.admit(alice):
        for _ in range(5):
            with pytest.raises(RequestError), gate.admit(alice):
                pass
    with gate.admit(alice):
        pass


def test_keys_do_not_share_limits() -> None:
    gate = Gate([key(concurrent_requests=1), key("bob", BOB, concurrent_requests=1)])
    with gate.admit(gate.identify(b"Bearer kvb-alice")), gate.admit(gate.identify(b"Bearer kvb-bob")):
        pass


def test_a_new_file_changes_limits_and_keeps_what_is_used() -> None:
    gate = Gate([key(concurrent_requests=1), key("bob", BOB)], clock=Clock())
    alice = gate.identify(b"Bearer kvb-alice")
    with gate.admit(alice):
        gate.replace([key(concurrent_requests=2, secret="kvb-rotated", requests_per_minute=1)])
        with pytest.raises(RequestError):
            gate.identify(b"Bearer kvb-alice")
        with pytest.raises(RequestError):
            gate.identify(b"Bearer kvb-bob")
        again = gate.identify(b"Bearer kvb-rotated")
        assert again.running == 1
        with gate.admit(again), pytest.raises(RequestError), gate.admit(again):
            pass
    assert again.running == 0


def test_a_request_of_a_removed_key_may_end() -> None:
    gate = Gate([key(), key("bob", BOB)])
    alice = gate.identify(b"Bearer kvb-alice")
    with gate.admit(alice):
        gate.replace([key("bob", BOB)])
        admission = current_admission()
        assert admission is not None
        assert admission.caller is alice


def test_models_outside_of_the_list_are_refused() -> None:
    gate = Gate([key(models=frozenset({"a"}))])
    with gate.admit(gate.identify(b"Bearer kvb-alice")):
        require_model("a", [])
        require_model("", ["a"])
        for model, served in (("b", ["b"]), ("", ["a", "b"]), ("unheard-of", ["a"])):
            with pytest.raises(RequestError) as caught:
                require_model(model, served)
            assert (caught.value.code, caught.value.field) == (grpc.StatusCode.PERMISSION_DENIED, "model")
            assert caught.value.message.startswith("model: ")


def test_while_nothing_serves_no_model_is_meant_and_none_refused() -> None:
    gate = Gate([key(models=frozenset({"a"}))])
    with gate.admit(gate.identify(b"Bearer kvb-alice")), pytest.raises(RequestError) as caught:
        require_model("", [])
    error = caught.value
    assert (error.code, error.reason, error.retry_after) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_WORKER, 1.0)


def test_a_key_without_a_list_may_use_everything_and_so_may_nobodys_request() -> None:
    require_model("b", ["b"])
    gate = Gate([key()])
    with gate.admit(gate.identify(b"Bearer kvb-alice")):
        require_model("b", ["b"])
        require_model("", [])
    assert current_admission() is None


def test_the_requests_log_lines_have_the_keys_name() -> None:
    gate = Gate([key()])
    with gate.admit(gate.identify(b"Bearer kvb-alice")):
        assert structlog.contextvars.get_contextvars() == {"key_name": "alice"}
    assert structlog.contextvars.get_contextvars() == {}


def test_refusals_are_counted_by_key_and_reason() -> None:
    gate = Gate([key("counted", requests_per_minute=1)], clock=Clock())
    strangers = refusals("", Reason.INVALID_API_KEY)
    for _ in range(2):
        with pytest.raises(RequestError):
            gate.identify(b"Bearer nobody")
    assert refusals("", Reason.INVALID_API_KEY) == strangers + 2
    caller = gate.identify(b"Bearer kvb-alice")
    with gate.admit(caller):
        pass
    with pytest.raises(RequestError), gate.admit(caller):
        pass
    assert refusals("counted", Reason.RATE_LIMIT_EXCEEDED) == 1
