"""Which prefixes the worker's engine holds, kept and told to whoever subscribes.

- `mirror`: the pages of one dp rank, as the engine's events describe them
- `hub`: the mirrors of all ranks, the numbered changes, and their subscribers
- `feed`: from the engine into the hub, for as long as the worker lives
- `wire`: events and snapshots as messages

Where the events come from is the engine's business: `Engine.kv_events`.
"""
