"""`kvbaton status`: what is said of each worker, and when the exit status is 0."""

from dataclasses import replace

from kvbaton.v1 import health_pb2, worker_pb2
from services.config.common import EtcdFlags
from services.tools.status import as_json, as_text
from services.tools.topology import Seen, Topology

NOW = 1_000_000.0
SERVING, LOADING = worker_pb2.WORKER_STATE_SERVING, worker_pb2.WORKER_STATE_LOADING


def record(uuid: str = "a" * 32) -> worker_pb2.WorkerRecord:
    return worker_pb2.WorkerRecord(
        instance_id="decode-1",
        role=worker_pb2.WORKER_ROLE_DECODE,
        incarnation=worker_pb2.Incarnation(created_us=int((NOW - 90) * 1e6), uuid=uuid),
        grpc_endpoint="10.0.0.1:50062",
        model=worker_pb2.ModelIdentity(name="smollm2"),
        runtime=worker_pb2.RuntimeConfig(total_kv_pages=1024),
    )


def worker(state: worker_pb2.WorkerState = SERVING, *, routable: bool = True, reason: str = "") -> Seen:
    status = health_pb2.StatusResponse(
        state=state,
        incarnation=record().incarnation,
        load=health_pb2.Load(live_requests=3, used_tokens=160, total_tokens=16384),
    )
    known = health_pb2.KnownWorker(record=record(), routable=routable, reason=reason, registered=True)
    return Seen(record(), in_etcd=True, status=status, problem="", known=known)


def topology(*workers: Seen, frontend: worker_pb2.WorkerState | None = SERVING, etcd_problem: str = "") -> Topology:
    status = None if frontend is None else health_pb2.StatusResponse(state=frontend)
    return Topology(status, "" if status else "UNAVAILABLE: refused", etcd_problem, workers)


def row(shown: Topology) -> str:
    text = as_text(shown, "localhost:50051", EtcdFlags(), NOW)
    return next(line for line in text.splitlines() if "decode-1" in line)


def test_a_routable_worker():
    assert row(topology(worker())).split() == [
        "decode", "decode-1", "serving", "10.0.0.1:50062", "smollm2", "1024", "3", "160/16384", "1", "m", "30", "s",
        "yes", "yes",
    ]  # fmt: skip


def test_the_frontends_reason_is_shown():
    assert "no: connection lost" in row(topology(worker(routable=False, reason="connection lost")))


def test_a_worker_that_does_not_answer():
    silent = replace(worker(), status=None, problem="DEADLINE_EXCEEDED: nothing")
    text = as_text(topology(silent), "localhost:50051", EtcdFlags(), NOW)
    assert "unreachable" in row(topology(silent))
    assert "decode-1: DEADLINE_EXCEEDED: nothing" in text


def test_another_process_at_its_address_is_not_taken_for_it():
    replaced = replace(worker(), record=record("b" * 32))
    assert "replaced" in row(topology(replaced))
    assert not replaced.serving


def test_a_worker_that_only_the_frontend_remembers():
    seen = worker()
    assert seen.known is not None
    known = health_pb2.KnownWorker(record=record(), routable=True, registered=False)
    assert row(topology(replace(seen, in_etcd=False, known=known))).endswith("no    yes (unregistered)")


def test_without_etcd_or_frontend_it_says_so_and_shows_the_rest():
    text = as_text(topology(worker(), frontend=None, etcd_problem="no answer"), "localhost:50051", EtcdFlags(), NOW)
    assert "unreachable: UNAVAILABLE: refused" in text
    assert "unreachable: no answer" in text
    assert "decode-1" in text


def test_serving_is_the_frontends_word_while_it_answers():
    assert topology(worker()).serving
    assert not topology(worker(), frontend=worker_pb2.WORKER_STATE_STARTING).serving


def test_without_a_frontend_a_serving_worker_counts():
    assert topology(worker(), frontend=None).serving
    assert not topology(worker(LOADING), frontend=None).serving
    assert not topology(frontend=None).serving


def test_the_age_of_the_frontends_view_is_shown_and_why_it_is_old():
    shown = topology(worker())
    assert shown.frontend is not None
    assert "the frontend's view  etcd has never answered it" in as_text(shown, "f", EtcdFlags(), NOW)
    shown.frontend.registry.age.FromSeconds(72)
    assert "the frontend's view  1 m 12 s old\n" in as_text(shown, "f", EtcdFlags(), NOW)
    shown.frontend.registry.problem = "e1:2379: no answer"
    shown.frontend.registry.problem_for.FromSeconds(70)
    text = as_text(shown, "f", EtcdFlags(), NOW)
    assert "1 m 12 s old, etcd unreachable for 1 m 10 s: e1:2379: no answer\n" in text
    described = as_json(shown, NOW)["frontend"]
    assert isinstance(described, dict)
    assert (described["registry_age_seconds"], described["registry_problem"]) == (72, "e1:2379: no answer")


def test_a_last_resort_is_shown_as_one():
    seen = worker()
    assert seen.known is not None
    seen.known.breaker = health_pb2.BREAKER_STATE_OPEN
    assert row(topology(seen)).endswith("yes (last resort: its breaker is open)")
    (only,) = as_json(topology(seen), NOW)["workers"]  # type: ignore[misc]
    assert only["breaker"] == "open"


def test_json_has_null_for_what_nobody_said():
    described = as_json(topology(replace(worker(), status=None, known=None), frontend=None), NOW)
    assert described["frontend"] is None
    (only,) = described["workers"]  # type: ignore[misc]
    assert (only["state"], only["routable"], only["live_requests"]) == ("unreachable", None, None)
    assert only["age_seconds"] == 90
