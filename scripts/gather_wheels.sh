#!/usr/bin/env bash
# Gathers wheels for a GPU machine (Linux x86_64, Python 3.12) that reaches no package registry.
#
#   on the GPU machine:   pip list --format=freeze > have.txt
#   here:                 scripts/gather_wheels.sh WHEELS have.txt [REQUIREMENT ...]
#   on the GPU machine:   pip install --no-index --find-links WHEELS REQUIREMENT ...
#                         pip install --no-index --no-deps --no-build-isolation -e .
#
# Without REQUIREMENT it gathers for all that Eosin requires. What have.txt names is left out, so that the machine keeps
# its own torch. PYTHON_VERSION=3.11 gathers for another Python.
set -euo pipefail

if [ $# -lt 2 ] || [ ! -f "$2" ]; then
    echo "usage: scripts/gather_wheels.sh WHEELS have.txt [REQUIREMENT ...]   (have.txt: pip list --format=freeze)" >&2
    exit 2
fi
wheels=$1 have=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [ $# -eq 0 ]; then
    mapfile -t requirements < <("$python" -c '
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"], sep="\n")' "$root/pyproject.toml")
    set -- "${requirements[@]}"
fi
mkdir -p "$wheels"

# These are published as sources only; they are pure Python, so a wheel built here is good there.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" fvcore iopath

target=(--only-binary=:all: --implementation cp --python-version "${PYTHON_VERSION:-3.12}" --find-links "$wheels")
for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_{5..35}; do target+=(--platform "${tag}_x86_64"); done

report=$(mktemp)
trap 'rm -f "$report"' EXIT
"$python" -m pip install --quiet --dry-run --ignore-installed --no-warn-conflicts --target "$wheels" \
    "${target[@]}" --report "$report" "$@"
mapfile -t lacking < <("$python" - "$report" "$have" <<'PYTHON'
import json, re, sys

normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
have = {normal(re.split(r"[=@ ]", line)[0]) for line in open(sys.argv[2]) if line.strip()}
for package in json.load(open(sys.argv[1]))["install"]:
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if normal(name) not in have:
        print(f"{name}=={version}")
PYTHON
)
if [ ${#lacking[@]} -gt 0 ]; then
    "$python" -m pip download --quiet --no-deps --dest "$wheels" "${target[@]}" "${lacking[@]}"
    printf '%s\n' "${lacking[@]}"
fi
du -sh "$wheels"
