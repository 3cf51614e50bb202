"""``num_heads=N`` against the dense layer of torch.nn whose W_hh has the heads' blocks on its diagonal."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional
from tests.helpers import (
    KINDS,
    Results,
    assert_equal,
    check_derivatives,
    check_steps_add_up,
    evaluate,
    leaf,
    make_state,
    randn,
    tensors,
    weighted,
)

T, B, I = 6, 3, 4  # noqa: E741
CASES = [(H, N) for N in (1, 2, 3) for H in (3 * N, 12)] + [(129, 3), (17, 17)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
}
LENGTHS = torch.tensor([6, 2, 4])


def class_of(kind: str) -> tuple[str, dict[str, Any]]:
    name, _, nonlinearity = kind.partition("_")
    return name, {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}


def make(kind: str, H: int, N: int, **options: Any) -> Any:
    torch.manual_seed(H + N)
    name, more = class_of(kind)
    return getattr(fastrnn, name)(I, H, num_heads=N, **{"dtype": torch.float64, **more, **options})


def in_blocks(weight: Tensor, N: int) -> Tensor:
    """The diagonal blocks of [G*H, H] as [N, G*h, h], read one by one."""
    H = weight.shape[1]
    h, gates = H // N, weight.split(H)
    return torch.stack([torch.cat([g[n * h : (n + 1) * h, n * h : (n + 1) * h] for g in gates]) for n in range(N)])


def dense(module: Any, library: Any = nn, **options: Any) -> Any:
    """The layer without heads that computes the same."""
    name, more = class_of(module.mode)
    twin = getattr(library, name)(
        I, module.hidden_size, module.num_layers, bias=module.bias, bidirectional=module.bidirectional,
        dtype=torch.float64, **more, **options,
    )  # fmt: skip
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for name, x in twin.named_parameters():
            if name.startswith("weight_hh") and module.num_heads > 1:
                parts = weights[name].chunk(len(x) // x.shape[1], 1)
                x.copy_(torch.cat([torch.block_diag(*part) for part in parts]))
            else:
                x.copy_(weights[name])
    return twin


def of_blocks(results: Results, N: int) -> Results:
    whole = N > 1
    return {k: in_blocks(x, N) if whole and k.startswith("grad of weight_hh") else x for k, x in results.items()}


@pytest.mark.parametrize("given", ["", "state", "recompute"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("H", "N"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient(kind: str, H: int, N: int, name: str, given: str) -> None:
    module = make(kind, H, N, **OPTIONS[name], recompute=2 if given == "recompute" else 0)
    x, hx = randn(T, B, I), None
    if given == "state":
        hx = make_state(kind, module.num_layers * (1 + module.bidirectional), B, hidden=H)
    assert_equal(evaluate(module, x, hx), of_blocks(evaluate(dense(module), x, hx), N), 1e-10)


@pytest.mark.parametrize("mask", ["lengths", "resets", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, mask: str) -> None:
    """Against our own dense layer, which has them."""
    module, x = make(kind, 12, 3, num_layers=2, bidirectional=True), randn(T, B, I)
    resets, fresh = torch.rand(T, B) < 0.4, make_state(kind, 4, B, hidden=12, seed=3)
    given: dict[str, Any] = {} if mask == "resets" else {"lengths": LENGTHS}
    given |= {} if mask == "lengths" else {"resets": resets, "reset_state": fresh}
    twin = dense(module, fastrnn)
    assert_equal(evaluate(module, x, **given), of_blocks(evaluate(twin, x, **given), 3), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_tokens(kind: str) -> None:
    module = make(kind, 12, 3, bidirectional=True, token_input=True)
    packed = pack_padded_sequence(randn(T, B, I), LENGTHS, enforce_sorted=False)
    assert_equal(evaluate(module, packed), of_blocks(evaluate(dense(module), packed), 3), 1e-10)
    tokens = torch.randint(I, (T, B))
    one_hot = nn.functional.one_hot(tokens, I).double()
    for a, b in zip(tensors(module(tokens)[1]), tensors(dense(module)(one_hot)[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_add_up(kind: str) -> None:
    module, x = make(kind, 12, 3, num_layers=2), randn(T, B, I)
    check_steps_add_up(module, x)


def test_other_options() -> None:
    """Together: each has its place in the heads' order."""
    options = {"peephole": True, "learn_initial_state": True, "state_batch_first": True, "return_all_states": True}
    module, x = make("LSTM", 12, 3, grad_clip=0.01, **options), randn(T, B, I)
    twin = dense(module, fastrnn, grad_clip=0.01, **options)
    got, want = module(x), twin(x)
    for a, b in zip((got[0], *got[1], got[2]), (want[0], *want[1], want[2]), strict=True):
        torch.testing.assert_close(a, b)
    parameters = dict(module.named_parameters())
    losses = [weighted([y[0], *y[1], y[2]]) for y in (got, want)]
    grads = (torch.autograd.grad(a, list(m.parameters())) for a, m in zip(losses, (module, twin), strict=True))
    for (name, _), a, b in zip(parameters.items(), *grads, strict=True):
        torch.testing.assert_close(a, in_blocks(b, 3) if name == "weight_hh_l0" else b, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind: str) -> None:
    module, x = make(kind, 6, 2), leaf(randn(3, 2, I))
    names, weights = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    check_derivatives(run, x, *weights)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str) -> None:
    module, x = make(kind, 6, 2), randn(5, 4, I)
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row[:, None],))[0].square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(4):
        alone = torch.autograd.grad(loss(parameters, x[:, b]), list(parameters.values()))
        for name, got, want in zip(parameters, (y[b] for y in by_sample.values()), alone, strict=True):
            torch.testing.assert_close(got, want, msg=name)
    members = [make(kind, 6, 2), module]
    stacked, _ = torch.func.stack_module_state(members)
    together = torch.func.vmap(lambda p: torch.func.functional_call(module, p, (x,))[0])(stacked)
    for got, member in zip(together, members, strict=True):
        torch.testing.assert_close(got, member(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_programs(kind: str) -> None:
    """torch.compile, torch.export and torch.jit.trace."""
    module, x = make(kind, 6, 2, num_layers=2, dtype=torch.float32), randn(5, 4, I, dtype=torch.float32)
    want = module(x)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], want)
    T_, B_ = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: T_, 1: B_},))
    longer = randn(7, 3, I, dtype=torch.float32)
    torch.testing.assert_close(program.module()(longer)[0], module(longer)[0])
    torch.testing.assert_close(torch.jit.trace(module, (x,))(longer)[0], module(longer)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_types(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, 12, 3), randn(T, B, I)
    want = module(x)[0]
    torch.testing.assert_close(module.to(dtype)(x.to(dtype))[0].double(), want, rtol=0, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.float()(x.float())[0].double(), want, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    module = make(kind, 12, 3, num_layers=2, bidirectional=True, dtype=torch.float32)
    x, hx = randn(T, B, I, dtype=torch.float32), make_state(kind, 4, B, hidden=12, dtype=torch.float32)
    got, want = fastrnn.quantize(module, dtype)(x, hx), module(x, hx)
    for a, b in zip((got[0], *tensors(got[1])), (want[0], *tensors(want[1])), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.03)


def test_it_is_kept() -> None:
    module, x = make("LSTM", 12, 3), randn(T, B, I)
    want = module(x)[0]
    assert repr(module) == "LSTM(4, 12, num_heads=3)"
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == {
        "weight_ih_l0": [48, 4], "weight_hh_l0": [3, 16, 4], "bias_ih_l0": [48], "bias_hh_l0": [48],
    }  # fmt: skip
    other = make("LSTM", 12, 3)
    other.load_state_dict(module.state_dict())
    for m in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(m(x)[0], want)
    bound = 12**-0.5
    assert all(0.8 * bound < x.abs().max() <= bound for x in make("LSTM", 12, 3).parameters())
    module.reset_parameters()
    assert not torch.equal(module(x)[0], want)
    assert make("GRU", 12, 1).weight_hh_l0.shape == (36, 12), "one head is the plain layer"
    with pytest.raises(TypeError, match="the module itself has num_heads=3"):
        fastrnn.to_torch(module)


def test_initial_values_and_masks() -> None:
    """Of each head's own matrices; weight_dropout draws for the blocks, which are all there is."""
    for block in make("GRU", 12, 3, init="orthogonal").weight_hh_l0.reshape(3, 3, 4, 4).flatten(0, 1):
        torch.testing.assert_close(block @ block.t(), torch.eye(4, dtype=torch.float64))
    irnn = make("RNN_RELU", 12, 3, init="identity")
    assert torch.equal(dense(irnn).weight_hh_l0, torch.eye(12, dtype=torch.float64))
    module, x = make("LSTM", 12, 3, num_layers=2, weight_dropout=0.5, locked_dropout=0.25), randn(T, B, I)
    torch.manual_seed(0)
    dropped = module(x)[0]
    torch.manual_seed(0)
    assert torch.equal(module(x)[0], dropped)
    assert not torch.equal(module.eval()(x)[0], dropped)


def test_functional() -> None:
    module, x = make("GRU", 12, 3, num_layers=2), randn(T, B, I)
    weights = module._weights()
    output, h_n = functional.gru(x, None, weights)
    torch.testing.assert_close((output, h_n), module(x))


def test_messages() -> None:
    for heads, error, text in [
        (5, ValueError, "num_heads should divide hidden_size, got 5 for 12"),
        (0, ValueError, "num_heads should be at least 1, got 0"),
        (2.0, TypeError, "num_heads should be of type int, got: float"),
        (True, TypeError, "num_heads should be of type int, got: bool"),
    ]:
        with pytest.raises(error, match=text):
            fastrnn.LSTM(I, 12, num_heads=heads)
    with pytest.raises(ValueError, match="num_heads should be 1 with proj_size, got 3"):
        fastrnn.LSTM(I, 12, proj_size=3, num_heads=3)
    (w,) = make("LSTM", 12, 3)._weights()[0]
    x, small = randn(T, B, I), w._replace(weight_hh=w.weight_hh[:, :15])
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].weight_hh: expected \[3, 16, 4\], got \[3, 15, 4\]"):
        functional.lstm(x, None, [[small]])
    with pytest.raises(RuntimeError, match=r"weights\[0\]\[0\].weight_hr: expected None with heads, got a tensor"):
        functional.lstm(x, None, [[w._replace(weight_hr=randn(3, 12))]])
    with pytest.raises(RuntimeError, match=r"weights.weight_hh: expected a tensor of 2 dimensions, got \[3, 16, 4\]"):
        functional.lstm_cell(x[0], (randn(B, 12), randn(B, 12)), w)
    module = make("LSTM", 12, 3)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0[:, :15].detach())
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected \[3, 16, 4\], got \[3, 15, 4\]"):
        module(x)
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    with pytest.raises(RuntimeError, match="num_heads: expected 1 where the gradient of every sample is asked for"):
        call_for_per_sample_grads(make("LSTM", 12, 3, batch_first=True), loss_reduction="sum")(randn(B, T, I))
