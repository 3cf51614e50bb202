"""What `make wheel` tells of a wheel, and the name that it gives one. It compiles; these tests do not."""

import email
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _C

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import wheel_facts  # noqa: E402
from build_backend import local_label  # noqa: E402
from build_copy import mirror  # noqa: E402

# Of the extension module, when it had a mutex.
SYMBOLS = """\
   109: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND omp_get_num_procs
   110: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memcpy@GLIBC_2.14 (3)
   111: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND pthread_mutex_trylock@GLIBC_2.34 (14)
   112: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND _ZdlPvm@CXXABI_1.3.9 (4)
   113: 0000000000000000     0 FUNC    WEAK   DEFAULT  UND free@GLIBC_2.2.5 (2)
   114: 00000000000f0000   100 FUNC    GLOBAL DEFAULT   12 PyInit__C
"""
DYNAMIC = """\
 0x0000000000000001 (NEEDED)             Shared library: [libc10.so]
 0x0000000000000001 (NEEDED)             Shared library: [libstdc++.so.6]
 0x000000000000000c (INIT)               0x1000
"""


@pytest.mark.parametrize(
    ("version", "cuda", "label"),
    [
        ("2.13.0", None, "+torch2.13.0"),
        ("2.13.0+cpu", None, "+torch2.13.0"),
        ("2.13.1+cpu", None, "+torch2.13.1"),  # another wheel: a module runs under its patch version alone
        ("2.13.0+cu130", "13.0", "+torch2.13.0.cu13"),
    ],
)
def test_label(version, cuda, label):
    assert local_label(version, cuda) == label


@pytest.mark.parametrize("asked", ["", "0", "1"])
def test_a_wheel_is_named_by_its_torch_where_that_is_asked_for(asked, tmp_path):
    mirror(ROOT, tmp_path / "sources")
    (tmp_path / "sources/setup.cfg").write_text("[egg_info]\ntag_build = \ntag_date = 0\n")  # as in packed sources
    environment = os.environ | {"FASTRNN_LABEL": asked, "FASTRNN_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "setup.py", "--quiet", "dist_info", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "sources", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("*.dist-info")
    named = fastrnn.__version__ + (local_label(torch.__version__) if asked == "1" else "")
    assert folder.name == f"fastrnn-{named}.dist-info"
    assert email.message_from_bytes((folder / "METADATA").read_bytes())["Version"] == named


def test_what_a_module_needs():
    found = wheel_facts.required(SYMBOLS)
    assert found == {(2, 14): ["memcpy"], (2, 34): ["pthread_mutex_trylock"], (2, 2, 5): ["free"]}
    assert wheel_facts.told(found) == "needs glibc 2.34 (2.34 for pthread_mutex_trylock; all else 2.14)"
    del found[2, 34]
    assert wheel_facts.told(found) == "needs glibc 2.14"
    assert wheel_facts.libraries(DYNAMIC) == ["libc10.so", "libstdc++.so.6"]


needs_readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")


@needs_readelf
def test_the_module_runs_where_torch_does():
    """Which is what lets its wheel have the tag of torch's."""
    if wheel_facts.as_numbers(platform.libc_ver()[1]) > (2, 36):
        pytest.skip("headers of a C library newer than Debian 12's bring newer symbols in")
    if fastrnn.build_info()["cuda_archs"]:
        pytest.skip("CUDA's runtime brings newer symbols in, and no wheel has it")
    found = wheel_facts.required(wheel_facts.read("--dyn-syms", _C.__file__))
    assert max(found) <= wheel_facts.OLD, wheel_facts.told(found)


@needs_readelf
def test_what_is_told_of_a_wheel(tmp_path, capsys):
    wheel = tmp_path / "fastrnn-0.1.0+torch2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(_C.__file__, f"fastrnn/{Path(_C.__file__).name}")
    wheel_facts.main(wheel)
    name, tag, found = capsys.readouterr().out.splitlines()
    assert name.startswith(f"{wheel.name}: ") and name.endswith(" MB installed")
    assert tag.startswith("tag cp311-cp311-manylinux_2_28_x86_64, needs glibc 2.")
    assert "libtorch_cpu.so" in found and "libgomp" not in found  # torch's own is in the process
