#!/usr/bin/env bash
# Installs what is needed and runs lint, types and the whole test suite.
#
#   bash tests/run.sh [pytest arguments]      e.g. bash tests/run.sh tests/unit
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
cd "$pascal_root"

pascal_say "ruff"
"$PASCAL_PYTHON" -m ruff check .
"$PASCAL_PYTHON" -m ruff format --check .
pascal_say "mypy"
"$PASCAL_PYTHON" -m mypy
pascal_say "pytest"
exec "$PASCAL_PYTHON" -m pytest "$@"
