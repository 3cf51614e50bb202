"""What the tests share: torch.nn's module and ours with equal parameters, and all that they compute compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn.ops import CELLS

KINDS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
LIKE_GRU = ("LiGRU", "MGU")  # kinds that torch.nn lacks
# Cells that have between them what kernels tell apart in one, for what takes long with each.
KINDS_OF_CELLS = ("lstm", "gru", "rnn_tanh", "lstm_norm", "gru_reset_before", "slstm")
CELL_KINDS = ("LSTMCell", "GRUCell", "RNNCell_TANH", "RNNCell_RELU")
ISAS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")  # a processor that has one has those behind it
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the larger of 1 and the largest expected value

Results = dict[str, Tensor]
State = Any  # a tensor, a pair of them, or None


def build(namespace: ModuleType, kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    """`kind` out of torch.nn or fastrnn; a suffix _TANH or _RELU is the nonlinearity."""
    name, _, nonlinearity = kind.partition("_")
    if nonlinearity:
        kwargs["nonlinearity"] = nonlinearity.lower()
    return getattr(namespace, name)(*args, **kwargs)


def pair(kind: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's) with the same parameters."""
    theirs = build(nn, kind, *args, **kwargs)
    ours = build(fastrnn, kind, *args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's thread count, and so ours. Tiny sizes run on one: more would wait on each other for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def allow_cudnn_tf32(allowed: bool) -> None:
    """``torch.backends.cudnn.allow_tf32``, which torch's own test helpers freeze as soon as they are imported."""
    torch._C._set_cudnn_allow_tf32(allowed)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in every dtype, up to rounding."""
    return torch.randn(*sizes, generator=generator(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """x with no dimension contiguous."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def state_shapes(kind: str, *leading: int, hidden: int, proj: int = 0) -> list[tuple[int, ...]]:
    shapes = [(*leading, proj or hidden)]
    return [*shapes, (*leading, hidden)] if kind.startswith("LSTM") else shapes


def make_state(kind: str, *leading: int, hidden: int, proj: int = 0, seed: int = 7, **options: Any) -> State:
    """Random h, or for an LSTM (h, c); `leading` are the dimensions before the last."""
    shapes = state_shapes(kind, *leading, hidden=hidden, proj=proj)
    states = [randn(*shape, seed=seed + i, **options) for i, shape in enumerate(shapes)]
    return tuple(states) if len(states) == 2 else states[0]


def as_c(cell: str, x: Tensor, groups: int = 1) -> Tensor:
    """x [.., groups * n] as the cell's c may be: the n of an sLSTM, the second of three states, is above 0."""
    if CELLS[cell].in_c < 3:
        return x
    c, n, m = x.unflatten(-1, (groups, 3, -1)).unbind(-2)
    return torch.stack([c, n.abs() + 0.5, m], -2).flatten(-3)


def tensors(state: State) -> tuple[Tensor, ...]:
    if state is None:
        return ()
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def map_state(function: Any, state: State) -> State:
    if isinstance(state, (tuple, list)):
        return tuple(function(s) for s in state)
    return None if state is None else function(state)


def leaf(x: Tensor) -> Tensor:
    """x itself, strides and all, as a leaf that requires grad."""
    return x.detach().requires_grad_()


def weighted(results: Sequence[Tensor]) -> Tensor:
    """A scalar in which every value of every result counts differently."""
    total = results[0].new_zeros(())
    for i, x in enumerate(results):
        total = total + (x * randn(*x.shape, seed=100 + i, dtype=x.dtype)).sum()
    return total


def gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def collect(output: Any, finals: State, named: Mapping[str, Tensor], loss: Tensor | None = None) -> Results:
    """Results and gradients by name. `named` are the leaves."""
    results: Results = {}
    if isinstance(output, PackedSequence):
        results["batch_sizes"] = output.batch_sizes
        for name in ("sorted_indices", "unsorted_indices"):
            if getattr(output, name) is not None:
                results[name] = getattr(output, name)
        output = output.data
    if output is not None:
        results["output"] = output
    results.update(zip(("h_n", "c_n", "n_n", "m_n"), tensors(finals), strict=False))
    floating = [x for x in results.values() if x.is_floating_point()]
    (weighted(floating) if loss is None else loss).backward()
    results = {name: x.detach() for name, x in results.items()}
    results.update({f"grad of {name}": gradient(x) for name, x in named.items()})
    return results


def evaluate(module: nn.Module, input: Any, hx: State = None, **options: Any) -> Results:
    """Runs a module, forward and backward: results, and the gradients of input, states and parameters."""
    module.zero_grad()
    if isinstance(input, PackedSequence):
        data = leaf(input.data)
        input = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    else:
        data = input = leaf(input)
    hx = map_state(leaf, hx)
    output, finals = module(input, hx, **options)
    named = {"input": data, **dict(zip(("h_0", "c_0", "n_0", "m_0"), tensors(hx), strict=False))}
    return collect(output, finals, {**named, **dict(module.named_parameters())})


def evaluate_cell(cell: nn.Module, input: Tensor, hx: State = None) -> Results:
    """The same for a cell."""
    cell.zero_grad()
    input, hx = leaf(input), map_state(leaf, hx)
    after = cell(input, hx)
    named = {"input": input, **dict(zip(("h_0", "c_0"), tensors(hx), strict=False))}
    return collect(None, after, {**named, **dict(cell.named_parameters())})


def assert_equal(actual: Results, expected: Results, tolerance: float | None = None) -> None:
    """Same names, shapes and dtypes; values within `tolerance`, relative to the largest expected one or 1."""
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
        if not want.numel():
            continue
        if not want.is_floating_point():
            assert torch.equal(got, want), name
            continue
        limit = TOLERANCE[want.dtype] if tolerance is None else tolerance
        error = (got - want).abs().max().item()
        bound = limit * max(1.0, want.abs().max().item())
        assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g}"  # so NaN fails


