#!/bin/sh
# Packs the sources and builds a wheel from the package alone in a clean environment (torch, setuptools and ninja). It
# stays, for the next time. test_sdist.sh and make_wheel.sh begin with this.
#
#   tools/packed_wheel.sh VENV FOLDER   the environment; the folder that gets the .tar.gz and the .whl, emptied before
#
#   TORCH   torch's version, default: the Makefile's
#   PYTHON  the interpreter that makes VENV, default python3
set -eu
cd "$(dirname "$0")/.."
TORCH=${TORCH:-$(sed -n 's/^TORCH ?= //p' Makefile)}
python=$1/bin/python
work=$2
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$1"
"$python" -m pip install --quiet "torch==$TORCH"
pinned() { grep "^$1==" requirements-dev.txt; }
"$python" -m pip install --quiet "torch==$TORCH" "$(pinned setuptools)" "$(pinned ninja)"

# From a copy: an egg-info that lies in the tree would add its own list of files.
rm -rf "$work"
mkdir -p "$work/empty"
copy='import sys, build_copy as b, pathlib; b.mirror(b.ROOT, pathlib.Path(sys.argv[1]))'
PYTHONPATH=tools "$python" -c "$copy" "$work/tree"
cd "$work/tree"
pack='import build_backend; build_backend.build_sdist("..")'
PYTHONPATH=tools "$python" -c "$pack" >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
cd "$work/empty"
rm -rf "$work/tree"

start=$(date +%s)
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work"/fastrnn-*.tar.gz
echo "$(cd "$work" && du -h fastrnn-*.tar.gz fastrnn-*.whl | tr '\n' ' ')built in $(($(date +%s) - start)) s"
