"""A device that says it is a GPU, holds its data on the CPU, and tells what a real one would mind.

Under ``Device`` every op meets ``__torch_dispatch__``. Tensors made on ``DEVICE``, or from such, are ``OnDevice``: they
say ``is_cuda`` to Python, and to torch's C++ that they are of the backend PrivateUse1, whose autograd works without a
GPU. Their ops run on the CPU's kernels, our own too. What a GPU refuses is refused (tensors of two devices in one op);
what waits for the device or cannot be captured in a CUDA graph (copies between host and device, looks at values) is
written down in ``told``.

Importing this module changes the process for good (a backend is registered): use it from one of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from fastrnn import fallback

if "pytest" in sys.modules:
    raise ImportError("pretend_cuda changes its process for good: the tests are to import it in one of their own")
aten = torch.ops.aten


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # a checkpoint asks for it
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", _Backend())
DEVICE = torch.device("pretend:0")
fallback.KERNELS[DEVICE.type] = fallback.KERNELS["cpu"]  # as CUDA's in a build with its kernels
_tensor = torch.tensor
torch.tensor = lambda data, *, device=None, **options: (  # its own copy passes by every mode
    _tensor(data, **options).to(device) if _is_on(device) else _tensor(data, device=device, **options)
)

# Their results' sizes or values are the data's: the host waits for them.
_LOOKS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.copy_, aten.copy, aten._copy_from}
# They take indices of rows from the host, and copy them.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# They read lengths on the host, and only there, and cut the data on the device.
_PACKING = {aten._pack_padded_sequence, aten._pad_packed_sequence, aten._pack_padded_sequence_backward}


class OnDevice(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device")


def _is_on(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


class Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.ops: list[str] = []

    def tell(self, func: Any, what: str) -> None:
        self.told.append(f"{func}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        packet = func.overloadpacket
        given = [isinstance(x, OnDevice) for x in tensors]
        on = any(given) if device is None else _is_on(device)
        if packet in _COPIES:
            self.copies(func, packet, args, kwargs, on)
            on = given[0] if packet is aten.copy_ else on
        elif any(given):
            self.looks(func, packet, tensors)
        self.ops.append(str(func))
        if _is_on(device):
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if packet is aten._pack_padded_sequence:
            return (OnDevice(out[0]), out[1]) if any(given) else out
        if not on:
            return out
        # What is changed in place stays the tensor that it is.
        same = {id(x.inner): x for x in tensors if isinstance(x, OnDevice)}
        return tree_map(lambda x: same[id(x)] if id(x) in same else OnDevice(x) if isinstance(x, Tensor) else x, out)

    def copies(self, func: Any, packet: Any, args: Any, kwargs: Any, on: bool) -> None:
        source = args[1] if packet is aten.copy_ else args[0]
        to = isinstance(args[0], OnDevice) if packet is aten.copy_ else on
        if isinstance(source, OnDevice) == to:
            return
        waits = "" if kwargs.get("non_blocking") or (len(args) > 2 and args[2]) else ", and waits"
        self.tell(func, f"copies {list(source.shape)} from {'host to device' if to else 'device to host'}{waits}")

    def looks(self, func: Any, packet: Any, tensors: list[Tensor]) -> None:
        if packet in _LOOKS:
            self.tell(func, "looks at values on the device")
        host = [x for x in tensors if not isinstance(x, OnDevice)]
        if packet in _INDEXING:
            if any(x.dtype == torch.bool for x in tensors[1:]):
                self.tell(func, "looks at values on the device")
            if host:
                self.tell(func, "copies indices from host to device")
        elif packet not in _PACKING and any(x.dim() > 0 for x in host):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least two!")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def to_device(x: Any) -> Any:
    """The same on the device, without a word: what a user has there already."""
    if not isinstance(x, Tensor):
        return x
    moved = OnDevice(x.detach().clone())
    return moved.requires_grad_() if x.requires_grad else moved


def module_to_device(module: torch.nn.Module) -> torch.nn.Module:
    with Device():
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(OnDevice(parameter.detach().clone()))
    return module


def host(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, OnDevice) else x
