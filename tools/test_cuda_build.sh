#!/bin/sh
# Builds the whole extension against torch's CUDA build, in an environment of its own (.venv-cuda, about 6 GB), imports
# it, looks for the CUDA kernels and runs the tests under it. Needs nvcc and no GPU.
#
#   tools/test_cuda_build.sh [pytest arguments]      default: all tests but the host build's
#
#   FASTRNN_CUDA_ARCHS  architectures to build for, default "8.0;9.0a"
#   CUDA_VENV           another environment that already has everything; nothing is installed into it
#   PYTHON              the interpreter that makes .venv-cuda, default python3
set -eu
cd "$(dirname "$0")/.."
export FASTRNN_CUDA=1
export FASTRNN_CUDA_ARCHS="${FASTRNN_CUDA_ARCHS:-8.0;9.0a}"
if [ -z "${CUDA_VENV:-}" ]; then
  CUDA_VENV=$PWD/.venv-cuda
  [ -x "$CUDA_VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$CUDA_VENV"
  if ! cat tools/requirements-cuda.txt requirements-dev.txt | cmp -s - "$CUDA_VENV/requirements.txt"; then
    "$CUDA_VENV/bin/python" -m pip install --quiet --requirement tools/requirements-cuda.txt
    cat tools/requirements-cuda.txt requirements-dev.txt >"$CUDA_VENV/requirements.txt"
  fi
fi
python=$CUDA_VENV/bin/python
"$python" -c 'import sys, torch; torch.version.cuda or sys.exit(f"torch {torch.__version__} is no CUDA build")'

tree=$PWD/build/cuda-tree
log=$PWD/build/cuda-build.log
start=$(date +%s)
mkdir -p build
"$python" tools/build_copy.py "$tree" >"$log" 2>&1 || { tail -n 60 "$log"; exit 1; }
echo "built for $FASTRNN_CUDA_ARCHS in $(($(date +%s) - start)) s, $(du -h "$tree"/fastrnn/_C*.so | cut -f1)"

cd "$tree"
"$python" - <<'END'
import os

import torch

import fastrnn

assert fastrnn.build_info()["cuda_archs"] == os.environ["FASTRNN_CUDA_ARCHS"], fastrnn.build_info()
for op in ("recurrent_forward", "recurrent_backward", "layer_forward", "layer_backward"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrnn::{op}", key), (op, key)
END
"$python" -m fastrnn --dtype bfloat16 --hidden 512 --device cuda --gpu h100
if [ $# -eq 0 ]; then
  set -- tests --ignore-glob '*host*.py' -n "${MAX_JOBS:-$(nproc)}"
fi
exec "$python" -m pytest "$@"
