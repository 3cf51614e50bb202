#!/bin/sh
# Packs the sources, builds a wheel from the package alone in a clean environment (.venv-sdist: torch, setuptools and ninja),
# installs it there and uses it in an empty folder. The environment stays, for the next time; some three minutes.
#
#   TORCH   torch's version, default: the Makefile's
#   PYTHON  the interpreter that makes .venv-sdist, default python3
set -eu
cd "$(dirname "$0")/.."
TORCH=${TORCH:-$(sed -n 's/^TORCH ?= //p' Makefile)}
venv=$PWD/.venv-sdist
python=$venv/bin/python
work=$PWD/build/sdist
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$python" -m pip install --quiet "torch==$TORCH"
"$python" -m pip install --quiet "torch==$TORCH" "$(grep '^setuptools==' requirements-dev.txt)" "$(grep '^ninja==' requirements-dev.txt)"

# From a copy: an egg-info that lies in the tree would add its own list of files.
rm -rf "$work"
mkdir -p "$work/empty"
PYTHONPATH=$PWD/tools "$python" -c 'import sys, build_copy as b, pathlib; b.mirror(b.ROOT, pathlib.Path(sys.argv[1]))' "$work/tree"
cd "$work/tree"
PYTHONPATH=tools "$python" -c 'import build_backend; build_backend.build_sdist("..")' >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
cd "$work/empty"
rm -rf "$work/tree"

start=$(date +%s)
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work"/fastrnn-*.tar.gz
"$python" -m pip install --quiet --no-deps --force-reinstall "$work"/fastrnn-*.whl
"$python" -m pip check
echo "$(cd "$work" && du -h fastrnn-*.tar.gz fastrnn-*.whl | tr '\n' ' ')built in $(($(date +%s) - start)) s"

"$python" - "$work"/fastrnn-*.whl <<'END'
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import torch

import fastrnn

assert Path(fastrnn.__file__).is_relative_to(sys.prefix), fastrnn.__file__
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
info = f"fastrnn-{fastrnn.__version__}.dist-info"
for part in ("fastrnn/py.typed", "fastrnn/_C.pyi", "fastrnn/weights/__init__.py", f"{info}/licenses/LICENSE"):
    assert part in names, part
strangers = [name for name in names if not name.startswith(("fastrnn/", info + "/"))]
assert not strangers, strangers
assert "torch==" + torch.__version__.partition("+")[0] in requires("fastrnn"), requires("fastrnn")
library = Path(fastrnn._C.__file__).read_bytes()
assert b".debug_info" not in library, "built with debug information"
# A cell's kernels of all instruction sets and dtypes, dual numbers among them, are some 1.7 MB.
limit = len(torch.ops.fastrnn.cell_names()) << 21
assert fastrnn.build_info()["cuda_archs"] or len(library) < limit, f"{len(library)} bytes, more than {limit}"

x = torch.randn(5, 2, 3, requires_grad=True)
for name in ("LSTM", "GRU", "RNN"):
    theirs, ours = getattr(torch.nn, name)(3, 4), getattr(fastrnn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)[0].sum().backward()
END
"$python" -m fastrnn --hidden 64
