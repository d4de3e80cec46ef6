"""The worker's process: who runs in which thread, and what a signal does.

The main thread builds the engine, because SGLang must be built there and blocks for minutes. The serving thread runs
the event loop from the first moment, so that health is answered while the engine loads. A third thread waits for
SIGTERM and SIGINT, which every other thread and all of the engine's children block: Ctrl-C in a terminal reaches the
whole process group, and a scheduler that dies with it would take the drain along.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import resource_tracker
from pathlib import Path

import structlog
import uvloop

from kvbaton.v1 import worker_pb2
from services import heap
from services.config.errors import ConfigError
from services.config.report import Setting, for_log
from services.config.worker import WorkerConfig
from services.models.resolve import ModelResolutionError, ResolvedModel, resolve_model_path, wait_for_model
from services.modes import contract_of, mode_of
from services.requests import Role
from services.telemetry.logging import configure_logging
from services.telemetry.tracing import configure_tracing
from services.transport import PortTakenError, require_free_port
from services.worker.advertise import AdvertiseError
from services.worker.engines.protocol import Engine
from services.worker.follower import FollowerHost
from services.worker.host import WorkerHost

log = structlog.get_logger()

# What went wrong is all in the message.
_EXPLAINED = (ModelResolutionError, ConfigError)
_Host = WorkerHost | FollowerHost

# service.name of the spans.
_SERVICES = {
    Role.PREFILL: "kvbaton-worker-prefill",
    Role.DECODE: "kvbaton-worker-decode",
    Role.AGGREGATED: "kvbaton-worker",
    Role.EMBEDDING: "kvbaton-worker-embedding",
}

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_worker(config: WorkerConfig, settings: Sequence[Setting] = ()) -> int:
    """Runs one worker until a signal ends it; `settings` are logged. Returns the exit status.

    Must be called in the main thread.
    """
    configure_logging(level=config.log.log_level, format=config.log.log_format, service=config.role)
    log.info("configuration", **for_log(settings))
    # Its first start unblocks signals, so it comes before the mask; the engine would start it anyway.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        # Behind the mask too: it starts threads.
        flush_spans = configure_tracing(enabled=config.trace.enable_otel, service=_SERVICES[config.role])
        if mode_of(config.role).has_bootstrap and not config.node_rank:
            # SGLang's own server only logs that its port is taken, and the schedulers then register at whoever has it.
            require_free_port(config.host, config.disaggregation_bootstrap_port, flag="--disaggregation-bootstrap-port")
        try:
            return _Process(config).run()
        finally:
            flush_spans()
    except (ModelResolutionError, PortTakenError, AdvertiseError, ValueError) as error:
        log.error("worker can't start", error=str(error))
        return 1


class _Process:
    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._loop = uvloop.new_event_loop()
        self._listening: Future[_Host] = Future()
        self._exit_status: Future[int] = Future()
        self._resolved: ResolvedModel | None = None
        self._engine: Engine | None = None
        self._attached = threading.Event()

    def run(self) -> int:
        serving = threading.Thread(target=self._serve, name="serving", daemon=True)
        serving.start()
        host = self._listening.result()
        threading.Thread(target=self._wait_for_signal, args=(host,), name="signals", daemon=True).start()
        try:
            _check_engine_flags(self._config)
            self._resolved = _resolve_model(self._config)
            # The address that SGLang was told by hand is where the other legs reach it.
            transfer_host = os.environ.get("SGLANG_HOST_IP") or host.advertised_host
            self._engine = self._make_engine(self._resolved.path, transfer_host)
            self._engine.start()
        except Exception as error:
            log.error("engine not built", error=str(error), exc_info=not isinstance(error, _EXPLAINED))
            self._loop.call_soon_threadsafe(host.engine_failed, error)
        else:
            self._attached.set()
            self._loop.call_soon_threadsafe(host.engine_built, self._engine)
        try:
            status = self._exit_status.result()
        finally:
            if self._engine is not None:
                self._engine.shutdown()
        if status:
            log.error("stopped", cause=host.cause)
        else:
            log.info("stopped")
        return status

    def _serve(self) -> None:
        """The serving thread."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                self._exit_status.set_result(runner.run(self._host()))
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            if not self._listening.done():
                self._listening.set_exception(error)
            self._exit_status.set_exception(error)

    async def _host(self) -> int:
        host: _Host
        if self._config.node_rank:
            host = FollowerHost(self._config)
        else:
            host = WorkerHost(self._config, contract_of, self._model, ready=heap.settle)
        return await host.run(lambda: self._listening.set_result(host))

    def _wait_for_signal(self, host: _Host) -> None:
        """The signals thread. A second signal cuts the drain short, a third ends the process at once."""
        received = signal.Signals(signal.sigwait(_STOP_SIGNALS))
        log.info("stopping", signal=received.name)
        if self._attached.is_set():
            self._loop.call_soon_threadsafe(host.stop)
            signal.sigwait(_STOP_SIGNALS)
            log.warning("second signal: not waiting for the drain")
            self._loop.call_soon_threadsafe(host.hurry)
            signal.sigwait(_STOP_SIGNALS)
        # Nothing is registered yet (or the operator insists): what must not stay behind is the engine's children.
        if self._engine is not None:
            self._engine.shutdown()
        os._exit(128 + received)

    def _make_engine(self, model_path: Path, transfer_host: str) -> Engine:
        if self._config.engine == "simulated":
            return _simulated_engine(self._config, transfer_host)
        # Imported late: SGLang pulls torch, and health must answer before that is done.
        from services.worker.engines.sglang import SglangEngine, SglangOptions, spans_target

        config = self._config
        return SglangEngine(
            SglangOptions(
                role=config.role,
                model_path=str(model_path),
                served_model_name=self._served_name(),
                device=config.device,
                bootstrap_host=config.host,
                bootstrap_port=config.disaggregation_bootstrap_port,
                transfer_host=transfer_host,
                transfer_backend=config.disaggregation_transfer_backend,
                fields=config.engine_fields,
                native_args=config.native_args,
                native_file=config.native_file,
                kv_events=config.kv_events,
                metrics=config.enable_metrics,
                spans=spans_target(os.environ) if config.trace.enable_otel else None,
                backstop_timeout_s=config.backstop,
                gone_writer_timeout_s=config.gone_writer_timeout,
            )
        )

    def _model(self) -> tuple[Path, worker_pb2.ModelIdentity]:
        assert self._resolved is not None
        resolved = self._resolved
        identity = worker_pb2.ModelIdentity(
            name=self._served_name(), path=self._config.model_path, revision=resolved.revision
        )
        return resolved.path, identity

    def _served_name(self) -> str:
        assert self._resolved is not None
        return self._config.served_model_name or self._resolved.name_hint


