"""The decode service: generates from a KV cache that prefill wrote, or, aggregated, from its own.

- `contract`: what a request needs here
- `bootstrap`: BootstrapService.CheckPeer
"""
