"""`kvbaton bench`: load on a frontend or an aggregated worker, and what its clients would have seen.

command.py   the command: flags in, report out, exit status
options.py   the flags, and what contradicts what
workload.py  which requests, and when: a function of the seed alone
load.py      sends them: open loop, closed loop, warm-up, bounds
sender.py    one request: its call, its planned cancellation, its times
samples.py   what one request was, and the definitions of TTFT, ITL, TPOT and E2E
results.py   all requests, in compact arrays
statistics.py  percentiles, exact and by histogram
monitor.py   what the generator itself costs
report.py    the numbers as a table and as JSON
"""
