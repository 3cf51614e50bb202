#!/bin/sh
# Runs the CPU's kernels alone under valgrind, where there is one; then builds the extension, the binding included, with
# AddressSanitizer and UBSan in build/sanitized, and runs the tests of the ops and the fuzzer under it. Of the kernels
# those of the baseline stand for all: it is the same text. (Threads, and the kernels that multiply pairs of bfloat16, are
# tests/cpp/test_cpp.py's.)
#
#   tools/sanitize.sh [pytest arguments]      default: valgrind's, tests/kernels and tests/fuzz
#
#   PYTHON  an interpreter with torch and the packages of requirements-dev.txt, default .venv/bin/python
set -eu
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
tree=$PWD/build/sanitized
log=$PWD/build/sanitized.log
mkdir -p build
if [ $# -gt 0 ]; then
  : # those alone are wanted
elif command -v valgrind >/dev/null; then
  FASTRNN_VALGRIND=1 "$python" -m pytest tests/cpp -k valgrind
else
  echo "no valgrind on PATH: the kernels did NOT run under it" >&2
fi
FASTRNN_CUDA=0 FASTRNN_SANITIZE=address,undefined "$python" tools/build_copy.py "$tree" >"$log" 2>&1 ||
  { tail -n 60 "$log"; exit 1; }

cd "$tree"
# The sanitizer has to come before all else of the process. torch and Python never free some of what they allocate, and
# torch throws through libraries that the sanitizer does not see.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$tree"
# A process with red zones before the sanitizer does not start, and one without memory is ended by it: two tests cannot run.
[ $# -gt 0 ] || set -- tests/kernels tests/fuzz -n "${MAX_JOBS:-$(nproc)}" \
  --deselect tests/fuzz/test_fuzz.py::test_runner --deselect tests/fuzz/test_memory.py::test_failed_allocations
exec "$python" -m pytest "$@"
