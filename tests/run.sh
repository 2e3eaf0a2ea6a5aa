#!/usr/bin/env bash
# Installs what is needed and runs lint, types and the whole test suite.
#
#   bash tests/run.sh [pytest arguments]      e.g. bash tests/run.sh tests/unit
#   bash tests/run.sh --sglang 0.5.22 [pytest arguments]
#
# Two workers share the tests; --numprocesses 0 runs them in one process.
#
# --sglang runs the tests on another release: its wheel, downloaded alone, stands before the
# installed one. Everything that SGLang depends on stays as the installed one wants it.
set -euo pipefail

release=""
case "${1:-}" in
-h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
--sglang)
    release="${2:?--sglang needs a version}"
    shift 2
    ;;
--sglang=*)
    release="${1#*=}"
    shift
    ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
cd "$pascal_root"
# Every server would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
workers=(--numprocesses 2 --dist loadfile)

if [ -n "$release" ]; then
    python="$("$PASCAL_PYTHON" -m pascal_sglang.sglang_releases "$release")" || exit 1
    PASCAL_PYTHON="$python"
    pascal_say "pytest with sglang $release, $PASCAL_PYTHON"
    exec "$PASCAL_PYTHON" -m pytest "${workers[@]}" "$@"
fi

pascal_say "ruff"
"$PASCAL_PYTHON" -m ruff check .
"$PASCAL_PYTHON" -m ruff format --check .
pascal_say "mypy, beside pytest"
types="$(mktemp)"
nice "$PASCAL_PYTHON" -m mypy >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
pascal_say "pytest"
code=0
"$PASCAL_PYTHON" -m pytest "${workers[@]}" "$@" || code=$?
wait "$mypy" || code=1
pascal_say "mypy"
cat "$types"
exit "$code"
