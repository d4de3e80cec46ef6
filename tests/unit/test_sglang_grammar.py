"""Grammars without SGLang: what its schedulers are changed to, over fakes of them, and the trials of every grammar."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from services.requests import Grammar, GrammarKind
from services.worker.engines import grammar_trials, sglang_grammar
from services.worker.engines.grammar_trials import GrammarTrials, leads_nowhere, trial_socket
from services.worker.engines.protocol import EngineRefusedError
from services.worker.engines.sglang_child import count_min_new_tokens_without_tokenizer
from services.worker.engines.sglang_compat import allow_min_new_tokens

SERVER_ARGS = SimpleNamespace(
    model_path="/model", tokenizer_path=None, tokenizer_mode="auto", trust_remote_code=False, revision=None
)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """A module of SGLang's with these attributes, where `import_module` finds it."""
    module = ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Manager:
    """Shaped like SGLang's: without a tokenizer it builds no backend."""

    def __init__(self, scheduler: Any) -> None:
        self.grammar_backend = scheduler.built_by_sglang


class Backend:
    """Shaped like SGLang's BaseGrammarBackend."""

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}

    def set_cache(self, key: Any, value: Any) -> None:
        self.cache[key] = value

    def reset(self) -> None:
        self.cache.clear()


class Matcher:
    """Shaped like SGLang's XGrammarGrammar."""

    allowed = 1
    seconds = 0.0

    def fill_vocab_mask(self, vocab_mask: Any, idx: int) -> None:
        vocab_mask[idx].fill_(self.allowed)

    def accept_token(self, token: int) -> None:
        started = time.thread_time()
        while time.thread_time() - started < self.seconds:
            pass


