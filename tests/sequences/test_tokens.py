"""Token input: the rows of weight_ih that integers name, against torch.nn's modules on one-hot input."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import functional
from tests.helpers import (
    assert_equal,
    build,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
)
from tests.sequences.cases import DEEP, KIND, LENGTHS, SIZES, enlarged, one_hot, random_tokens, results, token_pair
from tests.transform_cases import FUSED, count_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@KIND
def test_tokens_odd_sizes(kind: str, dtype: torch.dtype) -> None:
    for V, H, B in itertools.product(SIZES, SIZES, (1, 3)):
        ours, theirs = token_pair(kind, V, H, dtype=dtype)
        tokens = random_tokens(4, B, vocabulary=V)
        assert_equal(results(ours, tokens), results(theirs, one_hot(tokens, V, dtype)))


TOKEN_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": DEEP,
    "batch-first": {"batch_first": True, **DEEP},
    "no-bias": {"bias": False, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 1.0},
}


@pytest.mark.parametrize("name", TOKEN_CALLS)
@KIND
def test_tokens_are_rows_of_the_one_hot_input(kind: str, name: str) -> None:
    options = TOKEN_CALLS[name] | {"dtype": torch.float64}
    for projected in (False, True) if kind == "LSTM" else (False,):
        ours, theirs = token_pair(kind, 7, 5, **options, **({"proj_size": 2} if projected else {}))
        tokens = random_tokens(5, 4, vocabulary=7)
        x = one_hot(tokens, 7)
        D, L = 2 if ours.bidirectional else 1, ours.num_layers
        hx = make_state(kind, D * L, 4, hidden=5, proj=2 if projected else 0)
        if ours.batch_first:
            tokens, x = tokens.t(), x.transpose(0, 1)
        assert_equal(results(ours, tokens, hx), results(theirs, x, hx))
        one = map_state(lambda s: s[:, 0], hx)
        row = 0 if ours.batch_first else slice(None), slice(None) if ours.batch_first else 0
        assert_equal(results(ours, tokens[row], one), results(theirs, x[row], one))
        packed = [pack_padded_sequence(y, LENGTHS, ours.batch_first, enforce_sorted=False) for y in (tokens, x)]
        assert_equal(results(ours, packed[0], hx), results(theirs, packed[1], hx))


@KIND
def test_tokens_with_lengths_and_resets(kind: str) -> None:
    """As the dense input, whose lengths and resets test_sequences.py tests; in the padding any number may stand."""
    module = build(fastrnn, kind, 7, 5, dtype=torch.float64, token_input=True, **DEEP)
    tokens = random_tokens(5, 4, vocabulary=7)
    lengths, resets = torch.tensor([5, 0, 2, 4]), torch.rand(5, 4) < 0.4
    fresh = make_state(kind, 4, 4, hidden=5)
    options = {"lengths": lengths, "resets": resets, "reset_state": fresh}
    expected = results(module, one_hot(tokens, 7), **options)
    valid = torch.arange(5)[:, None] < lengths
    for padding in (-100, 7, 2**40):
        assert_equal(results(module, torch.where(valid, tokens, padding), **options), expected, 1e-12)


def test_token_dtypes() -> None:
    module = fastrnn.GRU(7, 5, token_input=True)
    tokens = random_tokens(5, 4, vocabulary=7)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert_equal(results(module, tokens.to(dtype)), results(module, tokens), 0)
    for dtype in (torch.bfloat16, torch.float16):
        half = fastrnn.LSTM(7, 5, dtype=dtype, token_input=True)
        want = copy.deepcopy(half).double()(one_hot(tokens, 7))[0]
        torch.testing.assert_close(half(tokens)[0].double(), want, rtol=0, atol=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = module(tokens)
        output.sum().backward()
    assert output.dtype == h_n.dtype == torch.bfloat16 and module.weight_ih_l0.grad.dtype == torch.float32


@KIND
def test_tokens_of_functions(kind: str) -> None:
    module = build(fastrnn, kind, 7, 5, dtype=torch.float64, token_input=True, **DEEP)
    tokens, hx = random_tokens(5, 4, vocabulary=7), make_state(kind, 4, 4, hidden=5)
    name, _, nonlinearity = kind.lower().partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    options["token_input"] = True
    lengths = torch.tensor([5, 0, 2, 4])
    got = getattr(functional, name)(tokens, hx, module._weights(), lengths=lengths, **options)
    torch.testing.assert_close(got, module(tokens, hx, lengths=lengths), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_tokens_derivatives(kind: str) -> None:
    """By differences: first order in both modes, batched; second order."""
    module = enlarged(build(fastrnn, kind, 3, 2, bidirectional=True, dtype=torch.float64, token_input=True))
    tokens, lengths = random_tokens(3, 3, vocabulary=3), torch.tensor([3, 0, 2])
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(parameters, values, strict=True))
        output, finals = functional_call(module, named, (tokens,), {"lengths": lengths})
        return output, *tensors(finals)

    values = tuple(parameters.values())
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, values)


def test_tokens_under_vmap() -> None:
    options = {"bidirectional": True, "dtype": torch.float64, "token_input": True}
    models = [fastrnn.LSTM(7, 5, **options) for _ in range(3)]
    tokens = random_tokens(6, 4, vocabulary=7)
    torch.testing.assert_close(vmap(models[0], 1, (1, 1))(tokens), models[0](tokens))

    stacked, _ = stack_module_state(models)
    stacked = {name: x.detach() for name, x in stacked.items()}
    ensemble = vmap(lambda parameters: functional_call(models[0], parameters, (tokens,))[0])(stacked)
    torch.testing.assert_close(ensemble, torch.stack([m(tokens)[0] for m in models]))

    parameters = {name: p.detach() for name, p in models[0].named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(models[0], parameters, (row,))[0].sin().sum()

    per_sample = vmap(grad(loss), (None, 1))(parameters, tokens)
    models[0](tokens)[0].sin().sum().backward()
    for name, p in models[0].named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


def test_tokens_make_no_one_hot() -> None:
    """No tensor with a value for every step, row and word appears, forward or backward."""
    T, B, V = 40, 7, 1009
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
            largest = max([largest, *sizes])
            return out

    for options in ({}, {"bidirectional": True, "num_layers": 2}):
        model, tokens = fastrnn.LSTM(V, 5, token_input=True, **options), random_tokens(T, B, vocabulary=V)
        with Largest():
            model(tokens)[0].sum().backward()
            model(pack_padded_sequence(tokens, torch.full((B,), T)))[0].data.sum().backward()
        directions = 2 if model.bidirectional else 1  # of which the gradients come as one
        assert largest == directions * model.weight_ih_l0.numel() < T * B * V


def test_tokens_take_the_fused_recurrence() -> None:
    model, tokens = fastrnn.GRU(7, 5, token_input=True), random_tokens(6, 4, vocabulary=7)
    with count_calls() as seen:
        model(tokens)[0].sum().backward()
    assert seen == FUSED


@KIND
def test_tokens_want_a_sign(kind: str) -> None:
    """An integer [T, I] may as well be features that were not cast. That torch.nn's errors come: test_errors.py."""
    ours, theirs = pair(kind, 7, 5)
    tokens = random_tokens(6, 4, vocabulary=7)
    packed = pack_padded_sequence(tokens, torch.tensor([6, 3, 3, 1]))
    weights, nonlinearity = ours._weights(), {"nonlinearity": kind[4:].lower()} if kind.startswith("RNN") else {}
    function = getattr(functional, kind.partition("_")[0].lower())
    converted, stored = fastrnn.convert(copy.deepcopy(theirs)), copy.deepcopy(ours).store_by_token()
    calls = [lambda: ours(tokens), lambda: ours(packed), lambda: ours(tokens[:, 0]), lambda: ours.step(tokens[0])]
    calls += [lambda: converted(tokens), lambda: stored(tokens)]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match=r"dtype|Expected input to be 2D or 3D|x: expected"):
            call()
    with pytest.raises(RuntimeError, match=r"^input: expected 3 dimensions \(T, B, I\), got \[6, 4\]$"):
        function(tokens, None, weights, **nonlinearity)
    expected = theirs(one_hot(tokens, 7, torch.float32))
    converted.token_input = True
    for found in (converted(tokens), function(tokens, None, weights, token_input=True, **nonlinearity)):
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="has token_input=True"):
        fastrnn.to_torch(converted)
    with pytest.raises(ValueError, match="module: expected token_input=False, got fastrnn"):
        fastrnn.quantize(converted)


