# shellcheck shell=bash
# What agg.sh and disagg.sh share: starting processes that end with the script, whatever ends it, and noticing when one of
# them ends by itself.
#
# On Linux each process asks for SIGTERM when this script dies (also by SIGKILL), and leads a session of its own: Ctrl-C
# reaches only the script, which then stops them in order.

STOP_SECONDS=${STOP_SECONDS:-120} # for each stage: drain grace, drain timeout and the engine's end fit
FOLLOWER=
declare -A PIDS=()

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# find_kvbaton: sets KVBATON to the command on PATH, or to the one that `make setup` installed in this checkout.
find_kvbaton() {
    local installed
    installed=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/kvbaton
    KVBATON=$(command -v kvbaton || printf '%s' "$installed")
    [[ -x $KVBATON ]] || die "no kvbaton command on PATH: run 'make setup', or see docs/install.md"
}

# prepare MODE: a folder for logs, and the traps. Call it before the first `start`.
prepare() {
    find_kvbaton
    STATE_DIR=${STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/kvbaton/$1-$(date +%Y%m%d-%H%M%S)-$$}
    mkdir -p "$STATE_DIR"
    WITH_SCRIPT=()
    if command -v setpriv >/dev/null; then
        # The second half looks whether the script died before setpriv had asked for the signal.
        # shellcheck disable=SC2016 # expanded by that sh
        WITH_SCRIPT=(setpriv --pdeathsig TERM sh -c '[ "$PPID" = "$0" ] && exec "$@"' $$)
    fi
    trap stop EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# start NAME [VARIABLE=VALUE...] COMMAND...: in the background, output to NAME.log.
start() {
    local name=$1
    shift
    # setsid does not fork here, so $! stays the process itself.
    setsid "${WITH_SCRIPT[@]}" env "$@" </dev/null >>"$STATE_DIR/$name.log" 2>&1 &
    PIDS[$name]=$!
}

running() { kill -0 "${PIDS[$1]}" 2>/dev/null; }

listening() { timeout 2 bash -c ": </dev/tcp/${1%:*}/${1##*:}" 2>/dev/null; }

# start_etcd_if_none_answers: etcd at KVBATON_ETCD_ENDPOINTS, where nobody listens there and it is this machine.
start_etcd_if_none_answers() {
    local endpoint=${KVBATON_ETCD_ENDPOINTS:-127.0.0.1:2379} etcd
    if [[ $endpoint == *,* ]] || listening "$endpoint"; then return; fi
    [[ $endpoint =~ ^(127\.0\.0\.1|localhost):[0-9]+$ ]] || die "no etcd answers at $endpoint"
    etcd=$(command -v etcd || printf '%s' "$(dirname "$KVBATON")/etcd")
    [[ -x $etcd ]] || die "no etcd answers at $endpoint and there is none on PATH to start: see docs/install.md"
    # For local use only: it does not wait for the disk. The peer port is never dialled, so any will do.
    start etcd "$etcd" --name local --data-dir "$STATE_DIR/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls "http://$endpoint" --advertise-client-urls "http://$endpoint" \
        --listen-peer-urls http://127.0.0.1:0
    until listening "$endpoint"; do
        running etcd || report_death etcd
        sleep 0.1
    done
}

# follow NAME...: their logs on this terminal until the end.
follow() {
    "${WITH_SCRIPT[@]}" tail -n +1 -s 0.2 -F "${@/%/.log}" </dev/null &
    FOLLOWER=$!
}

# watch: returns never; the first process that ends takes the rest along, and its log's end is shown.
watch() {
    local name
    while true; do
        for name in "${!PIDS[@]}"; do
            running "$name" || report_death "$name"
        done
        sleep 0.5
    done
}

report_death() {
    local status=0
    wait "${PIDS[$1]}" || status=$?
    {
        printf '\n%s: %s ended with status %d. The end of %s:\n' "${0##*/}" "$1" "$status" "$STATE_DIR/$1.log"
        tail -n 30 "$STATE_DIR/$1.log" | sed 's/^/  | /'
    } >&2
    exit $((status ? status : 1))
}

# A second Ctrl-C or SIGTERM: to our processes that means no drain, but no litter either.
hurry() {
    local name
    for name in "${!PIDS[@]}"; do kill -TERM "${PIDS[$name]}" 2>/dev/null || true; done
}

# end NAME...: SIGTERM to those that run, SIGKILL after STOP_SECONDS; then nothing of their sessions is left.
end() {
    local name until=$((SECONDS + STOP_SECONDS))
    for name in "$@"; do
        [[ -n ${PIDS[$name]:-} ]] || continue
        kill -TERM "${PIDS[$name]}" 2>/dev/null || true
        kill -CONT "${PIDS[$name]}" 2>/dev/null || true # a stopped process would never see it
    done
    for name in "$@"; do
        [[ -n ${PIDS[$name]:-} ]] || continue
        while running "$name" && ((SECONDS < until)); do sleep 0.1; done
        ! running "$name" || printf '%s: %s did not end in time and is killed\n' "${0##*/}" "$name" >&2
        kill -KILL -- "-${PIDS[$name]}" 2>/dev/null || true
        wait "${PIDS[$name]}" 2>/dev/null || true
    done
}

# The frontend ends first, because its requests need the workers; etcd last, because the workers take their records out.
stop() {
    local status=$?
    trap - EXIT
    trap hurry HUP INT TERM
    set +e
    end frontend
    end prefill decode worker
    end etcd
    rm -rf "$STATE_DIR/etcd"
    if [[ -n $FOLLOWER ]]; then
        sleep 0.3 # its last look at the logs
        kill "$FOLLOWER" 2>/dev/null
        wait "$FOLLOWER" 2>/dev/null
    fi
    exit "$status"
}