class Row:
    """One row of a mask of bits."""

    bits = -1

    def fill_(self, bits: int) -> None:
        self.bits = bits

    def any(self) -> bool:
        return self.bits != 0


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The modules that are changed, and what their functions were called with."""
    calls: dict[str, Any] = {}

    def get_tokenizer(path: str, **kwargs: Any) -> Any:
        if calls.get("no_tokenizer"):
            raise OSError("no tokenizer in this folder")
        calls["path"] = path
        return range(calls.get("tokens", 1000))

    def create_grammar_backend(_args: Any, _tokenizer: Any, vocab_size: int, eos: Any) -> Any:
        calls["created"] = (vocab_size, eos)
        return calls.get("backend", Backend())

    grammar = type("XGrammarGrammar", (Matcher,), {"fill_vocab_mask": Matcher.fill_vocab_mask})
    manager = type("GrammarManager", (Manager,), {"__init__": Manager.__init__})
    fake(monkeypatch, "sglang.srt.constrained.grammar_manager", GrammarManager=manager)
    fake(monkeypatch, "sglang.srt.constrained.base_grammar_backend", create_grammar_backend=create_grammar_backend)
    fake(monkeypatch, "sglang.srt.constrained.xgrammar_backend", XGrammarGrammar=grammar)
    fake(monkeypatch, "sglang.srt.managers.scheduler", get_tokenizer=get_tokenizer)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sglang_grammar.build_from_models_tokenizer()
    return SimpleNamespace(manager=manager, grammar=grammar, calls=calls, marker=sglang_grammar.marker(tmp_path))


def scheduler(*, built: Any = None, generates: bool = True) -> Any:
    config = SimpleNamespace(vocab_size=1000, hf_eos_token_id={2}, is_generation=generates)
    return SimpleNamespace(built_by_sglang=built, server_args=SERVER_ARGS, model_config=config)


class TestBackend:
    def test_it_is_built_from_the_models_own_tokenizer(self, sglang: SimpleNamespace) -> None:
        assert isinstance(sglang.manager(scheduler()).grammar_backend, Backend)
        assert sglang.calls == {"path": "/model", "created": (1000, {2})}
        assert sglang.marker.exists(), "the host sees it"

    def test_what_sglang_has_built_is_kept(self, sglang: SimpleNamespace) -> None:
        assert sglang.manager(scheduler(built="its own")).grammar_backend == "its own"
        assert not sglang.marker.exists()

    @pytest.mark.parametrize("why", [{"no_tokenizer": True}, {"tokens": 0}, {"backend": None}])
    def test_without_tokenizer_or_backend_the_engine_has_none(
        self, sglang: SimpleNamespace, why: dict[str, Any]
    ) -> None:
        sglang.calls.update(why)
        assert sglang.manager(scheduler()).grammar_backend is None
        assert not sglang.marker.exists()

    def test_it_does_not_keep_every_grammar_for_ever(self, sglang: SimpleNamespace) -> None:
        backend = sglang.manager(scheduler()).grammar_backend
        for number in range(1000):
            backend.set_cache(number, "compiled")
            assert backend.cache[number] == "compiled"
            assert len(backend.cache) <= 128

    def test_an_embedding_engine_needs_none(self, sglang: SimpleNamespace) -> None:
        assert sglang.manager(scheduler(generates=False)).grammar_backend is None


class TestDeadEnds:
    def test_without_an_allowed_token_all_are_let_through_for_the_grammar_to_refuse_one(
        self, sglang: SimpleNamespace
    ) -> None:
        grammar, mask = sglang.grammar(), [Row(), Row()]
        grammar.fill_vocab_mask(mask, 1)
        assert [row.bits for row in mask] == [-1, 1], "as SGLang fills it"
        grammar.allowed = 0
        grammar.fill_vocab_mask(mask, 1)
        assert mask[1].bits == -1

    def test_a_grammar_that_takes_too_long_ends_its_request(
        self, sglang: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sglang_grammar, "_SLOW_STEP_S", 0.005)
        grammar = sglang.grammar()
        for _ in range(50):
            grammar.accept_token(1)
        grammar.seconds = 0.01
        grammar.accept_token(1)
        grammar.accept_token(1)
        with pytest.raises(ValueError, match="takes too long to follow"):
            grammar.accept_token(1)


class TestMinNewTokens:
    def test_the_host_lets_them_through_and_still_refuses_stop_strings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def require(tokenizer: Any, stop_strs: Any, stop_regex_strs: Any, min_new_tokens: int = 0) -> None:
            if stop_strs or stop_regex_strs or min_new_tokens:
                raise ValueError("unavailable")

        module: Any = fake(monkeypatch, "sglang.srt.sampling.sampling_params", raise_if_tokenizer_required=require)
        allow_min_new_tokens()
        allow_min_new_tokens()
        module.raise_if_tokenizer_required(None, [], [], 5)
        with pytest.raises(ValueError, match="unavailable"):
            module.raise_if_tokenizer_required(None, ["stop"], [], 5)

    @pytest.mark.parametrize("reads_the_configuration", [True, False], ids=["0.5.23", "0.5.17"])
    def test_the_penalizer_bars_the_models_own_ends_and_leaves_no_tokenizer_behind(
        self, monkeypatch: pytest.MonkeyPatch, reads_the_configuration: bool
    ) -> None:
        class Penalizer:
            def __init__(self, reqs: list[Any]) -> None:
                self.orchestrator = SimpleNamespace(reqs=lambda: reqs)
                self.barred: list[set[int]] = []

            def _prepare(self) -> None:
                for req in self.orchestrator.reqs():
                    more = req.tokenizer.additional_stop_token_ids or set()
                    assert req.tokenizer.eos_token_id is None
                    self.barred.append(more | ((req.eos_token_ids or set()) if reads_the_configuration else set()))

        fake(monkeypatch, "sglang.srt.sampling.penaltylib", BatchedMinNewTokensPenalizer=Penalizer)
        count_min_new_tokens_without_tokenizer()
        reqs = [SimpleNamespace(tokenizer=None, eos_token_ids=ends) for ends in ({2}, {3, 4}, None)]
        penalizer = Penalizer(reqs)
        penalizer._prepare()
        assert penalizer.barred == [{2}, {3, 4}, set()]
        assert [req.tokenizer for req in reqs] == [None] * 3


SERVER = """
    import os, socket, sys, time
    from types import SimpleNamespace
    from services.worker.engines import grammar_trials as trials

    trials.CPU_LIMIT_S = 0.5
    trials.WALL_LIMIT_S = 2.0
    trials.leads_nowhere = lambda matcher, vocab_size: matcher == "nowhere"

    class Backend:
        def _init_value_dispatch(self, key, _reasoning):
            kind, source = key
            if source == "slow":
                while True: pass
            if source == "waits for a core":
                time.sleep(1.0)
            if source == "hangs":
                time.sleep(60.0)
            if source == "huge":
                return bytearray(2 * trials.MEMORY_BYTES)
            if source == "crash":
                os.abort()
            if source == "raises":
                raise AssertionError
            if source == "bad":
                return SimpleNamespace(error_message="[12:00:00] /build/grammar.cc:83: position 3: not closed")
            if source == "count":
                return SimpleNamespace(error_message=f"{kind} in {os.getpid()}")
            return SimpleNamespace(matcher=source)

    class Server(trials.TrialServer):
        def _build(self, vocab_size, eos_token_ids):
            if vocab_size == 0:
                raise RuntimeError("no vocabulary")
            assert (vocab_size, eos_token_ids) == (1000, [2])
            return Backend()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    Server(listener, lambda: None).run()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER), str(trial_socket(tmp_path))])
    deadline = time.monotonic() + 20
    while not trial_socket(tmp_path).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield tmp_path
    process.kill()
    process.wait()


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


