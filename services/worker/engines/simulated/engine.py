"""The simulated engine behind the `Engine` protocol. Any number of them live in one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from starlette.applications import Starlette

from services.embedding_requests import EmbeddingSize
from services.requests import GrammarKind
from services.worker.engines.embedding_batch import EmbeddingBatches
from services.worker.engines.kv_events import KvChange, KvEvent
from services.worker.engines.probe import embedding_probe, generate_probe
from services.worker.engines.protocol import (
    EmbeddingRequest,
    EngineAbortedError,
    EngineDeadError,
    EngineDelta,
    EngineFinish,
    EngineInfo,
    EngineLoad,
    EngineRefusedError,
    EngineRequest,
    Finish,
    Grammar,
    ProbePayload,
    Role,
    Sampling,
    Vector,
)
from services.worker.engines.simulated import control
from services.worker.engines.simulated.aggregated_rank import AggregatedRank
from services.worker.engines.simulated.bootstrap import BootstrapServer, PrefillTable, listen
from services.worker.engines.simulated.decode_rank import DecodeRank
from services.worker.engines.simulated.embedding_rank import EmbeddingRank
from services.worker.engines.simulated.faults import Faults
from services.worker.engines.simulated.options import SimulatedOptions, script_file
from services.worker.engines.simulated.oracle import (
    BOS_TOKEN,
    EOS_TOKEN,
    TOKEN_BYTES,
    TokenModel,
    TokenRule,
    expected_embedding,
)
from services.worker.engines.simulated.peers import PeerTable
from services.worker.engines.simulated.prefill_rank import PrefillRank
from services.worker.engines.simulated.prompt_rank import PromptRank
from services.worker.engines.simulated.rank import Rank
from services.worker.engines.simulated.request import DeltaStream, Request
from services.worker.engines.simulated.scheduler import Scheduler
from services.worker.engines.simulated.sender import PrefillLink
from services.worker.engines.simulated.wire import INCARNATION_BYTES

_JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a prefill engine listens. `transfer_host` is what decode is told; 0 picks a free bootstrap port."""

    bootstrap_host: str = "127.0.0.1"
    bootstrap_port: int = 0
    transfer_host: str = "127.0.0.1"


