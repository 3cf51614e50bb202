"""The extension module beside a second libstdc++: it exports its entry alone, and its messages need no streams.

Where a compiler links libstdc++ into the module, two copies of it are in the process, torch's and ours. Each must keep
to itself: an op that raised with a number in its message once killed the process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrnn import _C

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("g++")), reason="needs binutils and g++")


def exported(module):
    done = subprocess.run(["nm", "-D", "--defined-only", str(module)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package with the module linked so, from the objects of the build in place, and the tests of errors."""
    if not next((ROOT / "build").glob("temp.*/csrc/torch/*.o"), None):
        pytest.skip("no objects of a build in place")
    folder = tmp_path_factory.mktemp("static")
    flags = {"LDFLAGS": "-static-libstdc++ -Wl,-Bsymbolic-functions"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "fastrnn", folder / "fastrnn", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    (folder / "tests/modules").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "helpers.py", "modules/__init__.py", "modules/test_errors.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    return folder


def test_the_module_exports_its_entry_alone():
    assert exported(_C.__file__) == ["PyInit__C"]


def test_errors_with_a_libstdcxx_of_its_own(tree):
    (module,) = tree.glob("fastrnn/_C*.so")
    assert exported(module) == ["PyInit__C"]
    needed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    assert "libc10" in needed and "libstdc++" not in needed
    command = [sys.executable, "-m", "pytest", "tests/modules/test_errors.py", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "op_ or unknown_cell or malformed or random"]  # what C++ says
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    where = [sys.executable, "-c", "import fastrnn._C as m; print(m.__file__)"]
    found = subprocess.run(where, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found) == module
