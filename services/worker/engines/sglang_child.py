"""What Baton does inside SGLang's child processes before SGLang's own code runs there.

SGLang spawns `run_scheduler` and `run_detokenizer` in place of its own entry points, through attributes of its `Engine`
that exist to be replaced. Unlike an `sglang.srt.plugins` entry point, whose failing import SGLang only logs, a failure
here ends the launch.
"""

from __future__ import annotations

import os
import socket
from importlib import import_module
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from services.worker.engines import sglang_grammar as grammars
from services.worker.engines.grammar_trials import TrialServer, trial_socket
from services.worker.engines.sglang_writers import GONE_WRITER_TIMEOUT, Writers, release_pages_of_dead_writers

# SGLang's progress thread for NIXL spins a whole core with its default of 0.
_NIXL_PROGRESS_DELAY_US = 1000
# On a CPU the engine takes all there is of it. The host beside it, which answers heartbeats, needs little, but at once.
_CPU_NICENESS = 5
_TRIAL_NICENESS = 10


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's `run_scheduler_process` with the changes of this module, some of them on a CPU alone."""
    die_with_parent()
    scheduler: Any = import_module("sglang.srt.managers.scheduler")
    server_args: Any = args[0] if args else kwargs["server_args"]
    grammars.build_from_models_tokenizer()
    try_grammars_out(server_args)
    # Bare SGLang on a CPU, in benchmarks, comes here as well: what is Baton's own is off there.
    gone_after = float(os.environ.get(GONE_WRITER_TIMEOUT, "0"))
    if server_args.disaggregation_mode == "decode" and gone_after:
        release_pages_of_dead_writers(Writers(gone_after))
    count_min_new_tokens_without_tokenizer()
    draw_alike_in_every_batch()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        os.nice(_CPU_NICENESS)
        register_kv_cache_as_host_memory()
        seed_every_request()
    scheduler.run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    """SGLang's `run_detokenizer_process`."""
    die_with_parent()
    detokenizer: Any = import_module("sglang.srt.managers.detokenizer_manager")
    detokenizer.run_detokenizer_process(*args, **kwargs)


def die_with_parent() -> None:
    """End this process when its parent ends, or at once if it has.

    SGLang asks the kernel for the first alone, and only after seconds of imports: a host that ends in between leaves
    children that nobody ends.
    """
    import_module("sglang.srt.utils.common").kill_itself_when_parent_died()
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def try_grammars_out(server_args: Any) -> None:
    """Fork the process that tries grammars out; the first scheduler of this host does.

    From here, because all modules are loaded and neither a device nor a thread is.
    """
    if server_args.grammar_backend not in (None, "xgrammar") or server_args.is_embedding:
        return
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(trial_socket(Path(os.environ["TMPDIR"]))))
    except OSError:
        listener.close()
        return  # another rank was first
    listener.listen(64)
    if os.fork():
        listener.close()
        return
    try:
        die_with_parent()
        os.nice(_TRIAL_NICENESS)
        TrialServer(listener, lambda: grammars.load_tokenizer(server_args)).run()
    finally:
        os._exit(1)


def count_min_new_tokens_without_tokenizer() -> None:
    """Let SGLang's `min_new_tokens` work from the ends of sequence that the model's configuration names.

    It asks each request's tokenizer for them (0.5.17 for all, 0.5.23 for further ones), and there is none.
    """
    penalizer: Any = import_module("sglang.srt.sampling.penaltylib").BatchedMinNewTokensPenalizer
    prepare = penalizer._prepare  # noqa: SLF001

    def with_stand_in(self: Any) -> None:
        without = [req for req in self.orchestrator.reqs() if req.tokenizer is None]
        for req in without:
            ends = {token for token in req.eos_token_ids or () if token is not None}
            req.tokenizer = SimpleNamespace(eos_token_id=None, additional_stop_token_ids=ends)
        try:
            prepare(self)
        finally:
            for req in without:
                req.tokenizer = None

    penalizer._prepare = with_stand_in  # noqa: SLF001


