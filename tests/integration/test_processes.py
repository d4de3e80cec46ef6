"""`kvbaton frontend --processes 2`: both serve, as one frontend would, and neither's end is that of the other."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from services.frontend.access.keys import digest_of
from tests.support.certificates import Authority
from tests.support.processes import Processes, answering
from tests.support.several import (
    CONNECTIONS,
    all_gone,
    connections,
    ended,
    finished,
    folders,
    pids,
    scrape,
)
from tests.support.traffic import ask, greedy, oracle
from tests.support.waiting import eventually

PROMPT = list(range(100, 130))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The frontend's temporary folder."""
    folder = tmp_path / "t"
    folder.mkdir()
    return folder


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path, temporary: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path, {"TMPDIR": str(temporary)})
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


def start(processes: Processes, *flags: str, step: float = 0.001) -> None:
    processes.frontend("--processes", "2", *flags)
    processes.worker("worker", "decode", "--disaggregation-mode", "null", sim=f"decode_step={step}")


async def test_connections_reach_both_and_any_of_them_tells_the_sum(processes: Processes) -> None:
    start(processes)
    async with connections(processes) as reached:
        assert set(reached) == {1, 2}
        before = await scrape(processes)
        clients = [client for each in reached.values() for client in each]
        await asyncio.gather(*(ask(client, prompt_tokens=20, tokens=9) for client in clients))

        async def counted() -> bool:
            return finished(await scrape(processes)) == finished(before) + CONNECTIONS

        await eventually(counted, what="all requests counted")
        labels = "[('model', 'no-model')]"
        for _ in range(CONNECTIONS):
            page = await scrape(processes)
            grown = {name: value - before.get(name, 0.0) for name, value in page.items()}
            assert finished(grown) == CONNECTIONS
            assert grown[f"kvbaton_prompt_tokens_total{labels}"] == 20 * CONNECTIONS
            assert grown[f"kvbaton_completion_tokens_total{labels}"] == 9 * CONNECTIONS
            assert grown[f"kvbaton_time_to_first_token_seconds_count{labels}"] == CONNECTIONS
            # Tokens that come with the first one have no gap.
            assert 0 < grown[f"kvbaton_inter_token_latency_seconds_count{labels}"] <= 8 * CONNECTIONS
            assert page["kvbaton_live_requests[]"] == 0
            assert page["kvbaton_routable_workers[('role', 'aggregated')]"] == 1
            starts = [page[f"kvbaton_process_starts_total[('process', '{number}')]"] for number in (1, 2)]
            assert starts == [1, 1]
    log = processes.log("frontend")
    assert log.count("listening") == 1
    for number in (1, 2):
        assert f"process={number}" in log


async def test_an_abort_finds_its_request_in_the_other_process(processes: Processes) -> None:
    start(processes, step=0.02)
    async with connections(processes) as reached:
        for here, there in ((1, 2), (2, 1)):
            client, other = reached[here][0], reached[there][0]
            running = asyncio.create_task(
                client.generate(token_ids=PROMPT, sampling=greedy(3000), request_id=f"of-{here}")
            )
            await live(other, 1)
            assert await other.abort(f"of-{here}")
            with pytest.raises(RequestError) as error:
                await running
            assert error.value.code is grpc.StatusCode.CANCELLED
            await live(other, 0)
            # Nobody remembers an abort that found its request.
            for again in (client, other):
                answer = await again.generate(token_ids=PROMPT, sampling=greedy(3), request_id=f"of-{here}")
                assert answer.token_ids == oracle(PROMPT, 3)
        assert not await reached[1][0].abort("unknown")
        with pytest.raises(RequestError) as error:
            await reached[2][0].generate(token_ids=PROMPT, sampling=greedy(3), request_id="unknown")
        assert error.value.code is grpc.StatusCode.CANCELLED, "an abort may overtake its request, in any process"


async def test_a_killed_process_is_replaced_and_takes_nothing_with_it(processes: Processes) -> None:
    start(processes, step=0.02)
    async with connections(processes) as reached:
        await asyncio.gather(*(ask(client, prompt_tokens=20, tokens=3) for each in reached.values() for client in each))
        running = [asyncio.create_task(ask(reached[2][0], prompt_tokens=20, tokens=400)) for _ in range(4)]
        lost = asyncio.create_task(ask(reached[1][0], prompt_tokens=20, tokens=3000))
        await live(reached[2][0], 5)

        async def counted() -> dict[str, float] | None:
            page = await scrape(processes)
            return page if finished(page) >= CONNECTIONS else None

        before: dict[str, float] = await eventually(counted, what="all requests counted")
        was = pids(processes)
        assert not any(each.done() for each in running)
        os.kill(was[1], signal.SIGKILL)
        with pytest.raises(RequestError):
            await lost
        await asyncio.gather(*running, *(ask(client, prompt_tokens=20, tokens=3) for client in reached[2][1:4]))

    async with connections(processes) as reached:
        assert set(reached) == {1, 2}
        assert pids(processes)[1] != was[1]
        assert pids(processes)[2] == was[2]
        await ask(reached[1][0], prompt_tokens=20, tokens=3)
        after = await scrape(processes)
        fallen = [
            name
            for name, value in before.items()
            if name.startswith("kvbaton_")
            and name.partition("[")[0].endswith(("_total", "_count", "_sum", "_bucket"))
            and after[name] < value
        ]
        assert fallen == []
        assert after["kvbaton_process_starts_total[('process', '1')]"] == 2
        assert after["kvbaton_live_requests[]"] == 0, "the dead one's are gone"
    assert processes.log("frontend").count("a process ended, starting another") == 1


