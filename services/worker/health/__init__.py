"""Whether a worker that serves is well.

- `payload`: what is asked of the engine, `--health-check-payload`
- `canary`: when it is asked, and what a missing answer means
"""
