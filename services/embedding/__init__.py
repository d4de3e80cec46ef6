"""The embedding role: one vector per text instead of tokens.

- `contract`: what the role asks of a request, and of a worker that is ready
"""
