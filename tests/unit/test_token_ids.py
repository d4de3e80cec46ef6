"""Prompts as numbers and as bytes."""

from __future__ import annotations

import grpc
import pytest

from kvbaton.errors import RequestError
from kvbaton.token_ids import count, pack, unpack
from kvbaton.v1.generate_pb2 import TokenIds
from services.requests import sent_tokens


@pytest.mark.parametrize("ids", [[], [0], [1, 255, 256, 65536, 2**32 - 1], list(range(5000))])
def test_packed_ids_are_the_same_ids(ids: list[int]) -> None:
    wire = TokenIds.FromString(pack(ids).SerializeToString())
    assert (list(unpack(wire)), count(wire)) == (ids, len(ids))
    plain = TokenIds(ids=ids)
    assert (list(unpack(plain)), count(plain)) == (ids, len(ids))


def test_the_least_significant_byte_comes_first() -> None:
    assert pack([0x01020304, 5]).packed == bytes([4, 3, 2, 1, 5, 0, 0, 0])


@pytest.mark.parametrize("outside", [-1, 2**32])
def test_what_32_bits_do_not_hold_is_no_id(outside: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        pack([7, outside])


@pytest.mark.parametrize("wire", [TokenIds(packed=b"\1\0\0"), TokenIds(ids=[1], packed=b"\1\0\0\0")])
def test_bytes_left_over_and_ids_both_ways_are_refused_by_name(wire: TokenIds) -> None:
    with pytest.raises(RequestError) as caught:
        sent_tokens(wire, field="inputs[3].token_ids")
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs[3].token_ids")
