#!/bin/sh
# On a machine with a GPU, nvcc and no network: builds the extension for that GPU, runs the device tests and
# compute-sanitizer, times every row against cuDNN. JSON and logs in $OUT, a short table last, well inside 10 minutes.
#
#   benchmarks/gpu_check.sh [options]      --help lists them; PYTHON is the interpreter that has torch
set -eu
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