async def test_a_frozen_process_is_replaced(processes: Processes) -> None:
    """It would be given its share of all new connections, and they would hang."""
    start(processes, "--heartbeat", "0.2")
    async with connections(processes) as reached:
        was = pids(processes)
        os.kill(was[1], signal.SIGSTOP)
        await eventually(lambda: pids(processes).get(1, was[1]) != was[1], within=60, what="another process")
        await asyncio.gather(*(ask(client, prompt_tokens=20, tokens=3) for client in reached[2][:4]))
    async with connections(processes) as reached:
        assert set(reached) == {1, 2}
        assert pids(processes)[2] == was[2]
        await ask(reached[1][0], prompt_tokens=20, tokens=3)
    log = processes.log("frontend")
    assert log.count("a process says nothing, killing it") == log.count("a process ended, starting another") == 1


async def test_sigterm_lets_every_live_request_finish(processes: Processes, temporary: Path) -> None:
    start(processes, "--drain-timeout", "120", step=0.02)
    async with connections(processes) as reached:
        clients = [client for each in reached.values() for client in each]
        running = [asyncio.create_task(ask(client, prompt_tokens=20, tokens=400)) for client in clients]
        await live(clients[0], len(clients))
        serving = pids(processes)
        assert len(folders(temporary)) == 1
        processes.signal("frontend", signal.SIGTERM)
        await asyncio.gather(*running)
    assert await ended(processes, "frontend") == 0
    await all_gone(serving)
    assert folders(temporary) == []
    for port in (processes.grpc_port, processes.http_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


async def test_a_second_signal_does_not_wait(processes: Processes) -> None:
    start(processes, "--drain-timeout", "300", step=0.5)
    async with connections(processes) as reached:
        running = [
            asyncio.create_task(reached[number][0].generate(token_ids=PROMPT, sampling=greedy(1000)))
            for number in (1, 2)
        ]
        await live(reached[1][0], 2)
        processes.signal("frontend", signal.SIGTERM)
        await eventually(lambda: processes.log("frontend").count("draining") == 2, what="both drain")
        processes.signal("frontend", signal.SIGINT)
        for each in running:
            with pytest.raises(RequestError) as error:
                await each
            assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert await ended(processes, "frontend") == 0


async def test_a_killed_parent_leaves_nothing(processes: Processes, temporary: Path) -> None:
    processes.frontend("--processes", "2")
    await listening(processes)
    serving = pids(processes)
    assert set(serving) == {1, 2}
    processes.kill("frontend")
    await all_gone(serving)
    await eventually(lambda: folders(temporary) == [], what="no folder left")


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize("flag", ["--port", "--http-port"])
async def test_nobody_else_gets_its_ports(processes: Processes, flag: str, count: str) -> None:
    processes.frontend("--processes", "2")
    await listening(processes)
    port = processes.grpc_port if flag == "--port" else processes.http_port
    processes.frontend("--processes", count, flag, str(port), name="second")
    assert await ended(processes, "second") == 1
    log = processes.log("second")
    assert f"can't listen on 127.0.0.1:{port}" in log
    assert f"choose another with {flag}" in log
    assert processes.processes["frontend"].poll() is None


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
async def test_a_port_that_somebody_has_is_refused(processes: Processes, flag: str) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        processes.frontend("--processes", "2", flag, str(other.getsockname()[1]))
        assert await ended(processes, "frontend") == 1
    assert f"choose another with {flag}" in processes.log("frontend")


async def test_processes_that_cannot_start_end_all_with_their_error(processes: Processes, tmp_path: Path) -> None:
    processes.frontend("--processes", "2", "--api-keys", str(tmp_path / "missing.yaml"))
    assert await ended(processes, "frontend") == 1
    log = processes.log("frontend")
    assert log.count("frontend can't start") == 1
    assert "missing.yaml: No such file" in log


async def test_connections_grow_old_and_no_stream_is_cut(processes: Processes) -> None:
    start(processes, "--max-connection-age", "1", step=0.02)
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=60, call_timeout=20) as client:
        await answering(client)
        for _ in range(2):
            await ask(client, prompt_tokens=20, tokens=250)  # five seconds at least
        reached: set[str] = set()

        async def both() -> bool:
            reached.add((await client.status()).detail)
            return reached == {"process 1 of 2", "process 2 of 2"}

        # A new connection every second: that none of sixty goes to the other process happens once in 2^60 times.
        await eventually(both, within=120, every=0.2, what="a connection to each process")