class SimulatedEngine:
    """See `protocol.Engine`."""

    def __init__(self, role: Role, options: SimulatedOptions, addresses: Addresses | None = None) -> None:
        self.role = role
        self.options = options
        self.faults = Faults()
        self.model = TokenModel(options.vocab_size, options.eos_rate)
        self.incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self.scheduler = Scheduler(options, self.faults, self._died)
        self.http_app: Starlette = control.create_app(self)
        """GET and POST /simulator, mounted into the worker's system HTTP."""
        self._addresses = addresses or Addresses()
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: asyncio.Future[str] | None = None
        self._listeners: list[socket.socket] = []
        self._bootstrap: BootstrapServer | None = None
        self._data_servers: list[asyncio.Server] = []
        self._peers: PeerTable | None = None
        self._kv_changes: asyncio.Queue[KvChange] | None = None
        self._embeddings = EmbeddingBatches(self._embed_one)

    @property
    def bootstrap_port(self) -> int:
        """The bound bootstrap port; only in the prefill role, after `start`."""
        return int(self._listeners[0].getsockname()[1])

    def start(self) -> None:
        """See the protocol. Binds every port of the prefill role."""
        options, addresses = self.options, self._addresses
        if (script := script_file(options)) is not None:
            self.model.load_script(script)
        if self._closing.wait(options.start_seconds):
            raise RuntimeError("the engine was shut down")
        if self.role is Role.PREFILL:
            self._listeners = [listen(addresses.bootstrap_host, addresses.bootstrap_port, "the bootstrap server")]
            for rank in range(options.dp_size):
                port = options.data_port + rank if options.data_port else 0
                self._listeners.append(listen(addresses.bootstrap_host, port, f"data socket of dp rank {rank}"))

    async def attach(self) -> None:
        """See the protocol."""
        loop = self._loop = asyncio.get_running_loop()
        self._dead = loop.create_future()
        ranks = range(self.options.dp_size)
        if self.role is Role.PREFILL:
            await self._attach_prefill([PrefillRank(*self._rank(i), **self._keeps(i)) for i in ranks])
        elif self.role is Role.DECODE:
            clock = self.scheduler.clock
            decode = [
                DecodeRank(*self._rank(i), incarnation=self.incarnation, find_peer=self._find_peer, clock=clock)
                for i in ranks
            ]
            self._peers = PeerTable(self.options, self.incarnation, [*decode], self.scheduler.wake)
            self.scheduler.start(decode)
        else:
            rank = EmbeddingRank if self.role is Role.EMBEDDING else AggregatedRank
            self.scheduler.start([rank(*self._rank(i), tell=self._teller(i)) for i in ranks])

    def info(self) -> EngineInfo:
        """See the protocol."""
        options = self.options
        return EngineInfo(
            engine="simulated",
            engine_version="1",
            torch_version="",
            nixl_version="",
            page_size=options.page_size,
            max_total_tokens=options.pages * options.page_size,
            max_running_requests=options.max_running_requests,
            max_batched_tokens=options.chunk_tokens,
            max_prompt_tokens=options.max_prompt_tokens,
            context_length=options.context_length,
            vocab_size=options.vocab_size,
            tp_size=1,
            pp_size=1,
            dp_size=options.dp_size,
            kv_cache_dtype="uint32",
            kv_bytes_per_token=TOKEN_BYTES,
            transfer_backend="tcp",
            eos_token_ids=(EOS_TOKEN,),
            bos_token_id=BOS_TOKEN,
            seeded_sampling=True,
            grammar_backend=options.grammar_backend,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            cache_salts=True,
            has_kv_events=self.role in (Role.PREFILL, Role.AGGREGATED) and options.prefix_cache,
            embedding=self._embedding_size(),
        )

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        """See the protocol. The request is live from this call on."""
        try:
            if self.scheduler.cause:
                raise EngineDeadError(self.scheduler.cause)
            self._check(request)
        except (EngineDeadError, EngineRefusedError) as error:
            refused = DeltaStream()
            refused.put(error)
            return refused.deltas()
        live = Request.of(request, TokenRule(self.model, request.sampling), self.scheduler.clock())
        self.scheduler.submit(self._choose_rank(request), live)
        return live.stream.deltas()

    async def embed(self, request: EmbeddingRequest) -> list[Vector]:
        """See the protocol."""
        return await self._embeddings.run(request, self.abort)

    async def _embed_one(self, engine_id: str, token_ids: list[int], request: EmbeddingRequest) -> Vector:
        async for delta in self.generate(EngineRequest(engine_id, token_ids, Sampling(max_new_tokens=1))):
            if delta.finish is not None and delta.finish.reason is Finish.ABORT:
                raise EngineAbortedError(delta.finish)
        return expected_embedding(token_ids, request.dimensions or self.options.embedding_dimension)

    def _embedding_size(self) -> EmbeddingSize | None:
        if self.role is not Role.EMBEDDING:
            return None
        return EmbeddingSize(self.options.embedding_dimension, self.options.matryoshka)

    async def abort(self, engine_id: str) -> None:
        """See the protocol. A frozen scheduler drops the request when it thaws; its stream ends before."""
        for each in (engine_id, *self._embeddings.inputs_of(engine_id)):
            self._abort_one(each)

    def _abort_one(self, engine_id: str) -> None:
        found = self.scheduler.live.get(engine_id)
        if found is None or found[1].aborting:
            return
        request = found[1]
        request.aborting = True
        self.scheduler.abort(engine_id)

        def end() -> None:
            message = f"aborted; the engine did not confirm it within {self.options.abort_timeout:g} s"
            finish = EngineFinish(
                Finish.ABORT,
                message=message,
                prompt_tokens=len(request.prompt),
                completion_tokens=request.stream.delivered,
            )
            request.stream.put(EngineDelta([], finish))

        asyncio.get_running_loop().call_later(self.options.abort_timeout, end)

    async def loads(self) -> list[EngineLoad]:
        """See the protocol. What a frozen scheduler said last is as old as the freeze."""
        if self.scheduler.cause:
            raise EngineDeadError(self.scheduler.cause)
        if self.faults.silent:
            raise TimeoutError("the engine does not report its load")
        return self.scheduler.loads()

    async def probe(self, dp_rank: int = 0, payload: ProbePayload | None = None) -> None:
        """See the protocol."""
        if self.role is Role.EMBEDDING:
            await embedding_probe(self, payload)
            return
        port = self._addresses.bootstrap_port if self.role.disaggregated else None
        await generate_probe(self, payload, dp_rank=dp_rank, bootstrap_port=port)

    def kv_events(self) -> AsyncIterator[KvChange]:
        """See the protocol."""
        arrived: asyncio.Queue[KvChange] = asyncio.Queue()
        if not self.info().has_kv_events:
            return _nothing()
        # Whoever asks again has forgotten all: so does the cache, or they would never agree.
        if self._kv_changes is not None:
            self._flush()
        self._kv_changes = arrived
        return _all_of(arrived)

    async def flush_cache(self) -> bool:
        """See the protocol."""
        if self.scheduler.cause:
            raise EngineDeadError(self.scheduler.cause)
        if self.scheduler.live:
            return False
        self._flush()
        return True

    def collect_metrics(self) -> Iterable[Metric]:
        """See the protocol. There are no children."""
        return ()

    async def wait_dead(self) -> str:
        """See the protocol."""
        if self._dead is None:
            raise RuntimeError("the engine is not attached")
        return await asyncio.shield(self._dead)

    def shutdown(self) -> None:
        """See the protocol."""
        self._closing.set()
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._close, "the engine was shut down")
        else:
            for listener in self._listeners:
                listener.close()

    def crash(self) -> None:
        """The scheduler is gone, with all its connections; the host isn't."""
        self.scheduler.die("the simulated scheduler was killed")

    def kill_process(self) -> None:
        """The whole process is gone, by SIGKILL, once the answer to the command is out."""
        assert self._loop is not None
        self._loop.call_later(0.05, os.kill, os.getpid(), signal.SIGKILL)

    async def _attach_prefill(self, ranks: list[PrefillRank]) -> None:
        assert self._loop is not None
        self.scheduler.start(ranks)
        for rank, listener in zip(ranks, self._listeners[1:], strict=True):

            def accept(rank: PrefillRank = rank) -> PrefillLink:
                return PrefillLink(rank)

            self._data_servers.append(await self._loop.create_server(accept, sock=listener))
        host, faults = self._addresses.transfer_host, self.faults
        sockets = tuple((host, int(listener.getsockname()[1])) for listener in self._listeners[1:])
        self._bootstrap = BootstrapServer(self._listeners[0], lambda: faults.silent, lambda: faults.bootstrap_delay)
        await self._bootstrap.start(PrefillTable(self.incarnation, self.options.page_size, sockets))

    def _rank(self, index: int) -> tuple[Any, ...]:
        return (index, self.options, self.faults, self.scheduler.forget, self.scheduler.post)

    def _keeps(self, index: int) -> dict[str, Any]:
        return {"tell": self._teller(index), "incarnation": self.incarnation}

    def _teller(self, index: int) -> Callable[[KvEvent], None]:
        def tell(event: KvEvent) -> None:
            if self._kv_changes is not None:
                self._kv_changes.put_nowait(KvChange(index, event))

        return tell

    def _flush(self) -> None:
        for rank in self.scheduler.ranks:
            if isinstance(rank, PromptRank):
                rank.flush_cache()

    def _find_peer(self, address: tuple[str, int]) -> Any:
        assert self._peers is not None
        return self._peers.get(address)

    def _check(self, request: EngineRequest) -> None:
        """SGLang's own validation."""
        options, tokens = self.options, request.token_ids
        if request.engine_id in self.scheduler.live:
            raise EngineRefusedError(f"engine id {request.engine_id} is in use")
        if not tokens:
            raise EngineRefusedError("the prompt is empty")
        if min(tokens) < 0 or max(tokens) >= options.vocab_size:
            raise EngineRefusedError(f"the prompt has token ids outside [0, {options.vocab_size})")
        if len(tokens) > options.max_prompt_tokens:
            raise EngineRefusedError(f"the prompt has {len(tokens)} tokens, at most {options.max_prompt_tokens}")
        if request.sampling.max_new_tokens < 1:
            raise EngineRefusedError("max_new_tokens must be at least 1")
        if len(tokens) + request.sampling.max_new_tokens > options.pages * options.page_size:
            raise EngineRefusedError("prompt and max_new_tokens don't fit into the KV pool")
        if request.dp_rank is not None and not 0 <= request.dp_rank < options.dp_size:
            raise EngineRefusedError(f"dp_rank {request.dp_rank}: there are {options.dp_size}")
        if request.sampling.grammar is not None:
            self._check_grammar(request.sampling.grammar)
        if self.role.disaggregated and request.room is None:
            raise EngineRefusedError("Disaggregated request received without bootstrap room id")

    def _check_grammar(self, grammar: Grammar) -> None:
        """What a compiler would find at first sight."""
        try:
            if not self.options.grammar_backend:
                raise ValueError("the simulated engine takes none without a script")
            if grammar.kind is GrammarKind.REGEX:
                re.compile(grammar.source)
            elif grammar.kind is GrammarKind.JSON_SCHEMA:
                kind = json.loads(grammar.source).get("type", "object")
                if isinstance(kind, str) and kind not in _JSON_TYPES:
                    raise ValueError(f"unsupported type {kind!r}")
        except (ValueError, re.error) as error:
            raise EngineRefusedError(str(error), field=grammar.field) from error

    def _choose_rank(self, request: EngineRequest) -> Rank:
        ranks = self.scheduler.ranks
        if request.dp_rank is not None:
            return ranks[request.dp_rank]
        if self.role is Role.PREFILL and request.room is not None:
            return ranks[request.room.room % len(ranks)]
        return min(ranks, key=lambda rank: len(rank.live))

    def _died(self, cause: str) -> None:
        """In the loop: the scheduler's connections end with it; the bootstrap server is the host's."""
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(cause)
        for server in self._data_servers:
            server.close()
        for rank in self.scheduler.ranks:
            for link in list(getattr(rank, "links", ())):
                link.close()
        if self._peers is not None:
            self._peers.close()

    def _close(self, cause: str) -> None:
        self.scheduler.die(cause)
        self._died(cause)
        if self._bootstrap is not None:
            self._bootstrap.close()


async def _all_of(arrived: asyncio.Queue[KvChange]) -> AsyncIterator[KvChange]:
    while True:
        yield await arrived.get()


async def _nothing() -> AsyncIterator[KvChange]:
    return
    yield  # makes it a generator
