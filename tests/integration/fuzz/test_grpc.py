"""Messages that no stub would send, to every method of every process: refused, and nothing is left of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.support.fuzz_target import FRONTEND, MODEL, WORKERS, Target
from tests.support.raw_grpc import Method, Status, methods, raw_channel
from tests.support.raw_http import HOST

GROWTH_BYTES = 64 * 2**20
RANDOM_MESSAGES = 40
# Seconds for a call that may have no end: a subscription, or a leg that waits for the other one.
ENDLESS = 0.3
# What a message that can be read does there is its point: the worker leaves.
SIDE_EFFECTS = {"/kvbaton.v1.AdminService/Drain"}
# The statuses of a failure of the server's own.
OWN_FAILURES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}

HUGE = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
# None of them is any message: each is wrong before its field could be known.
NO_MESSAGE = {
    "a varint that never ends": b"\xff" * 20,
    "field 0": b"\x00",
    "a wire type that there is not": b"\x0e\x0f",
    "a length beyond the end": b"\x0a\x7f",
    "a length of 2^63": b"\x0a" + HUGE,
    "a length of 2^32": b"\x0a\xff\xff\xff\xff\x0f",
    "a group that never ends": b"\x0b",
    "the end of no group": b"\x0c",
    "deep groups": b"\x0b" * 10_000 + b"\x0c" * 10_000,
    "half a tag": b"\x80",
    "half a fixed64": b"\x09\x00\x00",
}
WIRE_VALUES = {0: b"\x05", 1: bytes(8), 2: b"\x03\xff\xfe\xfd", 5: bytes(4)}
EDGES: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: [-(2**31), -1, 0, 2**31 - 1],
    FieldDescriptor.CPPTYPE_INT64: [-(2**63), -1, 0, 2**63 - 1],
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    FieldDescriptor.CPPTYPE_UINT64: [0, 1, 2**64 - 1],
    FieldDescriptor.CPPTYPE_DOUBLE: [float("nan"), float("inf"), -1e308, 5e-324],
    FieldDescriptor.CPPTYPE_FLOAT: [float("nan"), float("-inf"), 3e38],
    FieldDescriptor.CPPTYPE_BOOL: [False, True],
    FieldDescriptor.CPPTYPE_ENUM: [0, 1, 99],
}
STRINGS = ["", "a", "\0", "\uffff", "x" * 70_000, "{", "[" * 5_000, "{{ 1 }}", MODEL, "../../etc/passwd", "é\u202e"]

PROCESSES = (FRONTEND, *WORKERS)


def endpoint(target: Target, process: str) -> str:
    return target.target if process == FRONTEND else target.grpc_endpoints[process]


def wrong_wire_types(method: Method) -> list[bytes]:
    """Each field with every wire type that it has not; parsers keep those as unknown fields."""
    return [
        bytes([field.number << 3 | wire]) + value
        for field in method.descriptor.input_type.fields
        if field.number < 16
        for wire, value in WIRE_VALUES.items()
    ]


def check(status: Status, method: Method, label: object) -> None:
    where = f"{label!r} to {method.path}: {status}"
    assert status.code not in OWN_FAILURES, where


def check_unreadable(status: Status, method: Method, label: object) -> None:
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT, f"{label!r} to {method.path}: {status}"


@pytest.mark.parametrize("process", PROCESSES)
async def test_what_is_no_message_is_refused(target: Target, process: str, seed: int) -> None:
    chance = random.Random(f"{seed} {process}")
    noise = [chance.randbytes(chance.choice([1, 7, 40, 300, 5_000])) for _ in range(RANDOM_MESSAGES)]
    async with target.unharmed(growth_bytes=GROWTH_BYTES), raw_channel(endpoint(target, process)) as channel:
        for method in await methods(channel):
            for label, data in {**NO_MESSAGE, **{each.hex()[:40]: each for each in noise}}.items():
                if not method.parses(data):
                    check_unreadable(await method.call(channel, data), method, label)


@pytest.mark.parametrize("process", PROCESSES)
async def test_fields_of_another_type_are_refused_or_unknown(target: Target, process: str) -> None:
    async with target.unharmed(growth_bytes=GROWTH_BYTES), raw_channel(endpoint(target, process)) as channel:
        for method in await methods(channel):
            for data in wrong_wire_types(method):
                if not method.parses(data):
                    check_unreadable(await method.call(channel, data), method, data)
                elif method.path not in SIDE_EFFECTS:
                    check(await method.call(channel, data, seconds=ENDLESS), method, data)


@pytest.mark.parametrize("process", PROCESSES)
async def test_no_value_of_any_field_is_a_failure_of_the_server(target: Target, process: str, seed: int) -> None:
    chance = random.Random(f"{seed} values {process}")
    async with target.unharmed(growth_bytes=GROWTH_BYTES), raw_channel(endpoint(target, process)) as channel:
        for method in await methods(channel):
            if method.path in SIDE_EFFECTS:
                continue
            requests = [drawn(method.request_type(), chance) for _ in range(RANDOM_MESSAGES)]
            calls = (method.call(channel, each.SerializeToString(), seconds=ENDLESS) for each in requests)
            for request, status in zip(requests, await asyncio.gather(*calls), strict=True):
                check(status, method, str(request)[:2_000])


async def test_what_is_no_grpc_ends_with_its_connection(target: Target, seed: int) -> None:
    chance = random.Random(seed)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = bytes.fromhex("000000040000000000")
    attacks = [
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        chance.randbytes(4_000),
        preface,
        preface + chance.randbytes(4_000),
        preface + settings + bytes.fromhex("ffffff") + chance.randbytes(100),
        # A frame of headers that never end, a thousand pings, a thousand streams opened and reset.
        preface + settings + bytes.fromhex("000001010000000001") + b"\x82",
        preface + settings + (bytes.fromhex("000008060000000000") + bytes(8)) * 1_000,
        preface + settings + b"".join(opened_and_reset(index) for index in range(1_000)),
    ]

    async def attack(port: int, data: bytes) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(data)
            async with asyncio.timeout(0.5):
                while await reader.read(65536):
                    pass
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for process in PROCESSES:
            port = int(endpoint(target, process).rpartition(":")[2])
            await asyncio.gather(*(attack(port, data) for data in attacks))


def opened_and_reset(index: int) -> bytes:
    stream = (2 * index + 1).to_bytes(4, "big")
    return b"\x00\x00\x01\x01\x05" + stream + b"\x82" + b"\x00\x00\x04\x03\x00" + stream + b"\x00\x00\x00\x08"


def drawn(message: Message, chance: random.Random, depth: int = 0) -> Message:
    """Some fields of the message with values at their types' ends."""
    fields = cast("Iterable[Any]", message.DESCRIPTOR.fields)
    for field in fields:
        if chance.random() < (0.5 if depth else 0.35):
            continue
        if field.is_repeated:
            repeated = getattr(message, field.name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                continue
            for _ in range(chance.choice([1, 2, 30])):
                if field.message_type is not None:
                    if depth < 3:
                        drawn(repeated.add(), chance, depth + 1)
                else:
                    repeated.append(value_of(field, chance))
        elif field.message_type is not None:
            if depth < 4:
                inner = cast("Message", getattr(message, field.name))
                inner.SetInParent()
                drawn(inner, chance, depth + 1)
        else:
            setattr(message, field.name, value_of(field, chance))
    return message


def value_of(field: FieldDescriptor, chance: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice([0, 3, 5_000]))
    if field.type == FieldDescriptor.TYPE_STRING:
        return MODEL if field.name == "model" and chance.random() < 0.8 else chance.choice(STRINGS)
    return chance.choice(EDGES[field.cpp_type])
