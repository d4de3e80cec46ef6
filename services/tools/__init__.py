"""What an operator types: `kvbaton up`, `generate`, `status`, `bench`.

up.py          the command: a whole cluster on this machine, until Ctrl-C
options.py     what such a cluster consists of: processes, their arguments and environment
ports.py       a port for each of them
cluster.py     starts it, waits until it can answer, stops it; tests and the demo use it too
supervisor.py  one child process: log, death, stop
progress.py    what is shown while it starts
generate.py    the command: one prompt, streamed to the terminal
status.py      the command: which workers there are, what they do, what the frontend thinks of them
bench/         the command: load, and what its clients see
topology.py    what `status` asks, and of whom
client_flags.py, terminal.py  what the commands share
"""