def register_kv_cache_as_host_memory() -> None:
    """Make SGLang's NIXL connector say DRAM where it hard-codes VRAM, and let its progress thread sleep."""
    try:
        api: Any = import_module("nixl._api")
    except ImportError:
        return  # an aggregated worker needs no NIXL
    agent: Any = api.nixl_agent

    def host(kind: str | None) -> str | None:
        return "DRAM" if kind == "VRAM" else kind

    class HostAgent(agent):
        def register_memory(self, reg_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return super().register_memory(reg_list, host(mem_type), *args, **kwargs)

        def get_xfer_descs(self, descs: Any, mem_type: str | None = None, *args: Any, **kwargs: Any) -> Any:
            return super().get_xfer_descs(descs, host(mem_type), *args, **kwargs)

        def prep_xfer_dlist(
            self, agent_name: str, xfer_list: Any, mem_type: str | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            return super().prep_xfer_dlist(agent_name, xfer_list, host(mem_type), *args, **kwargs)

    native_agent = api.nixlBind.nixlAgent

    def sleepy_agent(name: str, config: Any) -> Any:
        config.pthrDelay = _NIXL_PROGRESS_DELAY_US
        return native_agent(name, config)

    api.nixl_agent = HostAgent
    api.nixlBind.nixlAgent = sleepy_agent


def seed_every_request() -> None:
    """Sample each request from its own `sampling_seed` and the token's position, as deterministic inference does.

    SGLang carries the seeds to the sampler only with `--enable-deterministic-inference`, which needs CUDA kernels. The
    sampler itself (`multinomial_with_seed`) works on a CPU, so the seeds are put into every batch here. The host sends
    a seed with every request, a random one where the client asks for none.
    """
    torch: Any = import_module("torch")
    batch_info: Any = import_module("sglang.srt.sampling.sampling_batch_info").SamplingBatchInfo
    build = batch_info.from_schedule_batch.__func__

    def from_schedule_batch(cls: Any, batch: Any, vocab_size: int) -> Any:
        info = build(cls, batch, vocab_size)
        if info.sampling_seed is None:
            seeds = [req.sampling_params.sampling_seed or 0 for req in batch.reqs]
            info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=info.temperatures.device)
        return info

    batch_info.from_schedule_batch = classmethod(from_schedule_batch)


def draw_alike_in_every_batch() -> None:
    """Let a seed give the same tokens whatever else is in the batch, and let it go with min_p.

    SGLang draws from probabilities in the order of the vocabulary, but from sorted ones as soon as one request of the
    batch has a top_k (a greedy one has), a top_p or a min_p; the same seed then gives another token. With min_p it
    asserts that there is no seed. Here the filters leave the order alone. min_p, top_k and top_p each drop the least
    likely tokens, so that their order doesn't matter.
    """
    torch: Any = import_module("torch")
    sampler: Any = import_module("sglang.srt.layers.sampler")
    sample, draw = sampler.top_k_top_p_min_p_sampling_from_probs_torch, sampler.sampling_from_probs_torch

    def filtered_in_place(
        probs: Any,
        top_ks: Any,
        top_ps: Any,
        min_ps: Any,
        need_min_p_sampling: bool,
        sampling_seed: Any,
        positions: Any,
        **kwargs: Any,
    ) -> Any:
        if sampling_seed is None or kwargs.get("return_filtered_probs"):
            return sample(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **kwargs)
        if need_min_p_sampling:
            threshold = probs.amax(dim=-1, keepdim=True) * min_ps.view(-1, 1)
            probs = probs.masked_fill(probs < threshold, 0.0)
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(ranked.shape[-1], device=ranked.device).view(1, -1)
        # Without a top_p nothing is dropped, also where the rounded sum exceeds 1.
        limits = top_ps.masked_fill(top_ps >= 1.0, 2.0)
        dropped = (ranks >= top_ks.view(-1, 1)) | (ranked.cumsum(dim=-1) - ranked > limits.view(-1, 1))
        dropped = torch.zeros_like(dropped).scatter_(1, order, dropped)
        return draw(probs.masked_fill(dropped, 0.0), sampling_seed, positions)

    sampler.top_k_top_p_min_p_sampling_from_probs_torch = filtered_in_place
