"""`--processes N`: one frontend as several processes on the same two ports.

- `parent`: the process that was started: it keeps the ports, starts the others and ends with them
- `slot`: one of the others as the parent sees it, started again when it dies
- `child`: where such a process begins
- `place`: what it knows of those beside it; `siblings`: what they ask each other
- `ports`: two ports for all of them, and for nobody else
"""
