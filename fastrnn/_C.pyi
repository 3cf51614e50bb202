"""The extension module: importing it registers the ops."""

from typing import Any

def instruction_set() -> str: ...
def set_uniform(on: bool) -> bool: ...
def set_layers_by_products(on: bool) -> bool: ...
def usable_processors() -> int: ...
def cpu_quota(membership: str, mount: str) -> float: ...
def allow_tf32(steps: int) -> bool: ...
def build_info() -> dict[str, str | None]: ...
def module_forward(
    tensors: Any, names: list[Any], cell: str, directions: int, heads: int, batch_first: bool | None,
    input: Any, hx: Any, resets: Any, grad_clip: float | None, recompute: int, masks: Any, /
) -> tuple[Any, ...] | None: ...  # fmt: skip
def without_view(x: Any) -> Any: ...
def set_composed(backward: Any, second_derivative: Any) -> None: ...
def cpu_plan(
    cell: int,
    dtype: str,
    T: int,
    B: int,
    P: int,
    h: int,
    R: int,
    projected: bool,
    input: int,
    threads: int,
    backward: bool,
) -> dict[str, Any]: ...

# Only in builds with CUDA kernels.
def cuda_plan(
    cell: int, dtype: str, T: int, B: int, P: int, h: int, R: int, projected: bool, lengths: bool, resets: bool,
    backward: bool, tf32: bool, multiprocessors: int, compute_capability: int, shared_per_block: int, tier: str,
) -> dict[str, Any]: ...  # fmt: skip
