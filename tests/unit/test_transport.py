"""A server that was told to speak TLS never speaks anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.transport import TlsConfig, bind, make_server


def test_client_certificates_need_a_server_that_speaks_tls(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    with pytest.raises(ValueError, match="--tls-client-auth needs --tls-cert and --tls-key"):
        TlsConfig(ca=ca, require_client_cert=True)


async def test_a_server_with_tls_but_no_certificate_does_not_fall_back_to_plain_text(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    with pytest.raises(ValueError, match="--tls-cert"):
        bind(make_server(lambda _: ()), "127.0.0.1", 0, tls=TlsConfig(ca=ca))


async def test_files_that_are_no_certificates_are_not_called_a_taken_port(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for file in (cert, key):
        file.write_text("junk")
    with pytest.raises(ValueError, match=r"--tls-cert .*cert\.pem"):
        bind(make_server(lambda _: ()), "127.0.0.1", 0, tls=TlsConfig(cert, key))
