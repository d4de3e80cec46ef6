"""What a request says of the caches that it shares is taken as it is, or refused by field."""

from __future__ import annotations

import dataclasses

import pytest

from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from kvbaton.v1.generate_pb2 import GenerateRequest
from services.prefix_requests import MAX_SALT_BYTES, check_cache_salt
from services.requests import Limits

LIMITS = Limits.from_runtime(worker_pb2.RuntimeConfig(cache_salts=True))
WITHOUT = dataclasses.replace(LIMITS, cache_salts=False)


def test_a_salt_is_taken_as_it_is() -> None:
    for salt in ("", "tenant", "ü" * (MAX_SALT_BYTES // 2)):
        assert check_cache_salt(GenerateRequest(cache_salt=salt), LIMITS) == salt
    assert check_cache_salt(GenerateRequest(), WITHOUT) == ""


@pytest.mark.parametrize(
    ("request_", "limits", "field"),
    [
        (GenerateRequest(cache_salt="ü" * MAX_SALT_BYTES), LIMITS, "cache_salt"),
        (GenerateRequest(cache_salt="tenant"), WITHOUT, "cache_salt"),
        (GenerateRequest(cache_salt="tenant"), Limits.smallest([LIMITS, WITHOUT]), "cache_salt"),
        (GenerateRequest(lora="law"), LIMITS, "lora"),
    ],
)
def test_what_nobody_could_do_is_refused_by_name(request_: GenerateRequest, limits: Limits, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_cache_salt(request_, limits)
    assert caught.value.field == field
