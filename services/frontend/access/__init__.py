"""Who may use the frontend, and how much of it: API keys from a file, the same for HTTP and gRPC.

- `keys`: the file, and what a key is
- `rates`: how many requests a minute
- `gate`: one object for both edges: whose key is it, may it go on now
- `guarded`: the frontend's services as the owner of a key sees them
- `reload`: the file while the process runs

What asks the gate is with the edges: `edge.gate` (HTTP) and `servicers.gate` (gRPC).
"""