def check_derivatives(run: Callable[..., Any], *leaves: Tensor) -> None:
    """Every number of reverse mode; of forward mode and of second order, which take longer, random directions."""
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def check_vmap(modules: Sequence[nn.Module], batched: str, x: Tensor) -> None:
    """Gradients under vmap against each call's alone, x [T, modules, I]: of the ensemble of the modules ("members"), a
    row of x and batched weights for each; or of the first one ("samples"), for every row with the same weights."""
    assert len(modules) == x.shape[1]
    counts = randn(len(x), 1, modules[0](x)[0].shape[2], seed=5)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(modules[0], weights, (x.unsqueeze(1),))[0] * counts).sum()

    if batched == "members":
        stacked = {n: torch.stack([dict(m.named_parameters())[n] for m in modules]) for n in modules[0].state_dict()}
        got = torch.func.vmap(torch.func.grad(loss), (0, 1))({n: w.detach() for n, w in stacked.items()}, x)
        own = list(modules)
    else:
        weights = {n: w.detach() for n, w in modules[0].named_parameters()}
        got = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, x)
        own = [modules[0]] * len(modules)
    for k, module in enumerate(own):
        output, _ = module(x[:, k : k + 1])
        names, leaves = zip(*module.named_parameters(), strict=True)
        for name, g in zip(names, torch.autograd.grad((output * counts).sum(), leaves), strict=True):
            torch.testing.assert_close(got[name][k], g)


def check_compile(module: nn.Module, backend: str, x: Tensor, **options: Any) -> None:
    """Output and parameters' gradients of a call, compiled whole, against the eager one's."""
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    results = [run(x, **options)[0] for run in (module, compiled)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(weighted([y]), list(module.parameters())) for y in results]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def check_steps_add_up(module: Any, x: Tensor) -> None:
    """``step`` by step, outputs and the state after the last are the sequence's, x [T, B, I]."""
    state, rows = None, []
    for row in x:
        output, state = module.step(row, state)
        rows.append(output)
    want, finals = module(x)
    torch.testing.assert_close(torch.stack(rows), want)
    for a, b in zip(tensors(state), tensors(finals), strict=True):
        torch.testing.assert_close(a, b)
