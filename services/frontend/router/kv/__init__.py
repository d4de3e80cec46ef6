"""Which worker holds how much of a prompt in its KV cache, as its own events tell it, or as far as it can be guessed.

- `index`: pages by their prefix hashes, and who holds each (`KvIndex`, `Holder`)
- `pages`: the bounded table under it
- `state`: one worker's messages, checked and applied to it
- `follower`: one worker's events for as long as it is known, exact again after whatever went wrong
- `indexes`: the index of this process with a follower for every worker that has one (`KvIndexes`): what policies use

    async with KvIndexes(worker_set.all, max_pages=1_000_000) as kv:
        worker_set.on_change(kv.workers_changed)
        cached = kv.cached_tokens(token_ids, lora_name="", cache_salt="")  # {Holder("prefill/p0", 1): 1984, ...}
        ...  # choose
        kv.routed(Holder("prefill/p0", 1), token_ids, lora_name="", cache_salt="")

- `Holder(worker, dp_rank)`: a worker by role and instance id (`cache_owner`), and one of its data-parallel ranks.
- `cached_tokens` answers in tokens from the beginning of the prompt, only for holders with at least one page. Workers
  with different page sizes are in it alike: a prompt is hashed once per distinct size, and only as far as anyone has
  it.
- `routed` must be called for every prefill (or aggregated) leg that is sent. For a worker whose events are exact it
  does nothing; for one without events (or not followed yet) what was sent there is assumed to be cached there, as much
  as its KV pool holds and for a bounded time. Decode workers are ignored.
- `exact(worker)`: whether what is known of this worker is what it holds.
- `workers_changed` starts and stops followers; a worker that is gone, or a new incarnation of it, takes its pages
  along.
"""