class TestTrials:
    async def test_what_compiles_is_let_through_and_what_does_not_is_refused_by_its_field(self, server: Path) -> None:
        trials = GrammarTrials(server, 1000, (2,))
        await trials.require(regex("fine"))
        for source, named in (
            ("bad", "position 3: not closed"),
            ("raises", "does not compile"),
            ("nowhere", "allows no text at all"),
            ("slow", "takes more than"),
            ("hangs", "takes more than"),
            ("huge", "takes more than"),
            ("crash", "takes more than"),
        ):
            with pytest.raises(EngineRefusedError, match=f"^{named}") as caught:
                await trials.require(regex(source))
            assert caught.value.field == "sampling.regex"
        await trials.require(regex("still fine"))

    async def test_a_verdict_is_remembered_and_shared(self, server: Path) -> None:
        trials = GrammarTrials(server, 1000, (2,))

        async def verdict(kind: GrammarKind) -> str:
            with pytest.raises(EngineRefusedError) as caught:
                await trials.require(Grammar(kind, "count"))
            return str(caught.value)

        schemas = await asyncio.gather(*(verdict(GrammarKind.JSON_SCHEMA) for _ in range(20)))
        assert len(set(schemas)) == 1, "one process for all of them"
        assert schemas[0].startswith("json in "), "as SGLang calls it"
        assert await verdict(GrammarKind.EBNF) not in schemas

    async def test_one_that_waits_for_a_verdict_may_leave_and_the_others_get_it(self, server: Path) -> None:
        trials = GrammarTrials(server, 1000, (2,))
        first = asyncio.create_task(trials.require(regex("slow")))
        second = asyncio.create_task(trials.require(regex("slow")))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(EngineRefusedError):
            await second

    async def test_without_a_server_the_engines_own_time_outs_must_do(self, tmp_path: Path) -> None:
        await GrammarTrials(tmp_path, 1000, (2,)).require(regex("anything"))

    async def test_a_busy_host_refuses_nothing_that_compiles(self, server: Path) -> None:
        await GrammarTrials(server, 1000, (2,)).require(regex("waits for a core"))

    async def test_a_question_that_the_server_fails_over_is_not_its_last(self, server: Path) -> None:
        with pytest.raises(EngineRefusedError):
            await GrammarTrials(server, 0, (2,)).require(regex("bad"))
        with pytest.raises(EngineRefusedError, match="not closed"):
            await GrammarTrials(server, 1000, (2,)).require(regex("bad"))

    async def test_only_answers_are_remembered_for_good(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammar_trials, "_SILENCE_REMEMBERED_S", 0.2)
        trials, answers = GrammarTrials(tmp_path, 1000, (2,)), [b"garbled", b"{}", b"", b'{"refusal": "no"}']

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answers.pop(0))
            writer.close()

        async def refusal() -> str:
            try:
                await trials.require(regex("same"))
            except EngineRefusedError as error:
                return str(error)
            return ""

        assert await refusal() == "", "nobody is there yet"
        async with await asyncio.start_unix_server(answer, trial_socket(tmp_path)):
            assert [await refusal(), await refusal()] == ["", ""]
            assert len(answers) == 2, "each was a question"
            assert (await refusal()).startswith("takes more than")
            assert (await refusal()).startswith("takes more than")
            assert len(answers) == 1
            await asyncio.sleep(0.3)
            assert [await refusal(), await refusal()] == ["no", "no"]


class TestWalk:
    """Over the real xgrammar, where it is installed."""

    @pytest.mark.parametrize(
        ("ebnf", "nowhere"), [('root ::= root "a"', True), ('root ::= "a"', False), ("root ::= [a-z]*", False)]
    )
    def test_a_grammar_without_a_first_token_leads_nowhere(self, ebnf: str, nowhere: bool) -> None:
        xgrammar: Any = pytest.importorskip("xgrammar")
        info = xgrammar.TokenizerInfo(["</s>", "a", "b", "ab"], stop_token_ids=[0])
        compiled = xgrammar.GrammarCompiler(info).compile_grammar(ebnf)
        assert leads_nowhere(xgrammar.GrammarMatcher(compiled), 4) is nowhere