def _check_engine_flags(config: WorkerConfig) -> None:
    """A mistake in a flag of the engine's own is found before a model is downloaded. Raises ConfigError."""
    foreign = [*config.native_args, *(config.native_file.values if config.native_file is not None else ())]
    if config.engine == "simulated":
        parallel = [flag for flag in ("tp", "nnodes") if (getattr(config, flag) or 1) > 1]
        if foreign or parallel:
            refused = " ".join([*foreign, *(f"--{flag}" for flag in parallel)])
            raise ConfigError(f"--engine simulated takes no flags of SGLang: {refused}")
    elif foreign:
        # Imported late: SGLang pulls torch, and health must answer before that is done.
        from services.worker.engines.sglang import check_native_flags

        try:
            check_native_flags(config.device, config.native_args, config.native_file)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _resolve_model(config: WorkerConfig) -> ResolvedModel:
    """The simulated engine needs no model: any name will do, and a folder only for its tokenizer."""
    if config.engine == "simulated":
        path = Path(config.model_path).expanduser()
        return ResolvedModel(path, path.name, "simulated")

    def tell(message: str) -> None:
        log.info("model", progress=message)

    if config.node_rank:
        return wait_for_model(config.model_path, timeout=config.model_timeout, progress=tell)
    return resolve_model_path(config.model_path, progress=tell)


def _simulated_engine(config: WorkerConfig, transfer_host: str) -> Engine:
    from services.worker.engines.simulated import Addresses, SimulatedEngine, parse_options

    timeout = config.backstop
    defaults: dict[str, float] = {"bootstrap_timeout": timeout, "waiting_timeout": timeout}
    sizes = {"page_size": config.page_size, "dp_size": config.dp}
    defaults |= {name: size for name, size in sizes.items() if size is not None}
    addresses = Addresses(config.host, config.disaggregation_bootstrap_port, transfer_host)
    return SimulatedEngine(config.role, parse_options(config.sim, **defaults), addresses)
