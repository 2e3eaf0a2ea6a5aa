#!/usr/bin/env bash
# Checks everything that a GPU changes, on this machine's GPU or else on its CPU, in nine minutes at
# most: forced pauses and moves change no token; SGLang's order against ours on one instance and on
# two that share the device; what a scheduling pass and copies of KV cost.
#
#   bash evals/gpu/check.sh [--wheels DIR] [--out DIR] [--device auto|cuda|cpu] [--quick]
#
#   --wheels DIR   no network: use this machine's packages and, above them, every wheel in DIR. One of
#                  them has to be of pascal_sglang. On a machine with a network, all there can be:
#                  pip wheel -w DIR '.[evals]'; leave out what the other machine has, torch first.
#   --out DIR      where check.json, check.txt and the plots go
#   --quick        one instance and a short load
#   PASCAL_PYTHON  a python that has everything; nothing is installed
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
limit=540
wheels=
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --wheels) wheels="${2:?--wheels wants a folder}"; shift ;;
    --wheels=*) wheels="${1#--wheels=}" ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

packages=
stop_all() {
    stop_supervised
    [ -z "$packages" ] || rm -rf "$packages"
}

if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "check.sh: no folder $wheels" >&2; exit 2; }
    ls "$wheels"/pascal_sglang-*.whl >/dev/null 2>&1 ||
        { echo "check.sh: no wheel of pascal_sglang in $wheels" >&2; exit 2; }
    PASCAL_PYTHON="${PASCAL_PYTHON:-python3}"
    . "$root/launch/supervise.sh"
    at_exit stop_all
    packages="$(mktemp -d)"
    "$PASCAL_PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
        --target "$packages" "$wheels"/*.whl
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
else
    . "$root/launch/env.sh"
    at_exit stop_all
fi

cd "$root"
# The check itself begins nothing that it has no time for; this is for what hangs.
supervised --stop-timeout 60 timeout --foreground --kill-after=20 "$limit" \
    "$PASCAL_PYTHON" -m evals.gpu.check \
    --seconds "$((limit - 30 - SECONDS))" ${arguments[@]+"${arguments[@]}"}
wait "$supervised"
