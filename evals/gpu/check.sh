#!/usr/bin/env bash
# Checks everything that a GPU changes, on this machine's GPU or else on its CPU, in 585 seconds at
# most: copies and streams by themselves; forced pauses, moves and aborts change no token; SGLang's
# order against ours; what scheduling costs; how long moves keep readers waiting. What there is no
# time for is left out from the end.
#
#   bash evals/gpu/check.sh [--site DIR] [--out DIR] [--device auto|cuda|cpu] [--only PART]...
#
#   --site DIR     no network: use this machine's packages and, above them, what `kit.sh` built
#   --out DIR      where check.json, check.txt and the plots go, as results come
#   --only PART    probe, identity, prefixes, order, overhead or moves; may be given several times
#   PASCAL_PYTHON  a python that has everything; nothing is installed
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
limit=585
site=
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --site) site="${2:?--site wants a folder}"; shift ;;
    --site=*) site="${1#--site=}" ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

if [ -n "$site" ]; then
    [ -d "$site/sglang" ] || { echo "check.sh: no sglang in $site" >&2; exit 2; }
    PASCAL_PYTHON="${PASCAL_PYTHON:-python3}"
    export PYTHONPATH="$root:$(cd "$site" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
    arguments+=(--from-kit)
    . "$root/launch/supervise.sh"
else
    . "$root/launch/env.sh"
fi
at_exit stop_supervised

cd "$root"
# The check itself begins nothing that it has no time for; this is for what hangs.
supervised --stop-timeout 60 timeout --foreground --kill-after=15 "$((limit - 15 - SECONDS))" \
    "$PASCAL_PYTHON" -m evals.gpu.check \
    --seconds "$((limit - 40 - SECONDS))" ${arguments[@]+"${arguments[@]}"}
wait "$supervised"
