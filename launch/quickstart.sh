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
    --api-key) export OPENAI_API_KEY="${2:?--api-key wants a key}"; flags+=("$1" "$2"); shift ;;
    --api-key=*) export OPENAI_API_KEY="${1#--api-key=}"; flags+=("$1") ;;
    *) flags+=("$1") ;;
    esac
    shift
done

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

chat=
stop_all() {
    if [ -n "$supervised" ] && kill -0 "$supervised" 2>/dev/null; then
        pascal_say "stopping the server" || true
    fi
    # What bash says of a child that was killed is of no interest.
    if [ -n "$chat" ]; then { kill "$chat"; wait "$chat"; } 2>/dev/null || true; fi
    stop_supervised
}
at_exit stop_all

pascal_say "starting the demo server on http://127.0.0.1:$port (about 40 s; the first time it converts the model)"
cd "$pascal_root"
# Shown by the server's status, so that the chats are not another server's on the same port.
server_id="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
PASCAL_SGLANG_SERVER_ID="$server_id" supervised \
    "$PASCAL_PYTHON" -m pascal_sglang.launch_server --demo --host 127.0.0.1 --port "$port" \
    ${flags[@]+"${flags[@]}"}

# In the background, because bash notices no signal while it waits for a command in the foreground.
"$PASCAL_PYTHON" launch/demo_chat.py --base-url "http://127.0.0.1:$port" \
    --server-pid "$supervised" --server-id "$server_id" 8>&- &
chat=$!
wait "$chat" || exit $?
chat=

if ! $once; then
    pascal_say "the server stays up; try it with any OpenAI client, or: curl http://127.0.0.1:$port/pascal/status"
    pascal_say "Ctrl-C stops it"
    wait "$supervised"
fi
