"""What launches ask of the CUDA runtime (the host half of csrc/cuda/device_cuda.cuh), with a runtime of our own."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
OPT_IN = 232448  # runtime.cpp's device
UNKNOWN = 999

pytestmark = pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cudart")

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr

    common = ("-std=c++20", "-c", "-O1", "-Xcompiler", "-fPIC", "-cudart", "none", f"-I{HERE.parents[1] / 'csrc'}")
    run("nvcc", *common, "-arch=sm_90a", str(HERE / "cudart/probe.cu"), "-o", "probe.o")
    run("nvcc", *common, str(HERE / "cudart/runtime.cpp"), "-o", "runtime.o")
    run("gcc", "-c", "-O1", "-fPIC", str(HERE / "cudart/internals.c"), "-o", "internals.o")
    objects = ("probe.o", "runtime.o", "internals.o")
    run("g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *objects, "-o", "libprobe.so")
    library = ctypes.CDLL(str(folder / "libprobe.so"))
    library.fake_calls.restype = ctypes.c_char_p
    library.probe.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int]
    library.probe_occupancy.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)]
    return library


def launch(runtime, blocks=4, shared=0, cluster=1, coresident=False, second=False, failing=None):
    """(error, what the runtime was asked). failing: the function that fails; None goes on from the last launch."""
    if failing is not None:
        runtime.fake_reset(failing.encode())
    error = runtime.probe(second, blocks, shared, cluster, coresident)
    return error, runtime.fake_calls().decode().splitlines()


def test_a_launch(runtime):
    error, calls = launch(runtime, failing="")
    assert error == 0 and calls == ["cudaLaunchKernelExC 4x64 0 of 49152 (3, 5)"]
    error, calls = launch(runtime, coresident=True, failing="")
    assert error == 0 and calls[-1].endswith(" cooperative")
    error, calls = launch(runtime, 32, cluster=16, failing="")
    assert (
        error == 0
        and calls[-1].endswith(" clusters of 16")
        and calls[0] == "cudaFuncSetAttribute nonportable clusters 1"
    )


def test_shared_memory_is_allowed_once_and_for_all(runtime):
    """The limit is the kernel's: were it set to what each launch needs, a small launch in one thread could lower it
    between the setting and the launch of a large one in another."""
    error, calls = launch(runtime, shared=200_000, failing="")
    assert error == 0 and calls[-1] == f"cudaLaunchKernelExC 4x64 200000 of {OPT_IN} (3, 5)"
    error, calls = launch(runtime, shared=60_000)
    assert error == 0 and calls[-1] == f"cudaLaunchKernelExC 4x64 60000 of {OPT_IN} (3, 5)"
    assert launch(runtime, shared=60_000, second=True, failing="")[0] == 0


def test_more_shared_memory_than_there_is(runtime):
    error, _ = launch(runtime, shared=OPT_IN + 1, failing="")
    assert error == 1 and runtime.fake_pending() == 0


@pytest.mark.parametrize(
    "function", ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelExC"]
)
def test_every_error_is_returned(runtime, function):
    """And none is left behind for somebody else's next look."""
    error, calls = launch(runtime, shared=100_000, failing=function)
    assert error == UNKNOWN and calls[-1].startswith(function) and runtime.fake_pending() == 0


def test_occupancy(runtime):
    blocks = ctypes.c_int()
    runtime.fake_reset(b"")
    assert runtime.probe_occupancy(100_000, ctypes.byref(blocks)) == 0 and blocks.value == 264
    for function in ("cudaFuncSetAttribute", "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"):
        runtime.fake_reset(function.encode())
        assert runtime.probe_occupancy(100_000, ctypes.byref(blocks)) == UNKNOWN and blocks.value == 0
        assert runtime.fake_pending() == 0
