"""What random calls have found, or reading for them: each of these once crashed, or gave no error or a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.ops import CELLS, layer_backward, layer_forward, recurrent_forward
from tests.fuzz.calls import arguments_of

T, B, I, H = 5, 3, 4, 6  # noqa: E741
CASE = {"cell": "lstm", "dtype": "float32", "T": T, "B": B, "P": 1, "h": H, "I": I, "R": 0, "options": 4, "seed": 0}


def without_memory(x: Tensor) -> Tensor:
    """A tensor that claims its sizes still: somebody has resized its storage."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def given(op: str, **changed: Any) -> dict[str, Any]:
    return {**arguments_of({**CASE, "op": op}), **changed}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("what", ["input", "lengths", "resets", "hx", "batch"])
def test_module_call_of_a_tensor_without_memory(what: str, gradients: bool) -> None:
    module = fastrnn.GRU(I, H, batch_first=what == "batch").requires_grad_(gradients)
    arguments: dict[str, Any] = {"input": torch.randn(T, B, I), "hx": torch.zeros(1, B, H)}
    if what in ("lengths", "resets"):
        arguments |= {"lengths": torch.tensor([5, 2, 1]), "resets": torch.zeros(T, B, dtype=torch.bool)}
        arguments = {k: v for k, v in arguments.items() if k in ("input", what)}
    name = "input" if what == "batch" else what
    if what == "batch":
        arguments = {"input": torch.randn(T, B, I)}
    arguments[name] = without_memory(arguments[name])
    with pytest.raises(RuntimeError, match=r"(is|are) out of bounds for storage of size 0"):
        module(**arguments)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("recurrent_forward", "lengths"),
        ("gemm", "a"),
        ("gemm", "b"),
        ("gemm", "bias"),
        ("grouped_linear", "weight"),
        ("grouped_outer", "b"),
        ("bernoulli", "seed"),
        ("clamp_gradient", "x"),
    ],
)
def test_ops_of_tensors_without_memory(op: str, name: str) -> None:
    arguments = given(op, lengths=torch.tensor([5, 2, 1])) if name == "lengths" else given(op)
    arguments[name] = without_memory(arguments[name])
    with pytest.raises(RuntimeError, match=rf"^{op}: {name}: .* is out of bounds for storage of size 0"):
        getattr(torch.ops.fastrnn, op)(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [-1, 47, 200, 4886])
def test_draws_of_a_number_for_a_dtype(dtype: int, device: str) -> None:
    """torch's parser lets it through, and torch's own empty() reads past a table for it."""
    told = "unsupported scalarType|dtype: expected float32, float64, bfloat16, float16 or bool, got"
    with pytest.raises((TypeError, ValueError), match=told):
        torch.ops.fastrnn.bernoulli(torch.tensor([1], device=device), [3], 0.5, dtype)


def test_no_tensor_whose_gradient_could_be_clamped() -> None:
    with pytest.raises(TypeError, match=r"^clamp_gradient: x: expected a tensor, got None"):
        torch.ops.fastrnn.clamp_gradient(None, 1.0)


