"""SGLang behind the `Engine` protocol: built in the main thread, used from the serving thread's event loop.

SGLang's own processes are children of this one: a scheduler per rank and a detokenizer. What they say comes back over
its tokenizer manager, which lives in the event loop that `attach` is called in.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import os
import threading
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal

import psutil
import structlog
from prometheus_client import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from services.config.yaml_file import ConfigFile
from services.modes import Probe
from services.telemetry.otlp import OtlpTarget
from services.transport import PortTakenError, join_host_port
from services.worker.engines import sglang_compat as compat
from services.worker.engines.embedding_batch import EmbeddingBatches
from services.worker.engines.grammar_trials import GrammarTrials
from services.worker.engines.kv_events import KvChange
from services.worker.engines.probe import embedding_probe, generate_probe
from services.worker.engines.protocol import (
    EmbeddingRequest,
    EngineAbortedError,
    EngineDeadError,
    EngineDelta,
    EngineInfo,
    EngineLoad,
    EngineRefusedError,
    EngineRequest,
    Finish,
    ProbePayload,
    Role,
    Vector,
)
from services.worker.engines.sglang_child import run_detokenizer, run_scheduler
from services.worker.engines.sglang_death import DeathWatch, take_sigquit
from services.worker.engines.sglang_grammar import marker
from services.worker.engines.sglang_introspect import engine_info
from services.worker.engines.sglang_kv_events import SglangKvEvents
from services.worker.engines.sglang_launch import (
    KvSockets,
    SglangOptions,
    TmpDir,
    apply_environment,
    default_fields,
    forced_fields,
    prepare_import_path,
    remove_stale_tmp_dirs,
)
from services.worker.engines.sglang_logging import write_logging_config
from services.worker.engines.sglang_stream import Chunk, LiveRequest, call_arguments, check_request, check_tokens

__all__ = ["SglangEngine", "SglangOptions", "check_native_flags", "spans_target"]

_FIRST_SNAPSHOT_TIMEOUT_S = 10.0
_LOADS_TIMEOUT_S = 1.0
_BOOTSTRAP_LISTEN_TIMEOUT_S = 5.0
_ABORT_RETRY_S = 0.01
_KILL_TIMEOUT_S = 30.0
# Past SGLang's own time-outs, whose messages say more.
_BACKSTOP_MARGIN_S = 2.0
_SPAWN_SETTLING_S = 0.1
_FLUSH_TIMEOUT_S = 10.0

_log = structlog.get_logger(__name__)


def check_native_flags(
    device: Literal["cpu", "cuda"], native_args: Sequence[str], native_file: ConfigFile | None
) -> None:
    """Raises NativeArgumentError for what SGLang's parser refuses. Loads SGLang, which takes seconds."""
    prepare_import_path(device)
    if device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    server_args = compat.server_args_class()
    compat.given_fields(server_args, [*compat.file_arguments(server_args, native_file), *native_args])


def spans_target(environment: Mapping[str, str]) -> OtlpTarget | None:
    """Where SGLang's own spans go; None, and a line in the log, where it can't send them there."""
    target = OtlpTarget.from_environment(environment)
    if environment.get("OTEL_TRACES_EXPORTER") == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if why := compat.why_no_spans(target):
        _log.warning("sglang_exports_no_spans", why=why)
        return None
    return target


