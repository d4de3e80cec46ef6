"""How each fault of the matrix is done to a `FaultCluster`, and how it is repaired."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.fault_cluster import FaultCluster
from tests.support.fault_matrix import Fault


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a fault hits."""

    cluster: FaultCluster
    prefill: str
    decode: str
    frontend: str = "frontend"

    def kv_links(self, what: str) -> None:
        """Does it to every relay between the prefill worker and decode workers."""
        for relay in self.cluster.kv_relays(self.prefill):
            getattr(relay, what)()


_Action = Callable[[Target], Any]

# The client's own doings, its leaving and its deadline, are none of the cluster's.
_BEGIN: dict[Fault, _Action] = {
    Fault.PREFILL_KILLED: lambda target: target.cluster.kill(target.prefill),
    Fault.PREFILL_FROZEN: lambda target: target.cluster.freeze(target.prefill),
    Fault.DECODE_KILLED: lambda target: target.cluster.kill(target.decode),
    Fault.DECODE_FROZEN: lambda target: target.cluster.freeze(target.decode),
    Fault.FRONTEND_KILLED: lambda target: target.cluster.kill(target.frontend),
    Fault.SESSION_BLACK_HOLED: lambda target: target.cluster.session_relay(target.decode).black_hole(),
    Fault.SESSION_RESET: lambda target: target.cluster.session_relay(target.decode).reset(),
    Fault.KV_BLACK_HOLED: lambda target: target.kv_links("black_hole"),
    Fault.KV_RESET: lambda target: target.kv_links("reset"),
    Fault.ETCD_KILLED: lambda target: target.cluster.etcd.kill(),
    Fault.ETCD_FROZEN: lambda target: target.cluster.freeze_etcd(),
}
_REPAIR: dict[Fault, _Action] = {
    Fault.PREFILL_KILLED: lambda target: target.cluster.restart(target.prefill),
    Fault.PREFILL_FROZEN: lambda target: target.cluster.thaw(target.prefill),
    Fault.DECODE_KILLED: lambda target: target.cluster.restart(target.decode),
    Fault.DECODE_FROZEN: lambda target: target.cluster.thaw(target.decode),
    Fault.FRONTEND_KILLED: lambda target: target.cluster.restart(target.frontend),
    Fault.SESSION_BLACK_HOLED: lambda target: target.cluster.session_relay(target.decode).heal(),
    Fault.KV_BLACK_HOLED: lambda target: target.kv_links("heal"),
    Fault.ETCD_KILLED: lambda target: target.cluster.etcd.start(),
    Fault.ETCD_FROZEN: lambda target: target.cluster.thaw_etcd(),
}


async def inject(fault: Fault, target: Target) -> None:
    """The fault begins. Without effect for those that are the client's doing."""
    await _act(_BEGIN, fault, target)


async def repair(fault: Fault, target: Target) -> None:
    """The fault is over; processes that it killed are started again, and may still be starting."""
    await _act(_REPAIR, fault, target)


async def _act(actions: dict[Fault, _Action], fault: Fault, target: Target) -> None:
    if (action := actions.get(fault)) is not None:
        result = action(target)
        if inspect.isawaitable(result):
            await result
