#!/usr/bin/env bash
# Tests and measurements on a GPU, in at most 8 minutes and without a download: the tables are in
# out/gpu/report.md. Run it in the environment that CONTRIBUTING.md describes.
#
#     benchmarks/gpu.sh                                         needs about 40 GB of GPU memory
#     benchmarks/gpu.sh --help
#     benchmarks/gpu.sh --device cpu --shape small --layers 5   the same steps on a CPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
