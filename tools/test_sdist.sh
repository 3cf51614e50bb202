#!/bin/sh
# Packs the sources, builds a wheel from the package alone in a clean environment (.venv-sdist), installs it there and
# uses it in an empty folder. Some three minutes: the CPU's kernels, which know no torch, are those that were built in
# place, and are refused if the package lacks one of their sources or has another text of it.
#
#   TORCH, PYTHON   as for tools/packed_wheel.sh
set -eu
cd "$(dirname "$0")/.."
check=$PWD/tools/check_installed.py
venv=$PWD/.venv-sdist
python=$venv/bin/python
work=$PWD/build/sdist
FASTRNN_OBJECTS=$PWD/build/objects-cpu
export FASTRNN_OBJECTS
"${PYTHON:-python3}" tools/carried_objects.py "$FASTRNN_OBJECTS" --cpu
FASTRNN_CUDA=0 tools/packed_wheel.sh "$venv" "$work"
cd "$work/empty"
"$python" -m pip install --quiet --no-deps --force-reinstall "$work"/fastrnn-*.whl
"$python" -m pip check
"$python" "$check" "$work"/fastrnn-*.whl
"$python" -m fastrnn --hidden 64
