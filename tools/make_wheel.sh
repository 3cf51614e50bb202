#!/bin/sh
# Builds a wheel for one torch and one Python, tells its size, its tag and the glibc that it needs, tries it where there
# is torch and no compiler, and puts it into dist/. Some ten minutes, with CUDA's kernels twenty.
#
#   TORCH, PYTHON   as for tools/packed_wheel.sh
#   WHEEL_CUDA      1: with CUDA's kernels for all architectures. TORCH has to be a CUDA build, and nvcc at hand, of its
#                   major version. Default 0: the CPU's alone
#   WHEEL_VENV      the environment that builds, default .venv-wheel, one for each Python; it stays, and the other one
#                   (build/wheel-clean) is made anew each time
#
# The tag is that of torch's own wheels. A symbol that is newer fails, and is named: the code, or the compiler and the C
# library of the machine that builds, may bring one in.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
TORCH=${TORCH:-$(sed -n 's/^TORCH ?= //p' Makefile)}
venv=$(realpath -ms "${WHEEL_VENV:-.venv-wheel}")
work=$root/build/wheel
clean=$root/build/wheel-clean
export TORCH FASTRNN_CUDA="${WHEEL_CUDA:-0}" FASTRNN_LABEL=1
tools/packed_wheel.sh "$venv" "$work"
"$venv/bin/python" -m pip install --quiet --requirement tools/requirements-wheel.txt

# torch's libraries, libgomp and CUDA's too, are those of the user's torch; libstdc++ is the machine's, as manylinux has
# it.
PATH=$venv/bin:$PATH auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --strip --exclude 'libtorch*' \
  --exclude 'libc10*' --exclude 'libcu*' --wheel-dir "$work/tagged" "$work"/fastrnn-*.whl >"$work/auditwheel.log" 2>&1 ||
  { cat "$work/auditwheel.log"; "$venv/bin/python" tools/wheel_facts.py "$work"/fastrnn-*.whl; exit 1; }
wheel=$(echo "$work"/tagged/fastrnn-*.whl)
"$venv/bin/python" tools/wheel_facts.py "$wheel"

"${PYTHON:-python3}" -m venv --clear "$clean"
there() { PATH=$clean/bin "$clean/bin/python" "$@"; }
cd "$work/empty"
there -c 'import shutil; assert not any(map(shutil.which, ("c++", "g++", "cc", "gcc", "nvcc"))), "a compiler is found"'
there -m pip install --quiet --only-binary :all: "torch==$TORCH"
start=$(date +%s%N)
there -m pip install --quiet --no-index "$wheel" # without an index: nothing else may be missing
echo "installed without a compiler in $((($(date +%s%N) - start) / 1000000)) ms"
there -m pip check
there "$root/tools/check_installed.py" "$wheel"
there -m fastrnn --hidden 64
mkdir -p "$root/dist"
cp "$wheel" "$root/dist/"
echo "dist/$(basename "$wheel")"