async def test_api_keys_hold_for_all_and_sighup_reaches_all(processes: Processes, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f'- {{name: a, sha256: "{digest_of(b"alpha").hex()}"}}\n- {{name: b, sha256: "{digest_of(b"beta").hex()}"}}\n'
    )
    start(processes, "--api-keys", str(keys), step=0.02)
    async with connections(processes, api_key="alpha") as reached:
        target = f"127.0.0.1:{processes.grpc_port}"
        running = asyncio.create_task(reached[1][0].generate(token_ids=PROMPT, sampling=greedy(3000), request_id="r"))
        await live(reached[1][0], 1)
        async with Client(target, api_key="beta") as stranger:
            for _ in range(2):
                assert not await stranger.abort("r")
        assert await reached[2][0].abort("r")
        with pytest.raises(RequestError):
            await running
    assert processes.log("frontend").count("api keys read") == 2
    processes.signal("frontend", signal.SIGHUP)
    await eventually(lambda: processes.log("frontend").count("api keys read") == 4, what="read again by both")


async def test_the_limits_of_a_key_are_those_of_all_processes_together(processes: Processes, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f'- {{name: a, sha256: "{digest_of(b"alpha").hex()}", concurrent_requests: 2}}\n'
        f'- {{name: b, sha256: "{digest_of(b"beta").hex()}", requests_per_minute: 6}}\n'
    )
    start(processes, "--api-keys", str(keys), step=0.02)
    async with connections(processes, api_key="alpha") as reached:
        clients = [reached[1][0], reached[2][0]]
        running = [asyncio.create_task(each.generate(token_ids=PROMPT, sampling=greedy(3000))) for each in clients]
        await live(clients[0], 2)
        for each in clients:
            with pytest.raises(RequestError, match="2 requests of this API key are running"):
                await each.generate(token_ids=PROMPT, sampling=greedy(3))
        for each in running:
            each.cancel()
        await live(clients[0], 0)
        await ask(clients[0], prompt_tokens=20, tokens=3)
    async with connections(processes, api_key="beta") as reached:

        async def refused(index: int) -> bool:
            try:
                await ask(reached[1 + index % 2][0], prompt_tokens=20, tokens=1)
            except RequestError as error:
                return error.reason == Reason.RATE_LIMIT_EXCEEDED
            return False

        # A minute's requests at once, and one more every ten seconds: all twelve only if they take a minute.
        assert any([await refused(index) for index in range(12)])


async def test_tls_on_all_of_them(processes: Processes, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("process")
    tls = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-ca", str(authority.ca))
    processes.frontend("--processes", "2", *tls)
    processes.worker("worker", "decode", "--disaggregation-mode", "null", *tls)
    async with connections(processes, ca=authority.ca) as reached:
        assert set(reached) == {1, 2}
        for each in reached.values():
            await ask(each[0], prompt_tokens=20, tokens=3)


async def test_a_port_that_is_chosen_is_the_same_for_both(processes: Processes) -> None:
    processes.frontend("--processes", "2", "--port", "0", "--http-port", "0")
    await listening(processes)
    line = next(line for line in processes.log("frontend").splitlines() if "listening" in line)
    fields = dict(part.split("=") for part in line.split() if "=" in part)
    assert fields["processes"] == "2"
    processes.grpc_ports["frontend"] = int(fields["grpc"].rpartition(":")[2])
    processes.http_ports["frontend"] = int(fields["http"].rpartition(":")[2])
    assert 0 not in (processes.grpc_port, processes.http_port)
    processes.worker("worker", "decode", "--disaggregation-mode", "null")
    async with connections(processes) as reached:
        assert set(reached) == {1, 2}
    assert "kvbaton_live_requests[]" in await scrape(processes)


async def listening(processes: Processes) -> None:
    await eventually(lambda: "listening" in processes.log("frontend"), within=60, what="listening")


async def live(client: Client, count: int) -> None:
    """Waits until so many requests run in all processes together; any one of them tells."""

    async def running() -> bool:
        try:
            return (await client.status()).load.live_requests == count
        except RequestError:
            return False

    await eventually(running, within=60, every=0.1, what=f"{count} live requests")