def test_tokens_with_lengths_without_memory() -> None:
    arguments = given("layer_forward", input=torch.zeros(T, B, dtype=torch.int64))
    arguments["lengths"] = without_memory(torch.tensor([5, 2, 1]))
    with pytest.raises(RuntimeError, match=r"^layer_forward: lengths: .* is out of bounds for storage of size 0"):
        layer_forward(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_without_groups(device: str) -> None:
    arguments = given("layer_forward", reverse=[])
    arguments |= {name: [] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    arguments["input"] = arguments["input"].to(device)
    with pytest.raises(RuntimeError, match=r"^layer_forward: reverse: expected a value for every group, got none"):
        layer_forward(**arguments)


def test_gradient_of_the_weight_of_tokens_without_the_weight() -> None:
    arguments = given("layer_backward", input=torch.zeros(T, B, dtype=torch.int64), weight_ih=[])
    arguments["needed"] = [False, True, *[False] * 9]
    with pytest.raises(RuntimeError, match=r"^layer_backward: weight_ih: expected a tensor"):
        layer_backward(**arguments)


@pytest.mark.parametrize("shape", [(T + 1, B), (T, B - 1), (T * B,), (B, T)])
def test_backward_of_other_tokens(shape: tuple[int, ...]) -> None:
    arguments = given("layer_backward", input=torch.zeros(shape, dtype=torch.int64))
    arguments["needed"] = [False, True, *[False] * 9]
    with pytest.raises(RuntimeError, match=r"^layer_backward: input: expected 2 dimensions that begin with 5 steps"):
        layer_backward(**arguments)


def test_batch_sizes_whose_sum_overflows() -> None:
    """2^62 four times is 0 in 64 bits."""
    arguments = given("layer_forward", input=torch.zeros(0, I), batch_sizes=torch.full((4,), 2**62))
    for name in ("h_0", "c_0"):
        arguments[name] = None
    with pytest.raises(ValueError, match=r"^layer_forward: batch_sizes: expected a sum of 0 .*, got one past 64 bits"):
        layer_forward(**arguments)


def test_sizes_whose_product_overflows() -> None:
    """No element is in any of these, so that sizes are what they are said to be."""
    arguments = given("recurrent_forward", gates_ih=torch.empty(2**61, 0, 4 * H))
    for name in ("h_0", "c_0"):
        arguments[name] = torch.empty(0, H)
    with pytest.raises(RuntimeError, match=r"^recurrent_forward: gates_ih: expected sizes whose products fit 64 bits"):
        recurrent_forward(**arguments)


@pytest.mark.parametrize("name", ["output", "saved", "grad_output"])
def test_backward_of_packed_rows_in_bfloat16(name: str) -> None:
    """Rows that are too few are told of by name."""
    arguments = arguments_of({**CASE, "op": "layer_backward", "dtype": "bfloat16", "options": 5})
    arguments[name] = arguments[name][:-1]
    with pytest.raises(
        (RuntimeError, ValueError), match=r"^layer_backward: (batch_sizes|saved|grad_output): expected "
    ):
        layer_backward(**arguments)


@pytest.mark.parametrize(("dtype", "options"), [("bfloat16", 5), ("float32", 7)], ids=["bfloat16", "tokens"])
def test_a_packed_elman_network_by_products(dtype: str, options: int) -> None:
    """It saves nothing, so what backward is given has rows and no features."""
    case = {**CASE, "cell": "rnn_tanh", "dtype": dtype, "options": options, "op": "layer_backward"}
    arguments = arguments_of(case)
    assert arguments["saved"].shape == (len(arguments["input"]), 0)
    arguments["needed"] = [False, True, True, *[False] * 8]
    _, weight_ih, weight_hh, *_ = layer_backward(**arguments)
    assert weight_ih.isfinite().all() and weight_hh.abs().sum() > 0


@pytest.mark.parametrize("cell", CELLS)
def test_backward_of_no_steps_by_products(cell: str) -> None:
    """Of half types: gradients of weights are 0, and those of the initial states are what the final ones bring."""
    arguments = arguments_of({**CASE, "cell": cell, "dtype": "bfloat16", "T": 0, "op": "layer_backward"})
    arguments["needed"] = [True] * 3 + [False] * 4 + [True] + [False] * 3
    grads = layer_backward(**arguments)
    assert grads[0].shape == (0, B, I) and not grads[1].any() and not grads[2].any()
    assert torch.equal(grads[7], arguments["grad_h_n"])


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_without_features_under_torch_func(kind: str) -> None:
    cell = getattr(fastrnn, kind)(0, H, dtype=torch.float64)
    theirs = getattr(torch.nn, kind)(0, H, dtype=torch.float64)
    theirs.load_state_dict(cell.state_dict())
    x, h = torch.zeros(B, 0, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)

    def total(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda h: module(x, (h, h) if kind == "LSTMCell" else h)[0].square().sum()

    torch.testing.assert_close(torch.func.grad(total(cell))(h), torch.func.grad(total(theirs))(h))
    torch.testing.assert_close(torch.func.jvp(total(cell), (h,), (h,)), torch.func.jvp(total(theirs), (h,), (h,)))


META = torch.zeros(3, device="meta")
WITHOUT_DATA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cell: expected one of lstm, gru, ": lambda given: given.update(cell="other"),
    "layer_forward: weight_hh: expected 1 tensors": lambda given: given.update(weight_hh=[]),
    "layer_forward: weight_ih: expected 1 tensors": lambda given: given.update(weight_ih=[]),
    "layer_forward: bias_hh: expected 1 tensors": lambda given: given.update(bias_hh=given["bias_hh"] * 2),
    "layer_forward: weight_hh: expected 2 dimensions": lambda given: given.update(weight_hh=[META]),
    r"layer_forward: input: expected \[T, B, features\]": lambda given: given.update(input=given["input"][0]),
}  # fmt: skip


@pytest.mark.parametrize("message", WITHOUT_DATA)
def test_messages_of_calls_without_data(message: str) -> None:
    """Graphs hear of a wrong call what the kernels say of it."""
    meta = {
        k: [x.to("meta") for x in v] if isinstance(v, list) and k != "reverse" else v
        for k, v in given("layer_forward").items()
    }
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in meta.items()}
    WITHOUT_DATA[message](meta)
    with pytest.raises((RuntimeError, ValueError), match=f"^{message}"):
        layer_forward(**meta)
