"""deploy/docker: no image is built here, so the files are linted and compared with what they must agree with."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.tools import tool
from tests.unit.deploy.conftest import ROOT

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def locked(name: str) -> dict[str, str]:
    """Package to version, of a requirements file."""
    text = (ROOT / "requirements" / name).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", text, re.MULTILINE))


def names(requirements: list[str]) -> set[str]:
    return {match.group() for text in requirements if (match := re.match(r"[a-z0-9-]+", text))}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_pinned_and_run_as_the_manifests_user(path: Path) -> None:
    text = path.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    for source in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], source)
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} is not pinned to a release"
    manifest = (ROOT / "deploy" / "k8s" / "prefill" / "prefill.yaml").read_text()
    (user,) = re.findall(r"runAsUser: (\d+)", manifest)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == f"{user}:{user}"
    assert f"useradd --uid {user}" in text
    home = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.+)", text, re.MULTILINE))))["HOME"]
    assert f"mountPath: {home}/.cache" in manifest


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_exists(path: Path) -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)", path.read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_the_frontend_image_has_the_frontends_packages_at_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = names(project["dependencies"]) | names(project["optional-dependencies"]["frontend"])
    image, tested = locked("frontend.txt"), locked("cpu.txt")
    assert wanted <= image.keys()
    assert image.items() <= tested.items()
    assert not image.keys() & {"torch", "sglang", "transformers", "nixl", "numpy"}


def test_the_worker_image_gets_what_sglangs_image_lacks() -> None:
    """The packages of docs/install.md ("In an image that has SGLang already"), at the versions of frontend.txt."""
    text = (DOCKER / "worker.Dockerfile").read_text()
    (pattern,) = re.findall(r"grep -oE '(.+)'", text)
    installed = set(re.findall(pattern, (ROOT / "requirements" / "frontend.txt").read_text(), re.MULTILINE))
    (listed,) = re.findall(r"pip install (aetcd (?:.+\\\n)*.+)", (ROOT / "docs" / "install.md").read_text())
    pinned = dict(re.findall(r" ([a-z0-9-]+)==([^\s\\]+)", text))
    assert set(listed.replace("\\", "").split()) <= {name.partition("==")[0] for name in installed} | pinned.keys()
    assert {"grpcio", "protobuf", "hatchling"} <= installed
    tested = locked("cpu.txt")
    assert {name for name in pinned if name in tested and pinned[name] != tested[name]} == set()
    assert {name for name in pinned if name.startswith("opentelemetry")} <= tested.keys()
    (nixl,) = re.findall(r"^nixl==(\S+)", (ROOT / "requirements" / "cpu-nodeps.txt").read_text(), re.MULTILINE)
    assert f" nixl=={nixl} " in text
