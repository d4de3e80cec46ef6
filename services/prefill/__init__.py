"""The prefill service: computes a prompt's KV cache and hands it to a decode worker.

- `contract`: what a request needs here, and what must answer before the worker serves
- `bootstrap`: BootstrapService.GetEndpoint
"""
