"""What the processes of one frontend ask each other: to abort a request that lives elsewhere, and how many there are.

gRPC over a Unix socket for each process, in a folder of the parent's. A process that doesn't answer at once, because it
is being replaced, has nothing that could be asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from kvbaton.v1 import generate_pb2, health_pb2
from services.frontend.processes.place import Place
from services.frontend.request.api import Generation
from services.transport import make_channel, make_server

log = structlog.get_logger()

Answer = TypeVar("Answer", bound=Message)
Metadata = Sequence[tuple[str, str | bytes]]

# A frozen process must not hold up an answer for longer.
CALL_TIMEOUT = 1.0
# A replaced process is found again at once; to try a socket that nobody has costs nothing.
_QUICK = (("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100))
# Two services because both have an Abort, which costs a key nothing (see `RpcGate`): of requests that live, and of
# those that may be on their way, too.
_LIVE, _ANY = "kvbaton.internal.LiveRequests", "kvbaton.internal.Requests"


class Siblings:
    """The other processes, and what this one tells them; use it as an async context manager."""

    def __init__(
        self,
        place: Place,
        generation: Generation,
        live_requests: Callable[[], int],
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """`generation` as clients may touch it; `interceptors` find out whose key a call has, as those of the port."""
        self.place = place
        self._generation = generation
        self._live_requests = live_requests
        self._server = make_server(self._register, interceptors=interceptors)
        self._stack = AsyncExitStack()
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # A process that was killed leaves its socket behind.
            self.place.socket.unlink(missing_ok=True)
            self._server.add_insecure_port(f"unix:{self.place.socket}")
            await self._server.start()
            stack.push_async_callback(self._server.stop, 0)
            for path in self.place.others:
                self._channels.append(await stack.enter_async_context(make_channel(f"unix:{path}", options=_QUICK)))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def abort(self, request_id: str, caller: Metadata) -> bool:
        """As `Generation.abort`, in all processes. `caller` is the client's metadata, or what names its key there.

        Only when no process has the request all of them remember its id: one that does would otherwise refuse the next
        request with it.
        """
        if self._generation.abort_live(request_id):
            return True
        request = generate_pb2.AbortRequest(request_id=request_id)
        if any(each.found for each in await self._ask(_LIVE, "Abort", request, generate_pb2.AbortResponse, caller)):
            return True
        found = self._generation.abort(request_id)
        answers = await self._ask(_ANY, "Abort", request, generate_pb2.AbortResponse, caller)
        return found or any(each.found for each in answers)

    async def live_requests(self, caller: Metadata) -> int:
        """Of all processes that answer."""
        answers = await self._ask(_ANY, "Status", health_pb2.StatusRequest(), health_pb2.Load, caller)
        return self._live_requests() + sum(each.live_requests for each in answers)

    async def _ask(
        self, service: str, method: str, request: Message, answer: type[Answer], caller: Metadata
    ) -> list[Answer]:
        authorization = tuple(pair for pair in caller if pair[0] == "authorization")

        async def one(channel: grpc.aio.Channel) -> Answer | None:
            call = channel.unary_unary(
                f"/{service}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            try:
                return await call(request, timeout=CALL_TIMEOUT, metadata=authorization)
            except grpc.aio.AioRpcError as error:
                log.debug("a process of this frontend does not answer", method=method, error=error.details())
                return None

        answers = await asyncio.gather(*map(one, self._channels))
        return [each for each in answers if each is not None]

    def _register(self, server: grpc.aio.Server) -> tuple[str, ...]:
        async def abort_live(request: generate_pb2.AbortRequest, _: Any) -> generate_pb2.AbortResponse:
            return generate_pb2.AbortResponse(found=self._generation.abort_live(request.request_id))

        async def abort(request: generate_pb2.AbortRequest, _: Any) -> generate_pb2.AbortResponse:
            return generate_pb2.AbortResponse(found=self._generation.abort(request.request_id))

        async def status(_: health_pb2.StatusRequest, __: Any) -> health_pb2.Load:
            return health_pb2.Load(live_requests=self._live_requests())

        handlers = (
            grpc.method_handlers_generic_handler(
                _LIVE, {"Abort": _handler(abort_live, generate_pb2.AbortRequest, generate_pb2.AbortResponse)}
            ),
            grpc.method_handlers_generic_handler(
                _ANY,
                {
                    "Abort": _handler(abort, generate_pb2.AbortRequest, generate_pb2.AbortResponse),
                    "Status": _handler(status, health_pb2.StatusRequest, health_pb2.Load),
                },
            ),
        )
        server.add_generic_rpc_handlers(handlers)
        return ()


def _handler(
    behaviour: Callable[..., Any], request: type[Message], answer: type[Message]
) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request_deserializer=request.FromString, response_serializer=answer.SerializeToString
    )
