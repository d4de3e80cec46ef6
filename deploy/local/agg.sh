#!/usr/bin/env bash
# A frontend and an aggregated worker (prefill and decode in one engine) on this machine, started by hand: what
# `kvbaton up --mode agg` does, without its supervision. etcd must run (KVBATON_ETCD_ENDPOINTS, default 127.0.0.1:2379).
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: agg.sh [--model-path MODEL] [--device cpu|cuda] [-h] [flags for the worker]

  --model-path  smollm2, a folder, or a hub id (default: smollm2)
  --device      cpu or cuda (default: cuda)

gRPC on 50051, HTTP on 8000; the worker's gRPC on 50061, health and metrics on 8081. Ctrl-C or SIGTERM ends all of it.
USAGE
}

MODEL=smollm2
DEVICE=cuda
NATIVE=()
while (($#)); do
    case $1 in
        --model-path) MODEL=${2:?--model-path needs a value}; shift 2 ;;
        --device) DEVICE=${2:?--device needs a value}; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) NATIVE+=("$1"); shift ;;
    esac
done

# Background jobs of a script ignore SIGINT, so Ctrl-C reaches them as SIGTERM from here. The frontend ends first, because
# its requests need the worker.
FRONTEND=
WORKER=
stop() {
    trap '' INT TERM
    [[ -z $FRONTEND ]] || { kill -TERM "$FRONTEND" 2>/dev/null && wait "$FRONTEND"; } || true
    [[ -z $WORKER ]] || kill -TERM "$WORKER" 2>/dev/null || true
    wait || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

kvbaton frontend --port 50051 --http-port 8000 &
FRONTEND=$!

kvbaton decode --disaggregation-mode null --model-path "$MODEL" --device "$DEVICE" \
    --port 50061 --system-port 8081 "${NATIVE[@]}" &
WORKER=$!

# Either process that ends takes the other along.
wait -n
