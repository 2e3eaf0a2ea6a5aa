#!/usr/bin/env bash
# Builds the offline kit: what a CUDA machine without a network lacks beside its own PyTorch 2.11,
# in parts of at most 60 MiB. Wants Python 3.11 or newer with pip, a package index and 1 GB of disk.
#
#   bash evals/gpu/kit.sh [--out DIR] [--modules]
#
#   --out DIR      where the parts go, with the wheels and the unpacked site (default build/kit)
#   --modules      compile FlashInfer's modules here, and not there: wants CUDA 13.0's nvcc, a C++
#                  compiler, and a python with PyTorch and the kit's FlashInfer
#   PASCAL_PYTHON  the python to use
#
# On the other machine, in a checkout:
#   cat site.tar.xz.* >site.tar.xz && python3 -m tarfile -e site.tar.xz site
#   bash evals/gpu/check.sh --site site
# Whether anything is missing, with a Python like the other machine's and without its GPU:
#   PYTHONPATH=.:build/kit/site python3.12 -m evals.gpu.imports
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PASCAL_PYTHON:-python3}" -m evals.gpu.kit "$@"
