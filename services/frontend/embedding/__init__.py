"""Embeddings: one unary call to one worker, beside generation's legs, credits and queue.

- `service`: every live request, its attempts, its end
- `prepare`: from what a client sent to what workers take
"""
