"""Who is alive, according to etcd.

records.py    what a worker writes: keys, values, which incarnation is newer
etcd.py       typed etcd client: deadlines, several endpoints, TLS
watch.py      one etcd watch stream
lease.py      keeps one lease alive, and a new one when it is lost
publisher.py  keeps one worker's record as the worker wants it
watcher.py    every worker of a namespace: list, watch, list again on any doubt
lookup.py     one-off reads: one worker, all workers
local.py      an etcd child process for `kvbaton up` and tests
backoff.py    waiting times between attempts
"""
