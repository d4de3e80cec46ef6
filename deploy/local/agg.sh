#!/usr/bin/env bash
# A frontend and an aggregated worker (prefill and decode in one engine) on this machine: what `kvbaton up --mode agg` does,
# in plain sight.
set -euo pipefail
# shellcheck source=deploy/local/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FRONTEND_PORT=${FRONTEND_PORT:-50051} HTTP_PORT=${HTTP_PORT:-8000}
WORKER_PORT=${WORKER_PORT:-50061} SYSTEM_PORT=${SYSTEM_PORT:-8081}

usage() {
    cat <<USAGE
usage: agg.sh [--model-path MODEL] [--enable-otel] [-h] [flags for the worker]

  --model-path   smollm2, a folder, or a hub id (default: smollm2)
  --enable-otel  traces over OTLP to OTEL_EXPORTER_OTLP_ENDPOINT (default: http://localhost:4317)

Everything else goes to the worker: --device cpu, --served-model-name NAME, --tp 2, ... The worker sees the GPUs of
CUDA_VISIBLE_DEVICES, all without it. Ports: gRPC $FRONTEND_PORT, HTTP $HTTP_PORT; worker $WORKER_PORT, its health and metrics $SYSTEM_PORT
(FRONTEND_PORT, HTTP_PORT, WORKER_PORT, SYSTEM_PORT). etcd is started if none answers at KVBATON_ETCD_ENDPOINTS (default:
127.0.0.1:2379). Logs stay in \$STATE_DIR, which is shown at the start. Ctrl-C or SIGTERM ends all of it.
USAGE
}

MODEL=smollm2 OTEL='' FORWARDED=()
while (($#)); do
    case $1 in
        --model-path) MODEL=${2:?--model-path needs a value}; shift 2 ;;
        --model-path=*) MODEL=${1#*=}; shift ;;
        --enable-otel) OTEL=--enable-otel; shift ;;
        -h | --help) usage; exit 0 ;;
        *) FORWARDED+=("$1"); shift ;;
    esac
done

[[ -z $OTEL ]] || export OTEL_EXPORTER_OTLP_ENDPOINT="${OTEL_EXPORTER_OTLP_ENDPOINT:-http://localhost:4317}"
prepare agg
start_etcd_if_none_answers

start frontend OTEL_SERVICE_NAME=kvbaton-frontend \
    "$KVBATON" frontend --port "$FRONTEND_PORT" --http-port "$HTTP_PORT" ${OTEL:+"$OTEL"}

start worker OTEL_SERVICE_NAME=kvbaton-worker \
    "$KVBATON" decode --disaggregation-mode null --model-path "$MODEL" --page-size 16 \
    --port "$WORKER_PORT" --system-port "$SYSTEM_PORT" ${OTEL:+"$OTEL"} "${FORWARDED[@]}"

printf 'Logs: %s\n' "$STATE_DIR"
follow "$STATE_DIR/frontend" "$STATE_DIR/worker"
watch
