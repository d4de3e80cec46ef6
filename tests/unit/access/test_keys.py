"""The file of --api-keys: every mistake in it is named by file, entry and field."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config.errors import ConfigError
from services.frontend.access.keys import MAX_FILE_BYTES, KeyFileError, fresh_key, parse_keys, read_keys
from services.tools import apikey

DIGEST = "ab" * 32
ENTRY: dict[str, Any] = {"name": "team-a", "sha256": DIGEST}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    return path


def test_an_entry_with_everything(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f'- name: team-a\n  sha256: "{DIGEST.upper()}"\n  requests_per_minute: 60\n'
        "  concurrent_requests: 2\n  models: [org/one, two]\n",
    )
    (entry,) = read_keys(path)
    assert entry.digest == bytes.fromhex(DIGEST)
    assert (entry.name, entry.requests_per_minute, entry.concurrent_requests) == ("team-a", 60, 2)
    assert entry.models == {"org/one", "two"}


def test_an_entry_without_limits_has_none() -> None:
    (entry,) = parse_keys([ENTRY], "f")
    assert (entry.requests_per_minute, entry.concurrent_requests, entry.models) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": None}, r"entry 2: name: missing"),
        ({"name": 7}, r"entry 2: name: a whole number and not text \(write it in quotes\)"),
        ({"name": "a b"}, r"entry 2: name: 'a b' is not a name"),
        ({"name": ""}, r"entry 2: name: '' is not a name"),
        ({"name": "team-a"}, r"entry 2 \(team-a\): name: entry 1 has it, too"),
        ({"sha256": None}, r"entry 2 \(b\): sha256: missing"),
        ({"sha256": "abc"}, r"entry 2 \(b\): sha256: not 64 hexadecimal digits"),
        ({"sha256": DIGEST}, r"entry 2 \(b\): sha256: entry 1 has it, too"),
        ({"sha256": 1}, r"entry 2 \(b\): sha256: a whole number"),
        ({"requests_per_minute": 0}, r"entry 2 \(b\): requests_per_minute: 0 is not a whole number of at least 1"),
        ({"requests_per_minute": "60"}, r"entry 2 \(b\): requests_per_minute: '60'"),
        ({"requests_per_minute": True}, r"entry 2 \(b\): requests_per_minute: True"),
        ({"requests_per_minute": None}, r"entry 2 \(b\): requests_per_minute: None"),
        ({"concurrent_requests": -1}, r"entry 2 \(b\): concurrent_requests: -1"),
        ({"concurrent_requests": 1.5}, r"entry 2 \(b\): concurrent_requests: 1.5"),
        ({"models": "one"}, r"entry 2 \(b\): models: not a list"),
        ({"models": []}, r"entry 2 \(b\): models: not a list of at least one"),
        ({"models": [1]}, r"entry 2 \(b\): models: not a list"),
        ({"request_per_minute": 1}, r"entry 2 \(b\): request_per_minute: .*did you mean requests_per_minute\?"),
        ({"zzz": 1}, r"entry 2 \(b\): zzz: there is no such field; there are name, sha256"),
        ({4: 1}, r"entry 2 \(b\): 4: there is no such field"),
    ],
)
def test_a_mistake_is_named(fields: dict[Any, Any], complaint: str) -> None:
    second = {"name": "b", "sha256": "cd" * 32} | fields
    with pytest.raises(KeyFileError, match=rf"^keys\.yaml: {complaint}"):
        parse_keys([ENTRY, second], "keys.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "nothing and not a list of keys"),
        ("name: a\n", "a mapping and not a list of keys"),
        ("[]", "no key, so nobody could use the frontend"),
        ("- 7\n", "entry 1: a whole number and not a mapping"),
        ("- {name: a, name: b}\n", "not YAML: name stands there twice"),
        ("- [\n", "not YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("- !!python/object/apply:os.system [ls]\n", "not YAML"),
    ],
)
def test_a_file_that_holds_no_keys(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(KeyFileError) as caught:
        read_keys(path)
    assert str(caught.value).startswith(f"--api-keys {path}: ")
    assert complaint in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"--api-keys .*absent: No such file"):
        read_keys(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeyFileError, match="not YAML"):
        read_keys(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(KeyFileError, match="larger than"):
        read_keys(tmp_path / "large")


def test_no_error_shows_what_stands_in_place_of_a_digest() -> None:
    """Somebody may have pasted the key itself."""
    secret = fresh_key()
    with pytest.raises(KeyFileError) as caught:
        parse_keys([{"name": "a", "sha256": secret}], "f")
    assert secret not in str(caught.value)


def test_keys_are_256_bits_and_never_the_same() -> None:
    keys = {fresh_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == len("kvb-") + 43 for key in keys)


def test_the_command_prints_a_key_and_the_entry_that_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert apikey.run(argparse.Namespace(name="team-a"), []) == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    entry = printed.err[printed.err.index("- name") :]
    assert key not in printed.err
    (parsed,) = parse_keys(yaml.safe_load(entry), "printed")
    assert (parsed.name, parsed.digest) == ("team-a", hashlib.sha256(key.encode()).digest())


def test_the_command_refuses_a_name_that_the_file_could_not_have() -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        apikey.run(argparse.Namespace(name="-x"), [])
