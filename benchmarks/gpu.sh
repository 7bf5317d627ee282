#!/usr/bin/env bash
# Runs benchmarks/gpu_step.py and the probes' on a GPU machine that reaches no package registry, in one call.
#
#   where there is a registry:   benchmarks/gpu.sh gather WHEELS            (60 MB; Python 3.12, or PYTHON_VERSION)
#   on the GPU machine:          DINOV2_CHECKOUT=dinov2 benchmarks/gpu.sh run WHEELS OUT [options of gpu_step.py]
#
# The machine brings torch, torchvision, timm and NumPy. Eosin is used from this checkout, not installed. OUT gets
# gpu.json, the rows in rows.md and probes.md, the versions in packages.txt; install.log says what could not be installed, which does
# not stop the rest.
set -euo pipefail

requirements=(pydantic omegaconf opencv-python-headless tqdm fvcore iopath torchstain xformers scikit-learn pandas)
root=$(cd "$(dirname "$0")/.." && pwd)

case "${1:-}" in
gather)
    wheels=$2
    mkdir -p "$wheels"
    have=$(mktemp)
    trap 'rm -f "$have"' EXIT
    # What a machine with torch and timm has: these two and all they need, but the small packages that age.
    "${PYTHON:-python3}" -m pip install --quiet --dry-run --ignore-installed --report - torch torchvision timm |
        "${PYTHON:-python3}" -c '
import json, sys
for package in json.load(sys.stdin)["install"]:
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if name not in ("typing_extensions", "tqdm"):
        print(f"{name}=={version}")' >"$have"
    "$root/scripts/gather_wheels.sh" "$wheels" "$have" "${requirements[@]}"
    ;;
run)
    wheels=$2 out=$3
    shift 3
    mkdir -p "$out"
    for requirement in "${requirements[@]}"; do
        python3 -m pip install --quiet --no-index --find-links "$wheels" "$requirement" >>"$out/install.log" 2>&1 ||
            echo "not installed: $requirement" | tee -a "$out/install.log"
    done
    python3 -m pip list --format=freeze >"$out/packages.txt"
    nvidia-smi >"$out/nvidia-smi.txt" || true
    package=$(mktemp -d)
    trap 'rm -rf "$package"' EXIT
    mkdir "$package/eosin"
    for room in configs data_tools ssl eval launch; do ln -s "$root/$room" "$package/eosin/$room"; done
    export PYTHONPATH="$package"
    python3 "$root/benchmarks/gpu_step.py" --out "$out/gpu.json" "$@" 2>"$out/errors.log" | tee "$out/rows.md"
    python3 "$root/benchmarks/probes.py" --device cuda knn-dinov2 knn-scikit simpleshot simpleshot-cdist logistic \
        2>"$out/probes.log" | tee "$out/probes.md"
    ;;
*)
    echo "usage: benchmarks/gpu.sh gather WHEELS | run WHEELS OUT [options of gpu_step.py]" >&2
    exit 2
    ;;
esac
