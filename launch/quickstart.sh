#!/usr/bin/env bash
# Serves the demo model on this machine's CPU, sends a few chats, and shows what their user feels.
# Then the same burst of a dozen requests on little memory, in SGLang's order and in ours.
#
#   bash launch/quickstart.sh [--once] [--port N] [--requests N] [any launch_server flag]
#
# Leaves the server up until Ctrl-C; with --once it stops after the burst, which has N requests.
set -euo pipefail

once=false
port=30000
requests=12
# Memory for less than half of what the burst needs, so that the order matters. Both may be given
# anew.
flags=(--max-total-tokens 320 --context-length 320)
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --once) once=true ;;
    --port) port="${2:?--port wants a number}"; shift ;;
    --port=*) port="${1#--port=}" ;;
    --requests) requests="${2:?--requests wants a number}"; shift ;;
    --requests=*) requests="${1#--requests=}" ;;
    --api-key) export OPENAI_API_KEY="${2:?--api-key wants a key}"; flags+=("$1" "$2"); shift ;;
    --api-key=*) export OPENAI_API_KEY="${1#--api-key=}"; flags+=("$1") ;;
    *) flags+=("$1") ;;
    esac
    shift
done

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

client=
stop_all() {
    if [ -n "$supervised" ]; then pascal_say "stopping the servers" || true; fi
    # What bash says of a child that was killed is of no interest.
    if [ -n "$client" ]; then { kill "$client"; wait "$client"; } 2>/dev/null || true; fi
    stop_supervised
}
at_exit stop_all

# Runs a Python program in the background, because bash notices no signal while it waits for a
# command in the foreground.
run() {
    (close_supervised; exec "$PASCAL_PYTHON" "$@") &
    client=$!
    wait "$client" || exit $?
    client=
}

cd "$pascal_root"
run -m pascal_sglang.demo.smollm2 >/dev/null
logs="$(mktemp -d "${TMPDIR:-/tmp}/pascal_sglang-quickstart-XXXXXX")"
other="$("$PASCAL_PYTHON" -c 'from evals.load.server import free_port; print(free_port())')"
pascal_say "starting a demo server on http://127.0.0.1:$port and one in SGLang's order beside it"
pascal_say "  (their messages: $logs/*.log)"
# Shown by a server's status, so that the chats are not another server's on the same port.
server_id="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
export PASCAL_SGLANG_SERVER_ID="$server_id"
supervised "$PASCAL_PYTHON" -m pascal_sglang.demo.servers --host 127.0.0.1 --sleep-on-idle \
    ${flags[@]+"${flags[@]}"} --log "$logs/pascal.log" --port "$port" \
    --log "$logs/fcfs.log" --port "$other" --pascal-policy fcfs >>"$logs/pascal.log" 2>&1
servers=$supervised

run launch/demo_chat.py --base-url "http://127.0.0.1:$port" \
    --server-pid "$servers" --server-id "$server_id" --log "$logs/pascal.log"

pascal_say "the same $requests requests at once, first in SGLang's order (fcfs), then in ours"
pascal_say "  (as a page: http://127.0.0.1:$port/pascal/)"
run -m evals.burst --requests "$requests" --ready-check-timeout-sec 240 \
    "fcfs=http://127.0.0.1:$other" "pascal=http://127.0.0.1:$port"

if ! $once; then
    pascal_say "the server stays up; try it with any OpenAI client, or: curl http://127.0.0.1:$port/pascal/status"
    pascal_say "Ctrl-C stops it"
    wait "$servers"
fi
