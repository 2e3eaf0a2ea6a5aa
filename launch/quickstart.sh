#!/usr/bin/env bash
# Serves the demo model on this machine's CPU, sends a few chats, and shows what their user feels.
#
#   bash launch/quickstart.sh [--once] [--port N] [any launch_server flag]
#
# Leaves the server up until Ctrl-C; with --once it stops after the chats.
set -euo pipefail

once=false
port=30000
flags=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --once) once=true ;;
    --port) port="${2:?--port wants a number}"; shift ;;
    --port=*) port="${1#--port=}" ;;
    *) flags+=("$1") ;;
    esac
    shift
done

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

server=
stop_server() {
    trap '' INT TERM
    if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
        pascal_say "stopping the server"
        kill -TERM "$server" 2>/dev/null || true
        local waited=0
        while kill -0 "$server" 2>/dev/null && [ "$waited" -lt 100 ]; do
            sleep 0.1
            waited=$((waited + 1))
        done
        kill -KILL -- "-$server" 2>/dev/null || true
    fi
}
trap stop_server EXIT
trap 'exit 130' INT TERM

pascal_say "starting the demo server on http://127.0.0.1:$port (about 40 s; the first time it converts the model)"
cd "$pascal_root"
# A process group of its own, so that the end of this script can take all of it along.
set -m
"$PASCAL_PYTHON" -m pascal_sglang.launch_server --demo --host 127.0.0.1 --port "$port" \
    ${flags[@]+"${flags[@]}"} &
server=$!
set +m

"$PASCAL_PYTHON" launch/demo_chat.py --base-url "http://127.0.0.1:$port" --server-pid "$server" || exit $?

if ! $once; then
    pascal_say "the server stays up; try it with any OpenAI client, or: curl http://127.0.0.1:$port/pascal/status"
    pascal_say "Ctrl-C stops it"
    wait "$server"
fi