def test_dense_input_of_a_module_of_tokens_goes_the_short_way() -> None:
    """The option costs a dense call nothing."""
    module, x = fastrnn.GRU(7, 5, token_input=True).eval(), torch.randn(6, 4, 7)
    with torch.no_grad():
        assert module._plain(x, None, None) is not None


@pytest.mark.parametrize("tokens", [[[0, 7]], [[-1, 3]], [[2**40, 0]]])
def test_token_out_of_range(tokens: list[list[int]]) -> None:
    wrong = torch.tensor(tokens)
    expected = rf"tokens in \[0, 7\) \(input_size\), got {wrong.min()} to {wrong.max()}"
    model = fastrnn.LSTM(7, 5, token_input=True)
    for call in (lambda: model(wrong), lambda: model.step(wrong[0]), lambda: model.store_by_token()(wrong)):
        with pytest.raises(IndexError, match=expected):
            call()
    with pytest.raises(IndexError, match=r"tokens in \[0, 7\)"):
        vmap(model, 1)(wrong)
    with pytest.raises((IndexError, RuntimeError), match=expected):
        torch.compile(model, fullgraph=True, backend="aot_eager")(wrong)


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (torch.tensor(3), ValueError, "LSTM: Expected tokens to be 1D or 2D, got 0D"),
        (torch.ones(2, 3, 7, dtype=torch.int64), ValueError, "input dtype .torch.int64. does not match weight dtype"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, "input dtype .torch.bool. does not match weight dtype"),
        (torch.ones(2, 3, dtype=torch.complex64), ValueError, "input dtype .torch.complex64. does not match"),
        (torch.ones(2, 3, 4, 7, dtype=torch.int64), ValueError, "Expected input to be 2D or 3D, got 4D"),
        (
            pack_padded_sequence(torch.ones(2, 3, 7, dtype=torch.int64), torch.tensor([2, 2, 1])),
            ValueError,
            "input dtype .torch.int64. does not match weight dtype",
        ),
        (torch.ones(0, 3, dtype=torch.int64), RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        (torch.ones(2, 3, dtype=torch.int64, device="meta"), RuntimeError, "not at the same device"),
    ],
    ids=range(8),
)
def test_tokens_that_do_not_fit(input: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.LSTM(7, 5, token_input=True)(input)


def test_tokens_that_do_not_fit_a_function() -> None:
    weights = fastrnn.GRU(7, 5)._weights()
    (w,) = weights[0]
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for given, error, message in (
        (w._replace(weight_ih=None), RuntimeError, "weight_ih: expected a tensor of 2 dimensions, got NoneType"),
        (w._replace(weight_ih=w.weight_ih[:7]), RuntimeError, r"weight_ih: expected \[15, 7\], got \[7, 7\]"),
        (
            w._replace(bias_hh=w.bias_hh.double()),
            RuntimeError,
            r"bias_hh: expected torch.float32 \(that of weights\[0\]\[0\].weight_ih\)",
        ),
    ):
        with pytest.raises(error, match=message):
            functional.gru(tokens, None, [[given]], token_input=True)
    with pytest.raises(RuntimeError, match=r"input: expected 3 dimensions \(T, B, I\), or tokens \(T, B\), got \[3\]"):
        functional.gru(tokens[0], None, weights, token_input=True)
    with pytest.raises(RuntimeError, match=r"state: expected \[1, 3, 5\]"):
        functional.gru(tokens, torch.zeros(1, 2, 5), weights, token_input=True)


def test_tokens_without_rows() -> None:
    output, h_n = fastrnn.GRU(7, 5, token_input=True)(torch.zeros(3, 0, dtype=torch.int64))
    assert output.shape == (3, 0, 5) and h_n.shape == (1, 0, 5)
    output.sum().backward()


@KIND
def test_store_by_token(kind: str) -> None:
    plain = build(fastrnn, kind, 17, 5, dtype=torch.float64, token_input=True, **DEEP)
    stored = copy.deepcopy(plain).store_by_token()
    assert list(stored.state_dict()) == list(plain.state_dict())
    tokens, x = random_tokens(6, 4, vocabulary=17), randn(6, 4, 17)
    for input in (tokens, x):
        assert_equal(results(stored, input), results(plain, input), 1e-12)
    results(stored, tokens)
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    other = build(fastrnn, kind, 17, 5, dtype=torch.float64, token_input=True, **DEEP).store_by_token()
    other.load_state_dict(plain.state_dict())
    for m in (
        stored,
        copy.deepcopy(stored),
        pickle.loads(pickle.dumps(stored)),
        torch.load(buffer, weights_only=False),
    ):
        for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            weight = getattr(m, name)
            assert weight.stride() == (1, weight.shape[0]) and torch.equal(weight, getattr(plain, name))
            assert m is not stored or weight.grad.stride() == weight.stride()  # as autograd keeps it, without a copy
        assert m.weight_ih_l1.is_contiguous()
    assert other.weight_ih_l0.stride() == stored.weight_ih_l0.stride()
    assert torch.equal(other(tokens)[0], stored(tokens)[0])


def test_store_by_token_needs_a_parameter() -> None:
    normed = nn.utils.parametrizations.weight_norm(fastrnn.GRU(3, 5), "weight_ih_l0")
    for module in (normed, fastrnn.quantize(fastrnn.GRU(3, 5))):
        with pytest.raises(RuntimeError, match="weight_ih_l0: expected a parameter of the module"):
            module.store_by_token()
