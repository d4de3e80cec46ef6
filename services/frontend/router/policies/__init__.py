"""How a worker is chosen among those that could take a request, for prefill and for decode by policies of their own.

- `policy`: what a policy is asked, and what it answers
- `round_robin`, `random_choice`, `power_of_two`, `least_loaded`, `kv_aware`, `direct`: one policy each
- `make`: the two policies that the flags name

A policy sees data-parallel ranks, not workers. Who could take the request at all (compat hash, proven pairs,
exclusions, free slots, hints) is not its business.
"""
