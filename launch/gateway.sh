#!/usr/bin/env bash
# SGLang's model gateway in front of several servers, each with instances, policy and KV of its own.
#
#   bash launch/gateway.sh serve URL [URL ...] [gateway flags]   one address for them, port 30000
#   bash launch/gateway.sh drain URL [notice]                    empty a server, before its restart
#   bash launch/gateway.sh undrain URL                           let it take requests again
#
# URL is that of a server, as http://10.0.0.2:30000. `drain` returns when no request is left there;
# notice: the seconds for which it still takes new ones (5). OPENAI_API_KEY: the operator's key of
# the servers. For one server over several hosts see launch/ray_cluster.sh. The gateway is the extra
# `gateway` of pyproject.toml; docs/operations.md says what it sees of a request and what it drops.
# It has no key unless it gets --api-key, and listens to this host only unless it gets --host.
set -euo pipefail

case "${1:-}" in
serve | drain | undrain) command="$1"; shift ;;
*) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; exit ;;
esac

# The answer of a server to POST $1/pascal/$2 with the body $3; its status is that of curl. The key
# is in no command line, which other users of this host could read.
ask() {
    curl --silent --show-error --fail-with-body --max-time 30 \
        --header @<([ -z "${OPENAI_API_KEY:-}" ] || printf 'Authorization: Bearer %s\n' "$OPENAI_API_KEY") \
        --data "$3" "$1/pascal/$2" && echo
}

url="${1:?$command wants the URL of a server}"
url="${url%/}"
case "$command" in
drain)
    ask "$url" drain "{\"notice_s\": ${2:-5}}"
    answer=""
    while [[ "$answer" != *'"drained"'* ]]; do
        sleep 0.5
        answer="$(ask "$url" drain '{}')"
    done
    echo "$answer"
    exit ;;
undrain) ask "$url" undrain '{}'; exit ;;
esac

servers=()
while [[ "${1:-}" == http* ]]; do servers+=("$1"); shift; done
[ ${#servers[@]} -gt 0 ] || { echo "serve wants URLs of servers first, not $url" >&2; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$pascal_root"
# The health of a server says within a second that it is drained, which takes it out after two looks.
# Until then, and until a server that died has been missed, a request is tried again, for about seven
# seconds. The gateway's circuit breaker counts errors of clients too: ten bad requests in a row would
# take a server out for a minute. A shared system prompt keeps requests on one server until that has
# 8 more under way than another one, instead of 64. Loads, for `--policy power_of_two`, are read with
# the interval that is called that of a start.
exec "$PASCAL_PYTHON" -m sglang_router.launch_router --worker-urls "${servers[@]}" \
    --host 127.0.0.1 --port 30000 --prometheus-host 127.0.0.1 \
    --policy cache_aware --balance-abs-threshold 8 --balance-rel-threshold 1.2 \
    --health-check-interval-secs 1 --health-failure-threshold 2 --health-success-threshold 1 \
    --retry-max-retries 10 --retry-initial-backoff-ms 100 --disable-circuit-breaker \
    --worker-startup-check-interval 1 "$@"
