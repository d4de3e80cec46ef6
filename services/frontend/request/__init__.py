"""The life of one request in the frontend.

- `api`: what the edges see
- `prepare`: checks, chat template, tokenization
- `owner`: the one task that owns a request, from dispatch to its end
- `deadlines`: how long each phase may take
"""