class SglangEngine:
    """See `protocol.Engine`. One per process, because SGLang keeps its configuration in globals."""

    def __init__(self, options: SglangOptions) -> None:
        self._options = options
        self._death = DeathWatch()
        self._live: dict[str, LiveRequest] = {}
        self._pumps: dict[str, asyncio.Task[None]] = {}
        self._embeddings = EmbeddingBatches(self._embed_one)
        self._sglang: Any = None
        self._outputs: asyncio.Task[None] | None = None
        self._dead: asyncio.Future[str] | None = None
        self._info: EngineInfo | None = None
        self._tmp_dir: TmpDir | None = None
        self._grammars: GrammarTrials | None = None
        self._load_reader = ThreadPoolExecutor(1, thread_name_prefix="sglang-loads")
        self._reading: asyncio.Future[Sequence[Any]] | None = None
        self._closing = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """See the protocol. Takes SIGQUIT of this process, for good."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("an SGLang engine has to be built in the main thread")
        options = self._options
        prepare_import_path(options.device)
        remove_stale_tmp_dirs(options.tmp_root)
        self._tmp_dir = TmpDir(options.tmp_root)
        apply_environment(options, self._tmp_dir.path, os.environ)
        # Its first start would unblock SIGTERM and SIGINT in the thread that builds.
        resource_tracker.ensure_running()
        take_sigquit(self._death)
        self._death.launching = True
        gc.disable()  # full collections of what SGLang imports would stall the threads that serve meanwhile
        try:
            self._sglang = self._build(self._tmp_dir.path)
            self._death.launching = False
            self._after_launch(self._tmp_dir.path)
        except Exception as error:
            self._death.launching = False
            self.shutdown()
            raise RuntimeError(f"SGLang could not be started: {error}") from error
        finally:
            gc.freeze()
            gc.enable()

    async def attach(self) -> None:
        """See the protocol."""
        loop = asyncio.get_running_loop()
        self._dead = loop.create_future()
        if self._sglang.tokenizer_manager is not None:
            self._outputs = loop.create_task(self._handle_outputs(), name="sglang-outputs")

        def tell(cause: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._end_everything, cause)

        self._death.listen(tell)

    def info(self) -> EngineInfo:
        """See the protocol."""
        if self._info is None:
            raise RuntimeError("the engine is not started, or serves no requests itself")
        return self._info

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        """See the protocol. The request is live from this call on, so an abort can't come too early for it."""
        grammar = request.sampling.grammar
        live = LiveRequest(
            request.engine_id, len(request.token_ids), logprobs=request.logprobs is not None, grammar=grammar
        )
        try:
            self._raise_if_dead()
            if request.engine_id in self._live:
                raise EngineRefusedError(f"engine id {request.engine_id} is in use")
            check_request(request, self.info().vocab_size, seeded=self.info().seeded_sampling)
        except (EngineDeadError, EngineRefusedError) as error:
            live.fail(error)
        else:
            ranks = self.info().dp_size if self._options.role is Role.PREFILL else 0
            arguments = call_arguments(request, seeded=self.info().seeded_sampling, prefill_ranks=ranks)

            async def open_stream() -> AsyncIterator[Chunk]:
                if grammar is not None and self._grammars is not None:
                    await self._grammars.require(grammar)
                return await self._sglang.async_generate(**arguments)

            self._submit(live, open_stream)
        return live.deltas()

    async def embed(self, request: EmbeddingRequest) -> list[Vector]:
        """See the protocol. Spread over the dp ranks by SGLang's own balancing."""
        self._raise_if_dead()
        for token_ids in request.inputs:
            check_tokens(token_ids, self.info().vocab_size)
        return await self._embeddings.run(request, self.abort)

    async def _embed_one(self, engine_id: str, token_ids: list[int], request: EmbeddingRequest) -> Vector:
        live = LiveRequest(engine_id, len(token_ids))

        async def open_stream() -> AsyncIterator[Chunk]:
            return compat.embedding_stream(
                self._sglang.tokenizer_manager,
                engine_id=engine_id,
                token_ids=token_ids,
                dimensions=request.dimensions,
                trace_headers=request.trace_headers,
            )

        self._submit(live, open_stream)
        async for delta in live.deltas():
            if delta.finish is not None and delta.finish.reason is Finish.ABORT:
                raise EngineAbortedError(delta.finish)
        return array("f", live.embedding)

    async def abort(self, engine_id: str) -> None:
        """See the protocol. Also for a request whose iterator was dropped."""
        for each in (engine_id, *self._embeddings.inputs_of(engine_id)):
            if (live := self._live.get(each)) is not None:
                self._abort(live)

    def _abort(self, live: LiveRequest) -> None:
        if live.aborting:
            return
        live.aborting = True
        if not live.opened:  # its grammar may be on trial, which is no reason to wait
            pump = self._pumps[live.engine_id]
            pump.add_done_callback(lambda _: live.end_aborted("aborted before it reached the engine"))
            pump.cancel()
            return
        asyncio.get_running_loop().call_later(
            self._options.abort_timeout_s,
            live.end_aborted,
            f"aborted; the engine did not confirm it within {self._options.abort_timeout_s:g} s",
        )
        self._send_abort(live)

    async def loads(self) -> list[EngineLoad]:
        """See the protocol. Reads shared memory that the schedulers write after each batch and when they fall idle.

        In one thread of the engine's own: the file is locked while it is read, a frozen scheduler may hold the lock,
        and neither reader nor lock is made for several threads. Callers that come meanwhile share the read.
        """
        self._raise_if_dead()
        if self._reading is None or self._reading.done():
            reader: Any = self._sglang.tokenizer_manager.load_snapshot_reader
            self._reading = asyncio.get_running_loop().run_in_executor(self._load_reader, reader.read_all)
        snapshots: Sequence[Any] = await asyncio.wait_for(asyncio.shield(self._reading), _LOADS_TIMEOUT_S)
        return [compat.load_of(snapshot) for snapshot in snapshots]

    async def probe(self, dp_rank: int = 0, payload: ProbePayload | None = None) -> None:
        """See the protocol. In a prefill or decode role it proves the scheduler and not the transfer.

        An embedding goes to the rank whose turn it is: SGLang doesn't let one choose.
        """
        try:
            async with asyncio.timeout(self._options.probe_timeout_s):
                if self._options.mode.probe is Probe.EMBEDDING:
                    await embedding_probe(self, payload)
                    return
                pretended = self._options.mode.probe is Probe.TOKEN_WITHOUT_PEER
                port = self._options.bootstrap_port if pretended else None
                await generate_probe(self, payload, dp_rank=dp_rank, bootstrap_port=port)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._options.probe_timeout_s:g} s") from None

    async def kv_events(self) -> AsyncIterator[KvChange]:
        """See the protocol. Each time from the first event on, as far back as SGLang remembers."""
        if not self.info().has_kv_events or self._tmp_dir is None:
            return
        events = SglangKvEvents(KvSockets(self._tmp_dir.path), self.info().dp_size, self.flush_cache)
        async with contextlib.aclosing(events.changes()) as changes:  # type: ignore[type-var]
            async for change in changes:
                yield change

    async def flush_cache(self) -> bool:
        """See the protocol. SGLang answers for its first dp rank alone, so that the host looks at all of them."""
        self._raise_if_dead()
        if self._live:
            return False
        async with asyncio.timeout(_FLUSH_TIMEOUT_S):
            return bool((await self._sglang.tokenizer_manager.flush_cache()).success)

    def collect_metrics(self) -> Iterable[Metric]:
        """See the protocol. What SGLang measures in this process is in this process's own registry."""
        if not self._options.metrics or self._sglang is None:
            return ()
        return MultiProcessCollector(None).collect()  # pyright: ignore[reportArgumentType]

    async def wait_dead(self) -> str:
        """See the protocol."""
        if self._dead is None:
            raise RuntimeError("the engine is not attached")
        return await asyncio.shield(self._dead)

    def shutdown(self) -> None:
        """See the protocol. Kills every child of this process; during `start`, from another thread, those too.

        SGLang's own shutdown isn't used: it kills the resource tracker too, and what the children left in
        /dev/shm then stays there.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            launching, self._death.launching = self._death.launching, False
            self._death.declare("the engine was shut down")
            serving = self._sglang is not None and self._sglang.tokenizer_manager is not None
            if serving:
                compat.stop_host_side(self._sglang)
            _kill_children()
            if launching:  # in another thread, which may have been about to spawn; what still slips by ends itself
                time.sleep(_SPAWN_SETTLING_S)
                _kill_children()
            if serving and (snapshots := compat.snapshot_file(self._sglang)):
                Path(snapshots).unlink(missing_ok=True)
            if self._tmp_dir is not None:
                self._tmp_dir.remove()

    def _build(self, tmp_dir: Path) -> Any:
        options = self._options
        server_args = compat.build_server_args(
            compat.server_args_class(),
            options.native_args,
            options.native_file,
            defaults=default_fields(options),
            forced=forced_fields(options, KvSockets(tmp_dir) if options.tells_kv_events else None),
        )
        compat.allow_min_new_tokens()
        write_logging_config(str(server_args.log_level), tmp_dir, os.environ)
        entry_points = {
            "run_scheduler_process_func": staticmethod(run_scheduler),
            "run_detokenizer_process_func": staticmethod(run_detokenizer),
        }
        return type("HostedEngine", (compat.engine_class(),), entry_points)(server_args=server_args)

    def _after_launch(self, tmp_dir: Path) -> None:
        sglang = self._sglang
        # Ours, ahead of multiprocessing's own handler, which waits for the children for ever.
        atexit.unregister(sglang.shutdown)
        atexit.register(self.shutdown)
        take_sigquit(self._death)
        self._death.watch(sglang.get_all_child_pids())
        if sglang.tokenizer_manager is None:
            return  # a node behind the first: its schedulers take their orders from there
        if self._options.mode.has_bootstrap:
            self._require_own_bootstrap_server()
        self._info = engine_info(
            sglang,
            scheduler_info=sglang._scheduler_init_result.scheduler_infos[0],  # noqa: SLF001
            max_running_requests=self._max_running_requests(),
            seeds_always=self._options.device == "cpu",
            tells_kv_events=self._options.tells_kv_events,
            has_grammars=marker(tmp_dir).exists(),
        )
        if self._info.grammar_backend == "xgrammar":
            self._grammars = GrammarTrials(tmp_dir, self._info.vocab_size, self._info.eos_token_ids)

    def _require_own_bootstrap_server(self) -> None:
        """Raises PortTakenError when somebody else took the port while the engine was being built.

        SGLang only logs that, and its schedulers have then registered at a stranger's.
        """
        options, deadline = self._options, time.monotonic() + _BOOTSTRAP_LISTEN_TIMEOUT_S
        while options.bootstrap_port not in _listening_ports():
            if time.monotonic() > deadline:
                address = join_host_port(options.bootstrap_host, options.bootstrap_port)
                raise PortTakenError(
                    f"can't listen on {address}: lost while the engine was being built; choose another with"
                    " --disaggregation-bootstrap-port"
                )
            time.sleep(0.05)

    def _max_running_requests(self) -> int:
        """Per rank, from the schedulers' first load snapshot: SGLang derives it from the memory that is left."""
        reader: Any = self._sglang.tokenizer_manager.load_snapshot_reader
        deadline = time.monotonic() + _FIRST_SNAPSHOT_TIMEOUT_S
        while time.monotonic() < deadline and self._death.cause is None:
            for snapshot in reader.read_all():
                if snapshot.max_running_requests > 0:
                    return int(snapshot.max_running_requests)
            time.sleep(0.02)
        raise RuntimeError(self._death.cause or "the scheduler reported no load after it was ready")

    def _submit(self, live: LiveRequest, open_stream: Callable[[], Awaitable[AsyncIterator[Chunk]]]) -> None:
        loop = asyncio.get_running_loop()
        backstop = loop.call_later(self._options.backstop_timeout_s + _BACKSTOP_MARGIN_S, self._backstop, live)

        def forget(_pump: asyncio.Task[None]) -> None:
            backstop.cancel()
            self._live.pop(live.engine_id, None)
            self._pumps.pop(live.engine_id, None)

        self._live[live.engine_id] = live
        pump = loop.create_task(live.pump(open_stream), name=f"sglang-{live.engine_id}")
        self._pumps[live.engine_id] = pump
        pump.add_done_callback(forget)

    def _backstop(self, live: LiveRequest) -> None:
        """Abort a prefill leg whose peer never came: SGLang 0.5.17 keeps it for ever over NIXL."""
        if self._options.role is Role.PREFILL and not live.done:
            _log.warning("prefill_leg_aborted_by_backstop", engine_id=live.engine_id)
            self._abort(live)

    def _send_abort(self, live: LiveRequest) -> None:
        """Abort in the scheduler, as soon as it knows the request."""
        if live.engine_id not in self._pumps:
            return
        manager = self._sglang.tokenizer_manager
        if compat.is_dispatched(manager, live.engine_id):
            manager.abort_request(live.engine_id)
        elif not live.done:
            asyncio.get_running_loop().call_later(_ABORT_RETRY_S, self._send_abort, live)

    async def _handle_outputs(self) -> None:
        try:
            await compat.handle_outputs(self._sglang.tokenizer_manager)
        except Exception as error:  # noqa: BLE001 - whatever it was, no request can end any more
            _log.exception("sglang_output_loop_failed")
            self._death.declare(f"SGLang's output loop failed: {error}")

    def _end_everything(self, cause: str) -> None:
        """The engine is dead: end every request and tell `wait_dead`. In the loop."""
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(cause)
        for live in list(self._live.values()):
            live.fail(EngineDeadError(cause))
        for task in [*self._pumps.values(), *([self._outputs] if self._outputs else [])]:
            task.cancel()

    def _raise_if_dead(self) -> None:
        if self._death.cause is not None:
            raise EngineDeadError(self._death.cause)


def _kill_children() -> None:
    """SIGKILL this process's descendants until there are none: a launch in another thread may still be adding some."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (children := _running_children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1.0)


def _listening_ports() -> set[int]:
    """TCP ports on which this process and its children listen."""
    found: set[int] = set()
    for process in [psutil.Process(), *_running_children()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("tcp")
            found |= {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def _running_children() -> list[psutil.Process]:
    """Without multiprocessing's resource tracker, which cleans up after the others and ends with this process."""
    tracker: int | None = getattr(resource_tracker, "_resource_tracker")._pid  # noqa: B009, SLF001

    def runs(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status() != psutil.STATUS_ZOMBIE
        return False

    return [each for each in psutil.Process().children(recursive=True) if each.pid != tracker and runs(each)]
