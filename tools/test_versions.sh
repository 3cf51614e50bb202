#!/bin/sh
# Runs the tests that depend on torch under torch 2.11 to 2.15 and Python 3.11 to 3.13, each at least once, and prints
# the table of docs/support.md. A pair has an environment of its own, made, used and removed (up to 6 GB: most of
# the index's builds of torch are CUDA's), and a build of the CPU extension in a copy of the tree: build/versions.
#
#   tools/test_versions.sh [TORCH:PYTHON ...]    default: the five pairs below
#
#   MAX_JOBS  processes at once, default nproc
#
# Some twenty minutes a pair on one core. The CPU's kernels, which know neither torch nor Python, are compiled once for
# all pairs, or taken from the build in place. What came enters tests/support/versions.json, in the place of the same
# versions' last run.
set -eu
cd "$(dirname "$0")/.."
work=$PWD/build/versions
venv=$work/venv
jobs=${MAX_JOBS:-$(nproc)}
[ $# -gt 0 ] || set -- 2.11.0:python3.11 2.12.1:python3.12 2.13.0:python3.11 2.14.1:python3.11 2.15.0:python3.13

# Every public class and function, transforms, torch.compile, torch.export, and what passes torch's dispatcher by. The
# kernels include no torch: their own tests would say the same thing under each, as would those of C++, of the host
# build of CUDA, of benchmarks and of examples. An op is registered once for all cells: opcheck of LSTMs stands for all.
tests="tests/support tests/transforms tests/modules tests/sequences tests/weights tests/kernels/test_module_call.py
  tests/kernels/test_quantized.py"
ops="not opcheck or lstm"
# The page depends on no torch. Between two calls of this script it lags behind the record: the second would count that.
page=tests/support/test_support.py::test_the_page_is_what_the_cases_say

for pair; do
  "${pair#*:}" -c '' || { echo "$pair: no such Python here: name the pairs that there are" >&2; exit 2; }
done

one_pair() { # TORCH PYTHON
  make --no-print-directory setup "TORCH=$1" "PYTHON=$2" "VENV=$venv" || return
  FASTRNN_CUDA=0 "$venv/bin/python" tools/build_copy.py "$work/tree" >"$work/build.log" 2>&1 ||
    { tail -n 60 "$work/build.log"; return 1; }
  cd "$work/tree"
  versions=$("$venv/bin/python" -c 'import platform, torch; print(torch.__version__, platform.python_version())') ||
    return
  # shellcheck disable=SC2086 # a list of words
  "$venv/bin/python" -m pytest --numprocesses "$jobs" --dist worksteal --junitxml "$work/$versions.xml" -k "$ops" \
    --deselect "$page" $tests
}

mkdir -p "$work"
FASTRNN_OBJECTS=$work/objects
export FASTRNN_OBJECTS
"${PYTHON:-python3}" tools/carried_objects.py "$FASTRNN_OBJECTS" --cpu --jobs "$jobs"
rm -f "$work"/*.xml # of a run that was broken off
trap 'rm -rf "$venv"' EXIT
failed=
for pair; do
  rm -rf "$venv"
  start=$(date +%s)
  (PYTHONPATH=$work/tree one_pair "${pair%%:*}" "${pair#*:}") || failed="$failed $pair"
  echo "$pair: $(($(date +%s) - start)) s"
done
for results in "$work"/*.xml; do
  [ ! -e "$results" ] || "${pair#*:}" tests/support/versions.py "$results"
done
rm -f "$work"/*.xml
echo "to docs/support.md: python -m tests.support --write"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
