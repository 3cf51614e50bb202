"""The emulator from Python: load a library that build.py made, give its launchers memory, read the findings.

    emulator = Emulator(build(["csrc/cuda/foo_forward.cu", "foo_launchers.cpp"], OUT / "libfoo.so"))
    for _ in emulator.schedules(seed=1, count=8):
        emulator.reset()
        x = emulator.upload(x_tensor, "x")            # an input: read-only for kernels
        y = emulator.empty(y_tensor.nbytes, "y")      # an output: reading it before a write is a finding
        assert emulator.library.foo(x, y) == 0        # addresses are void pointers
        emulator.download(y, y_tensor)
        assert emulator.findings() == []

Tensors are contiguous CPU tensors of torch, of any dtype.
"""

import ctypes


class Emulator:
    def __init__(self, path):
        library = ctypes.CDLL(str(path))
        address, size, text, i32, u64 = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint64,
        )
        for name, result, arguments in (
            ("emu_reset", None, []),
            ("emu_alloc", address, [size, text]),
            ("emu_define", None, [address, size]),
            ("emu_seal", None, [address, size]),
            ("emu_unwritten", size, [address, size]),
            ("emu_schedule", None, [i32, u64, i32, i32]),
            ("emu_starve", None, [u64, i32, i32, i32]),
            ("emu_device", None, [i32, i32, i32, size]),
            ("emu_finding_count", i32, []),
            ("emu_finding", text, [i32]),
            ("emu_error_string", text, [i32]),
            ("emu_stats", None, [ctypes.POINTER(u64)]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library = library

    def reset(self):
        """Frees all memory and forgets findings and statistics."""
        self.library.emu_reset()

    # memory; addresses are ctypes.c_void_p

    def empty(self, nbytes, name):
        return ctypes.c_void_p(self.library.emu_alloc(nbytes, name.encode()))

    def zeros(self, nbytes, name):
        address = self.empty(nbytes, name)
        ctypes.memset(address, 0, nbytes)
        self.library.emu_define(address, nbytes)
        return address

    def upload(self, tensor, name, read_only=True):
        assert tensor.is_contiguous()
        address = self.empty(tensor.nbytes, name)
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        (self.library.emu_seal if read_only else self.library.emu_define)(address, tensor.nbytes)
        return address

    def download(self, address, tensor):
        assert tensor.is_contiguous()
        ctypes.memmove(tensor.data_ptr(), address, tensor.nbytes)
        return tensor

    def unwritten(self, address, nbytes):
        """How many of these bytes nobody has written."""
        return self.library.emu_unwritten(address, nbytes)

    # schedules: each turn of the loop is another one, in force until the next

    def schedule(self, kind, seed, resident=0, races=True):
        self.library.emu_schedule(kind, seed, resident, races)

    def schedules(self, seed=1, count=8, races=True):
        for i in range(count):
            self.schedule(i % 8, seed * 1000003 + i, races=races)
            yield i

    def starve_each(self, seed, blocks, warps):
        """Every block, then every warp of the grid, as the one that runs last; pushes prompt, then late."""
        for i in range(2 * (blocks + warps)):
            self.library.emu_starve(seed, blocks, warps, i)
            yield i

    def device(
        self,
        coresident_blocks=64,
        multiprocessors=16,
        compute_capability=90,
        shared_per_block=232448,
    ):
        """What the occupancy and attribute queries of launchers answer."""
        self.library.emu_device(coresident_blocks, multiprocessors, compute_capability, shared_per_block)

    # results

    def findings(self):
        return [self.library.emu_finding(i).decode() for i in range(self.library.emu_finding_count())]

    def stats(self):
        """Switches between threads, plain accesses, word accesses since reset()."""
        numbers = (ctypes.c_uint64 * 3)()
        self.library.emu_stats(numbers)
        return tuple(numbers)
