#!/bin/sh
# Runs the CPU's kernels alone under valgrind, where there is one; then builds the extension, the binding included, twice,
# with AddressSanitizer and UBSan and with ThreadSanitizer, and runs the tests of the ops, of Python's threads and the
# fuzzer under each. Of the kernels those of the baseline stand for all: it is the same text. (Those that multiply pairs
# of bfloat16 are tests/cpp/test_cpp.py's.)
#
#   tools/sanitize.sh [pytest arguments]      default: valgrind's, tests/kernels, tests/modules/test_concurrency.py, tests/fuzz
#
#   SANITIZERS  builds, each in build/sanitized-NAME; default "address,undefined thread"
#   ONE_IN      of a test's cases (sizes, cells, dtypes) one in so many runs, default 4; 1: all, some hours
#   PYTHON      an interpreter with torch and the packages of requirements-dev.txt, default .venv/bin/python
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
mkdir -p build
if [ $# -gt 0 ]; then
  : # those alone are wanted
elif command -v valgrind >/dev/null; then
  FASTRNN_VALGRIND=1 "$python" -m pytest tests/cpp -k valgrind
else
  echo "no valgrind on PATH: the kernels did NOT run under it" >&2
fi

# A process with red zones before the sanitizer does not start, one without memory is ended by it, and what a call takes
# is not what it would take elsewhere: three tests cannot run.
[ $# -gt 0 ] || set -- tests/kernels tests/modules/test_concurrency.py tests/fuzz -n "${MAX_JOBS:-$(nproc)}" \
  --one-in "${ONE_IN:-4}" \
  --deselect tests/fuzz/test_fuzz.py::test_runner --deselect tests/fuzz/test_memory.py::test_failed_allocations \
  --deselect tests/kernels/test_in_place.py::test_memory_at_most

# torch and Python never free some of what they allocate, and torch throws through libraries that no sanitizer sees.
address=allocator_may_return_null=1:detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0
# torch and OpenMP's library are not built for ThreadSanitizer: what they do to memory says nothing, that they lock does.
thread=ignore_noninstrumented_modules=1:allocator_may_return_null=1

under() { # SANITIZERS, pytest arguments
  tree=$root/build/sanitized-${1%%,*}
  log=$tree.log
  status=0
  findings=$tree/findings # files, since pytest keeps what a process says that is ended at once
  FASTRNN_CUDA=0 FASTRNN_SANITIZE=$1 "$python" tools/build_copy.py "$tree" >"$log" 2>&1 ||
    { tail -n 60 "$log"; return 1; }
  case $1 in
    # Addresses at random would lie where ThreadSanitizer has its own memory; threads are its own build's (csrc/cpu/team.cpp).
    thread) library=tsan; run="setarch $(uname -m) --addr-no-randomize"
      set -- "$@" --deselect tests/kernels/test_threads.py::test_no_more_threads_than_processors ;;
    *) library=asan; run= ;;
  esac
  shift
  rm -rf "$findings"
  mkdir "$findings"
  # torch's own: who makes a node sets a flag of the nodes of its leaves, without a lock and always to true. Its parallel_for
  # is OpenMP's, whose forks and joins the sanitizer does not see.
  printf 'race:%s\n' torch::autograd::Node::topological_nr at::internal::invoke_parallel >"$tree/known-races"
  # The sanitizer has to come before all else of the process.
  # shellcheck disable=SC2086 # words
  (cd "$tree" && PYTHONPATH=$tree exec env \
    LD_PRELOAD="$(c++ -print-file-name=lib$library.so) $(c++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS="$address:log_path=$findings/asan" TSAN_OPTIONS="$thread:suppressions=$tree/known-races:log_path=$findings/tsan" \
    UBSAN_OPTIONS="print_stacktrace=1:log_path=$findings/ubsan" $run "$python" -m pytest "$@") || status=$?
  # A call that asked for too much memory, and was told so, is what a test wants.
  for finding in "$findings"/*; do
    grep -qv "WARNING: AddressSanitizer failed to allocate" "$finding" 2>/dev/null || rm -f "$finding"
  done
  [ -z "$(ls "$findings")" ] || { tail -n 60 "$findings"/*; echo "all of it is in $findings"; return 1; }
  return $status
}

failed=
for sanitizers in ${SANITIZERS:-address,undefined thread}; do
  under "$sanitizers" "$@" || failed="$failed $sanitizers"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
