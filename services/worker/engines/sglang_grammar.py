"""How SGLang's schedulers hold answers to a grammar although they start without a tokenizer.

Baton starts SGLang with `skip_tokenizer_init`, and its grammar manager then builds no backend. Here it gets one from
the model's own tokenizer, in the scheduler's process and of the kind that `--grammar-backend` names. Both versions of
SGLang are alike in all that is replaced here.
"""

from __future__ import annotations

import logging
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

# A step of a grammar takes microseconds. One that is ambiguous enough takes longer with each token, and every other
# request with it: after so many steps of so much processor time in the scheduler its request ends.
_SLOW_STEP_S = 0.1
_SLOW_STEPS = 3
TOO_SLOW = "the grammar takes too long to follow"
# Compiled grammars that a backend keeps, of up to some megabytes each; SGLang itself keeps all.
_KEPT = 128

_log = logging.getLogger(__name__)


def marker(folder: Path) -> Path:
    """The file that says, in an engine's private folder, that its schedulers have a grammar backend."""
    return folder / "grammar-backend"


def build_from_models_tokenizer() -> None:
    """Give every grammar manager that would have no backend one. In the scheduler's process, before it runs."""
    manager: Any = import_module("sglang.srt.constrained.grammar_manager").GrammarManager
    build = manager.__init__

    def with_backend(self: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        build(self, scheduler, *args, **kwargs)
        if self.grammar_backend is None and scheduler.model_config.is_generation:
            self.grammar_backend = _backend(scheduler)
            if self.grammar_backend is not None:
                marker(Path(os.environ["TMPDIR"])).touch()

    manager.__init__ = with_backend
    keep_dead_ends_from_the_sampler()


def load_tokenizer(server_args: Any) -> Any:
    """The model's own, as SGLang would load it. Raises whatever transformers raises."""
    load: Any = import_module("sglang.srt.managers.scheduler").get_tokenizer
    tokenizer = load(
        server_args.tokenizer_path or server_args.model_path,
        tokenizer_mode=server_args.tokenizer_mode,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
    )
    if len(tokenizer) < 256:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens")
    return tokenizer


def _backend(scheduler: Any) -> Any:
    """None, and a line in the log, where there can't be one: the engine serves all else without."""
    create: Any = import_module("sglang.srt.constrained.base_grammar_backend").create_grammar_backend
    model = scheduler.model_config
    try:
        tokenizer = load_tokenizer(scheduler.server_args)
        backend = create(scheduler.server_args, tokenizer, model.vocab_size, model.hf_eos_token_id)
    except Exception as error:  # noqa: BLE001 - no tokenizer, one that the backend can't read, no backend installed
        _log.warning("no grammar backend: %s", error)
        return None
    if backend is not None:
        forget_when_full(backend)
    return backend


def forget_when_full(backend: Any) -> None:
    """Empty the backend's caches when they hold too much. What runs keeps its own grammar."""
    keep = backend.set_cache

    def set_cache(key: Any, value: Any) -> None:
        if len(backend.cache) >= _KEPT:
            backend.reset()
        keep(key, value)

    backend.set_cache = set_cache


def keep_dead_ends_from_the_sampler() -> None:
    """End a request whose grammar allows no token, or costs too much, in place of what SGLang does then.

    Without a single allowed token the sampler divides by zero; with all of them allowed instead, the token that comes
    is one that the grammar doesn't accept, which SGLang ends in good order.
    """
    try:
        grammar: Any = import_module("sglang.srt.constrained.xgrammar_backend").XGrammarGrammar
    except ImportError:
        return  # not installed: no backend, or another one
    fill, accept = grammar.fill_vocab_mask, grammar.accept_token

    def fill_vocab_mask(self: Any, vocab_mask: Any, idx: int) -> None:
        started = time.thread_time()
        fill(self, vocab_mask, idx)
        if not bool(vocab_mask[idx].any()):
            vocab_mask[idx].fill_(-1)
        _count(self, started)

    def accept_token(self: Any, token: int) -> None:
        started = time.thread_time()
        accept(self, token)
        _count(self, started)
        if getattr(self, "kvbaton_slow_steps", 0) >= _SLOW_STEPS:
            raise ValueError(TOO_SLOW)

    grammar.fill_vocab_mask = fill_vocab_mask
    grammar.accept_token = accept_token


def _count(grammar: Any, started: float) -> None:
    if time.thread_time() - started > _SLOW_STEP_S:
        grammar.kvbaton_slow_steps = getattr(grammar, "kvbaton_slow_steps", 0) + 1
