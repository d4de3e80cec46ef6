"""Keys and a clock that the tests set."""

from __future__ import annotations

from typing import Any

from services.frontend.access.keys import ApiKey, digest_of

ALICE, BOB = "kvb-alice", "kvb-bob"


def key(name: str = "alice", secret: str = ALICE, **fields: Any) -> ApiKey:
    return ApiKey(name, digest_of(secret.encode()), **fields)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
