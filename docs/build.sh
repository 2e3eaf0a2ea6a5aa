#!/usr/bin/env bash
# Builds the documentation as a site in build/site; a broken link is an error. Its search needs a web
# server: python -m http.server -d build/site
#
#   bash docs/build.sh [any option of mkdocs build]
#
# The generator is the extra `docs` of pyproject.toml, without the rest of the project. It is installed
# into an environment of its own, PASCAL_SGLANG_DOCS_VENV (default ~/.cache/pascal_sglang/docs-venv).
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${PASCAL_SGLANG_DOCS_VENV:-${PASCAL_SGLANG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pascal_sglang}/docs-venv}"
needs='import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"]["docs"]))'

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -c "$needs" >"$venv/needs.new"
if ! cmp -s "$venv/needs.new" "$venv/needs"; then
    echo "installing the site generator into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/needs.new"
    mv "$venv/needs.new" "$venv/needs"
fi
# The notice about MkDocs 2 concerns a version that the extra leaves out.
export NO_MKDOCS_2_WARNING=1
exec "$venv/bin/python" -m mkdocs build --strict "$@"
