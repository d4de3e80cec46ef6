"""gRPC as no stub would send it: any bytes as the message of any method that a server says it has."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

# Their descriptors are found by the names that reflection tells, once they are imported.
CONTRACTS = ("admin", "bootstrap", "embed", "generate", "health", "kv_events", "model", "session", "text", "worker")

_LARGEST = 128 * 2**20
_OPTIONS = [("grpc.max_send_message_length", _LARGEST), ("grpc.max_receive_message_length", _LARGEST)]


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended. OK also for one that had not ended when its time was up."""

    code: grpc.StatusCode
    details: str


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    descriptor: MethodDescriptor

    @property
    def path(self) -> str:
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"

    @property
    def request_type(self) -> type[Message]:
        return message_factory.GetMessageClass(self.descriptor.input_type)

    def parses(self, data: bytes) -> bool:
        """Whether `data` is a request of this method."""
        try:
            self.request_type.FromString(data)
        except DecodeError:
            return False
        return True

    async def call(self, channel: grpc.aio.Channel, data: bytes, *, seconds: float = 5.0) -> Status:
        """Sends `data` as the only message, reads what comes for at most `seconds`."""
        kinds = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        method = self.descriptor
        multi: Any = kinds[method.client_streaming, method.server_streaming](self.path)
        argument: Any = iter([data]) if method.client_streaming else data
        call = multi(argument, timeout=seconds + 5)
        try:
            async with asyncio.timeout(seconds):
                if method.server_streaming:
                    async for _ in call:
                        pass
                else:
                    await call
        except TimeoutError:
            call.cancel()
        except grpc.aio.AioRpcError as error:
            return Status(error.code(), error.details() or "")
        return Status(grpc.StatusCode.OK, "")


@contextlib.asynccontextmanager
async def raw_channel(endpoint: str) -> AsyncGenerator[grpc.aio.Channel]:
    """A channel that sends what it is given."""
    async with grpc.aio.insecure_channel(endpoint, options=_OPTIONS) as channel:
        yield channel


async def methods(channel: grpc.aio.Channel) -> list[Method]:
    """Every method of ours that the server at the other end has, by reflection."""
    for name in CONTRACTS:
        importlib.import_module(f"kvbaton.v1.{name}_pb2")
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))

    def ask() -> Iterable[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async for answer in stub.ServerReflectionInfo(ask()):
        names = [each.name for each in answer.list_services_response.service]
        services = [descriptor_pool.Default().FindServiceByName(name) for name in names if name.startswith("kvbaton.")]
        return [Method(method) for service in services for method in service.methods]
    raise AssertionError("the server did not list its services")
