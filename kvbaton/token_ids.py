"""Prompts as `TokenIds`: numbers that are readable in JSON and grpcurl, or bytes that are cheap to pass on.

Python makes an object of each number of a repeated field, on every hop; bytes go through as they are.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

from kvbaton.v1 import generate_pb2

# 32 bits without a sign on every platform that gRPC runs on.
_UINT32 = "I"
_BYTES = 4


def pack(token_ids: Iterable[int]) -> generate_pb2.TokenIds:
    """`token_ids` in `packed`. Raises ValueError for one outside [0, 2^32), TypeError for what is no integer."""
    try:
        words = array(_UINT32, token_ids)
    except OverflowError as error:
        raise ValueError(f"a token id is outside [0, 2^32): {error}") from error
    if sys.byteorder == "big":
        words.byteswap()
    return generate_pb2.TokenIds(packed=words.tobytes())


def unpack(wire: generate_pb2.TokenIds) -> Sequence[int]:
    """The ids, whichever way they came. Raises ValueError when they came both ways, or with bytes left over."""
    if not wire.packed:
        return wire.ids
    if wire.ids:
        raise ValueError("ids and packed exclude each other")
    if len(wire.packed) % _BYTES:
        raise ValueError(f"packed has {len(wire.packed)} bytes, which is no multiple of {_BYTES}")
    words = array(_UINT32, wire.packed)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def count(wire: generate_pb2.TokenIds) -> int:
    """How many ids `unpack` gives."""
    return len(wire.ids) + len(wire.packed) // _BYTES
