"""What a worker's servicers share: the engine once it is there, what it takes, and whether it takes it now."""

from __future__ import annotations

from dataclasses import dataclass, replace

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, model_pb2, worker_pb2
from services.models.tokenizer_files import TokenizerFile
from services.modes import mode_of
from services.requests import Limits, Role
from services.worker.credits import CreditWindow
from services.worker.engines.protocol import Engine, EngineInfo, EngineLoad, ProbePayload
from services.worker.legs import LiveLegs
from services.worker.lifecycle import Lifecycle
from services.worker.load import LegLoad, LegLoads


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is attached to the serving loop, and what is known of it since."""

    engine: Engine
    info: EngineInfo
    limits: Limits
    record: worker_pb2.WorkerRecord
    model_info: model_pb2.ModelInfo
    tokenizer_files: tuple[TokenizerFile, ...]
    probe_payload: ProbePayload

    def require_model(self, name: str) -> None:
        """Raises RequestError, NOT_FOUND, for the name of another model; an empty one is this one's."""
        if name not in ("", self.record.model.name):
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                Reason.MODEL_NOT_FOUND,
                f"model: this worker serves {self.record.model.name!r}, not {name!r}",
                field="model",
            )


class WorkerCore:
    """Belongs to the serving loop."""

    def __init__(self, role: Role, instance_id: str, incarnation: worker_pb2.Incarnation, lifecycle: Lifecycle) -> None:
        self.role = role
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.lifecycle = lifecycle
        self.legs = LiveLegs(role, self._abort_in_engine)
        # None where legs need no credit: prefill queues in its engine, an embedding worker refuses what is too much.
        self.window = CreditWindow(self.legs) if role in (Role.DECODE, Role.AGGREGATED) else None
        self.load = LegLoads(role)
        self.slots = 0
        """Legs that the engine runs at once."""
        self.accepting = False
        self.canary_rank: int | None = None
        """The dp rank that a canary runs on."""
        self.engine: Engine | None = None
        """From its attachment on, also where it serves no requests."""
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded | None:
        """None until the engine is attached."""
        return self._loaded

    def attach(self, loaded: Loaded, *, window: int) -> None:
        """The engine is there; it runs `window` legs at once."""
        self._loaded = loaded
        self.slots = window
        if self.window is not None:
            self.window.open(window)

    def expect(self, request: generate_pb2.GenerateRequest, *, cached_tokens: int = 0) -> LegLoad:
        """A leg has come: from now on it is load."""
        dp_size = self._loaded.info.dp_size if self._loaded is not None else 1
        return self.load.expect(request, dp_size=dp_size, cached_tokens=cached_tokens)

    def require_rpc(self, rpc: str) -> None:
        """Raises RequestError, FAILED_PRECONDITION, when requests of this kind go to workers in another role."""
        taken = mode_of(self.role).rpc
        if rpc != taken:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.WRONG_ROLE,
                f"{self.role} worker {self.instance_id} takes {taken}, not {rpc}",
                leg=self.role,
                worker=self.instance_id,
            )

    def require_loaded(self) -> Loaded:
        """What is loaded, or UNAVAILABLE while there is nothing."""
        if self._loaded is None:
            raise self.unavailable(Reason.WORKER_NOT_SERVING)
        return self._loaded

    def require_accepting(self) -> Loaded:
        """What is loaded, or UNAVAILABLE when no new request is taken."""
        if not self.accepting or self.lifecycle.state == worker_pb2.WORKER_STATE_UNHEALTHY:
            draining = self.lifecycle.state == worker_pb2.WORKER_STATE_DRAINING
            raise self.unavailable(Reason.WORKER_DRAINING if draining else Reason.WORKER_NOT_SERVING)
        return self.require_loaded()

    def unavailable(self, reason: Reason, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> RequestError:
        """UNAVAILABLE, or another code, with the worker's state in words."""
        detail = f" ({self.lifecycle.detail})" if self.lifecycle.detail else ""
        return RequestError(
            code,
            reason,
            f"{self.role} worker {self.instance_id} is {self.lifecycle.state_name}{detail}",
            leg=self.role,
            worker=self.instance_id,
            retry_after=1.0,
        )

    async def loads(self) -> list[EngineLoad]:
        """What the engine reports, without a canary that it may be running: that is no traffic.

        Raises TimeoutError, EngineDeadError.
        """
        ranks = await self.require_loaded().engine.loads()
        return [_without_canary(rank) if rank.dp_rank == self.canary_rank else rank for rank in ranks]

    async def _abort_in_engine(self, engine_id: str) -> None:
        if self._loaded is not None:
            await self._loaded.engine.abort(engine_id)


def _without_canary(load: EngineLoad) -> EngineLoad:
    if load.running_requests:
        return replace(load, running_requests=load.running_requests - 1)
    return replace(load, waiting_requests=max(0, load.waiting_requests - 1))
