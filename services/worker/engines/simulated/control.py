"""The command channel: POST /simulator `{"do": "freeze"}`, GET /simulator for what the engine holds.

freeze, thaw                          the scheduler and its transfers stop and go on
crash {how: scheduler|process}        EngineDeadError; or SIGKILL to the whole process
slow {factor}                         every time is multiplied
stall, silent, finish_after_abort {on: true|false}
late_bootstrap {seconds}              hand-shakes are handled late
wrong_first_token {count}
abort_chunk {count, after_tokens, status, message}
early_length {count, after_tokens}
hold {phase, token, count, after_tokens}  the next requests that begin with the token stand still in that phase
release                               they go on
script {prompt, tokens}               from now on the prompt gets this answer
flush_cache                           every prefix is forgotten
clear                                 nothing is wrong any more; a frozen engine thaws
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.worker.engines.simulated.faults import EndFault, Hold, Phase
from services.worker.engines.simulated.prompt_rank import PromptRank

if TYPE_CHECKING:
    from services.worker.engines.simulated.engine import SimulatedEngine

T = TypeVar("T", bool, int, float, str)


def create_app(engine: SimulatedEngine) -> Starlette:
    """GET and POST /simulator."""

    async def simulator(request: Request) -> Response:
        if request.method == "POST":
            try:
                apply(engine, cast("dict[str, Any]", await request.json()))
            except ValueError as error:
                return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(state(engine))

    return Starlette(routes=[Route("/simulator", simulator, methods=["GET", "POST"])])


def state(engine: SimulatedEngine) -> dict[str, Any]:
    """What is wrong with it, and what every rank holds."""
    hold = engine.faults.hold
    return {
        "role": engine.role.value,
        "incarnation": engine.incarnation.hex(),
        "cause": engine.scheduler.cause,
        "faults": {name: value for name, value in asdict(engine.faults).items() if name != "hold"},
        "hold": {"phase": hold.phase, "token": hold.token, "left": hold.count, "seen": hold.seen},
        "ranks": [rank.state() for rank in engine.scheduler.ranks],
    }


def apply(engine: SimulatedEngine, command: Mapping[str, Any]) -> None:
    """Does what the command says. Raises ValueError naming what it doesn't understand."""
    action = _ACTIONS.get(str(command.get("do")))
    if action is None:
        raise ValueError(f"do: {command.get('do')!r} is not one of {', '.join(_ACTIONS)}")
    arguments = _Arguments({name: value for name, value in command.items() if name != "do"})
    action(engine, arguments)
    arguments.refuse_rest()
    engine.scheduler.wake()


class _Arguments:
    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def take(self, name: str, default: T) -> T:
        """One argument, of the default's type."""
        value = self._values.pop(name, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(f"{name}: {value!r} is not {type(default).__name__}")
        return cast("T", value)

    def tokens(self, name: str) -> list[int]:
        """Token ids."""
        value: Any = self._values.pop(name, None)
        if not isinstance(value, list) or not all(type(token) is int for token in cast("list[Any]", value)):
            raise ValueError(f"{name}: {value!r} is no list of token ids")
        return cast("list[int]", value)

    def refuse_rest(self) -> None:
        """Whatever was not asked for is a mistake."""
        if self._values:
            raise ValueError(f"unknown: {', '.join(self._values)}")


def _crash(engine: SimulatedEngine, arguments: _Arguments) -> None:
    how = arguments.take("how", "scheduler")
    if how not in {"scheduler", "process"}:
        raise ValueError(f"how: {how!r} is neither scheduler nor process")
    engine.crash() if how == "scheduler" else engine.kill_process()


def _slow(engine: SimulatedEngine, arguments: _Arguments) -> None:
    factor = arguments.take("factor", 1.0)
    if factor <= 0:
        raise ValueError("factor: must be more than 0")
    engine.faults.slow = factor


def _late(engine: SimulatedEngine, arguments: _Arguments) -> None:
    engine.faults.bootstrap_delay = arguments.take("seconds", 0.0)


def _wrong_first(engine: SimulatedEngine, arguments: _Arguments) -> None:
    engine.faults.wrong_first_tokens = arguments.take("count", 1)


def _switch(name: str) -> Callable[[SimulatedEngine, _Arguments], None]:
    def switch(engine: SimulatedEngine, arguments: _Arguments) -> None:
        setattr(engine.faults, name, arguments.take("on", True))

    return switch


def _end_fault(name: str, after_tokens: int) -> Callable[[SimulatedEngine, _Arguments], None]:
    def arm(engine: SimulatedEngine, arguments: _Arguments) -> None:
        fault = EndFault(
            arguments.take("count", 1),
            arguments.take("after_tokens", after_tokens),
            arguments.take("status", 500),
            arguments.take("message", ""),
        )
        setattr(engine.faults, name, fault)

    return arm


def _hold(engine: SimulatedEngine, arguments: _Arguments) -> None:
    phase = arguments.take("phase", "")
    if phase not in list(Phase):
        raise ValueError(f"phase: {phase!r} is not one of {', '.join(Phase)}")
    engine.faults.hold = Hold(
        Phase(phase), arguments.take("token", -1), arguments.take("count", 1), arguments.take("after_tokens", 1)
    )


def _script(engine: SimulatedEngine, arguments: _Arguments) -> None:
    engine.model.play(arguments.tokens("prompt"), arguments.tokens("tokens"))


def _flush_cache(engine: SimulatedEngine, arguments: _Arguments) -> None:
    for rank in engine.scheduler.ranks:
        if isinstance(rank, PromptRank):
            rank.flush_cache()


def _clear(engine: SimulatedEngine, arguments: _Arguments) -> None:
    engine.scheduler.thaw()
    engine.faults.reset()


_ACTIONS: dict[str, Callable[[SimulatedEngine, _Arguments], None]] = {
    "freeze": lambda engine, _: engine.scheduler.freeze(),
    "thaw": lambda engine, _: engine.scheduler.thaw(),
    "crash": _crash,
    "slow": _slow,
    "stall": _switch("stalled"),
    "silent": _switch("silent"),
    "finish_after_abort": _switch("finish_after_abort"),
    "late_bootstrap": _late,
    "wrong_first_token": _wrong_first,
    "abort_chunk": _end_fault("abort_chunk", 0),
    "early_length": _end_fault("early_length", 1),
    "hold": _hold,
    "release": lambda engine, _: engine.faults.hold.release(),
    "script": _script,
    "flush_cache": _flush_cache,
    "clear": _clear,
}
