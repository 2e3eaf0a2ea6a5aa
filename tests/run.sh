#!/usr/bin/env bash
# Installs what is needed and runs lint, types and the whole test suite.
#
#   bash tests/run.sh [pytest arguments]      e.g. bash tests/run.sh tests/unit
#   bash tests/run.sh --sglang 0.5.22 [pytest arguments]
#
# --sglang runs the tests on another release: its wheel, downloaded alone, stands before the
# installed one. Everything that SGLang depends on stays as the installed one wants it.
set -euo pipefail

release=""
case "${1:-}" in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
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

if [ -n "$release" ]; then
    python="$("$PASCAL_PYTHON" -m pascal_sglang.sglang_releases "$release")" || exit 1
    PASCAL_PYTHON="$python"
    pascal_say "pytest with sglang $release, $PASCAL_PYTHON"
    exec "$PASCAL_PYTHON" -m pytest "$@"
fi

pascal_say "ruff"
"$PASCAL_PYTHON" -m ruff check .
"$PASCAL_PYTHON" -m ruff format --check .
pascal_say "mypy"
"$PASCAL_PYTHON" -m mypy
pascal_say "pytest"
exec "$PASCAL_PYTHON" -m pytest "$@"
