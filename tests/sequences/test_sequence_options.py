"""step(), token input, learned initial states, states with the batch first, every c, pool and detach: against torch.nn
and loops over its cells in float64."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import functional
from fastrnn.ops import recurrent_forward
from fastrnn.options import SWITCHES
from tests.helpers import (
    KINDS,
    TOLERANCE,
    Results,
    State,
    assert_equal,
    build,
    collect,
    leaf,
    make_state,
    map_state,
    pair,
    randn,
    tensors,
    weighted,
)
from tests.transform_cases import FUSED, count_calls

KIND = pytest.mark.parametrize("kind", KINDS)
SIZES = (1, 3, 17, 129)
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([5, 2, 1, 4])


def results(module: nn.Module, input: Any, hx: State = None, **options: Any) -> Results:
    """Of a call and its backward pass: output, states, and gradients of states and parameters."""
    module.zero_grad()
    hx = map_state(leaf, hx)
    output, finals, *_ = module(input, hx, **options)
    return collect(
        output, finals, dict(zip(("h_0", "c_0"), tensors(hx), strict=False)) | dict(module.named_parameters())
    )


def token_pair(kind: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, which takes tokens, torch.nn's) with the same parameters."""
    ours, theirs = pair(kind, *args, **kwargs)
    ours.token_input = True
    return ours, theirs


def random_tokens(*shape: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, shape)


def one_hot(tokens: Tensor, vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.one_hot(tokens.long(), vocabulary).to(dtype)


def enlarged(module: nn.Module) -> nn.Module:
    """With parameters of everyday size, learned states included, which start as zeros."""
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.6)
    return module


# ---- tokens ----


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
        assert largest == model.weight_ih_l0.numel() < T * B * V


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
    with pytest.raises((IndexError, RuntimeError), match="out of"):
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


# ---- step ----


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_steps_are_the_sequence(kind: str, batch_first: bool) -> None:
    """T steps, results and gradients, equal one call; of a bidirectional network one step equals its T = 1."""
    for hidden in SIZES:
        ours, theirs = pair(kind, 3, hidden, num_layers=2, batch_first=batch_first, dtype=torch.float64)
        x, state = randn(4, 3, 3), None
        outputs = []
        for step in x:
            output, state = ours.step(step, state)
            outputs.append(output)
        got = collect(torch.stack(outputs, 1 if batch_first else 0), state, dict(ours.named_parameters()))
        assert_equal(got, results(theirs, x.transpose(0, 1) if batch_first else x))


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_one_step_is_forward(kind: str, batch_first: bool) -> None:
    options: dict[str, Any] = {
        "batch_first": batch_first,
        "state_batch_first": batch_first,
        "learn_initial_state": True,
        "token_input": True,
    }
    module = enlarged(build(fastrnn, kind, 7, 5, dtype=torch.float64, **DEEP, **options))
    x, hx = randn(3, 7), make_state(kind, *((3, 4) if batch_first else (4, 3)), hidden=5)
    time = 1 if batch_first else 0
    resets = torch.tensor([True, False, True])
    masks = {"resets": resets, "reset_state": map_state(torch.sin, hx)}
    for input in (x, random_tokens(3, vocabulary=7)):
        for state in (None, hx):
            for mask in ({}, {"resets": resets}, masks):
                output, finals = module.step(input, state, **mask)
                whole = {k: v.unsqueeze(time) if k == "resets" else v for k, v in mask.items()}
                expected, after = module(input.unsqueeze(time), state, **whole)
                assert torch.equal(output, expected.squeeze(time))
                assert all(map(torch.equal, tensors(finals), tensors(after)))
        alone = map_state(lambda s: s[0] if batch_first else s[:, 0], hx)
        output, finals = module.step(input[0], alone, resets=resets[0])
        expected, after = module(input[:1], alone, resets=resets[:1])
        assert output.shape == (10,) and torch.equal(output, expected[0])
        assert all(map(torch.equal, tensors(finals), tensors(after)))


def test_step_without_a_cell_state_of_every_step() -> None:
    """return_all_states: the state holds the only c there is."""
    module = fastrnn.LSTM(3, 5, return_all_states=True)
    output, (h, c) = module.step(torch.randn(2, 3))
    assert output.shape == (2, 5) and h.shape == c.shape == (1, 2, 5)


def test_step_runs_hooks() -> None:
    """So torch's older weight_norm, which makes the weight in a hook, is in force."""
    module = fastrnn.GRU(3, 5)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.step(torch.randn(2, 3))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.step(randn(1, 2, 3)), ValueError, r"x: expected \[batch, input_size\].*got \[1, 2, 3\]"),
        (lambda m: m.step(torch.tensor([[1]])), RuntimeError, r"x: expected 3 features \(input_size\), got 1"),
        (lambda m: m.step([1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda m: m.step(torch.randn(2, 4)), RuntimeError, r"x: expected 3 features \(input_size\), got 4"),
        (lambda m: m.step(torch.randn(2, 3), torch.zeros(1, 3, 5)), RuntimeError, r"state: expected \[1, 2, 5\]"),
        (lambda m: m.step(torch.randn(2, 3), resets=torch.ones(2)), TypeError, "resets: expected dtype torch.bool"),
        (
            lambda m: m.step(torch.randn(2, 3), resets=[True]),
            TypeError,
            r"resets: expected a bool tensor \[2\], got list",
        ),
        (
            lambda m: m.step(torch.randn(2, 3), resets=torch.ones((), dtype=torch.bool)),
            RuntimeError,
            r"resets: expected \[2\], got \[\]",
        ),
        (
            lambda m: m.step(torch.randn(2, 3), reset_state=torch.zeros(1, 2, 5)),
            ValueError,
            "reset_state: expected None",
        ),
    ],
)
def test_step_bad_input(call: Any, error: type[Exception], message: str) -> None:
    for batch_first in (False, True):
        with pytest.raises(error, match=message):
            call(fastrnn.GRU(3, 5, batch_first=batch_first))


# ---- states with the batch first ----


@KIND
def test_state_batch_first(kind: str) -> None:
    """Torch.nn's results with the states turned; unbatched ones have no batch to come first."""
    for options in ({}, DEEP, {"batch_first": True}, {"proj_size": 2} if kind == "LSTM" else {"bidirectional": True}):
        theirs = build(nn, kind, 3, 5, dtype=torch.float64, **options)
        ours = build(fastrnn, kind, 3, 5, dtype=torch.float64, state_batch_first=True, **options)
        ours.load_state_dict(theirs.state_dict())
        groups = ours.num_layers * (2 if ours.bidirectional else 1)
        hx = make_state(kind, groups, 4, hidden=5, proj=options.get("proj_size", 0))
        x = randn(4, 6, 3) if ours.batch_first else randn(6, 4, 3)
        packed = pack_padded_sequence(x, torch.tensor([6, 1, 3, 6]), ours.batch_first, enforce_sorted=False)
        for input, state in itertools.product((x, packed), (None, hx)):
            output, finals = ours(input, map_state(lambda s: s.transpose(0, 1), state))
            expected, states = theirs(input, state)
            if input is packed:
                output, expected = output.data, expected.data
            torch.testing.assert_close(output, expected)
            for got, want in zip(tensors(finals), tensors(states), strict=True):
                assert got.is_contiguous()
                torch.testing.assert_close(got, want.transpose(0, 1))
        alone, state = x[0] if ours.batch_first else x[:, 0], map_state(lambda s: s[:, 0], hx)
        assert_equal(results(ours, alone, state), results(theirs, alone, state))


@KIND
def test_state_batch_first_gradients(kind: str) -> None:
    first = build(fastrnn, kind, 3, 5, dtype=torch.float64, state_batch_first=True, **DEEP)
    plain = build(fastrnn, kind, 3, 5, dtype=torch.float64, **DEEP)
    plain.load_state_dict(first.state_dict())
    x, resets = randn(6, 4, 3), torch.rand(6, 4) < 0.3
    hx, fresh = (make_state(kind, 4, 4, hidden=5, seed=seed) for seed in (3, 5))
    found = []
    for module, turn in ((plain, lambda s: s), (first, lambda s: s.transpose(0, 1))):
        states = [leaf(s) for s in (*tensors(hx), *tensors(fresh))]
        given, replaced = states[: len(tensors(hx))], states[len(tensors(hx)) :]
        as_state = (lambda s: tuple(s)) if kind == "LSTM" else (lambda s: s[0])
        output, finals = module(
            x,
            as_state([turn(s) for s in given]),
            lengths=torch.tensor([6, 0, 3, 5]),
            resets=resets,
            reset_state=as_state([turn(s) for s in replaced]),
        )
        module.zero_grad()
        finals = [turn(s) for s in tensors(finals)]
        weighted([output, *finals]).backward()
        found.append([output, *finals, *(s.grad for s in states), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_state_batch_first_bad_states() -> None:
    lstm, gru = fastrnn.LSTM(3, 5, 2, state_batch_first=True), fastrnn.GRU(3, 5, 2, state_batch_first=True)
    x, right, wrong = torch.randn(6, 4, 3), torch.zeros(4, 2, 5), torch.zeros(2, 4, 5)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(4, 2, 5\), got \[2, 4, 5\]"):
        lstm(x, (wrong, right))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(4, 2, 5\), got \[2, 4, 5\]"):
        lstm(x, (right, wrong))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(4, 2, 5\), got \[2, 4, 5\]"):
        gru(x, wrong)
    packed = pack_padded_sequence(x, torch.full((4,), 6))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(4, 2, 5\), got \[2, 4, 5\]"):
        gru(packed, wrong)


# ---- learned initial states ----


@pytest.mark.parametrize("batch_first", [False, True])
@KIND
def test_learned_initial_state(kind: str, batch_first: bool) -> None:
    """The same as passing the parameters, expanded, to torch.nn's module."""
    for H, proj in ((1, 0), (3, 2), (17, 5), (129, 0)) if kind == "LSTM" else ((h, 0) for h in SIZES):
        sizes = {"proj_size": proj} if proj else {}
        options = {"batch_first": batch_first, "dtype": torch.float64, **DEEP, **sizes}
        ours = enlarged(build(fastrnn, kind, 3, H, learn_initial_state=True, **options))
        theirs = build(nn, kind, 3, H, **options)
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "_0_l" not in k})
        learned = {name: leaf(p.clone()) for name, p in ours.named_parameters() if "_0_l" in name}
        layers = [f"l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
        names = "hc" if kind == "LSTM" else "h"
        assert sorted(learned) == sorted(f"{s}_0_{at}" for s in names for at in layers)
        assert all(x.shape == ((proj or H) if name[0] == "h" else H,) for name, x in learned.items())
        stacked = [torch.stack([learned[f"{s}_0_{at}"] for at in layers]) for s in names]
        x = randn(4, 5, 3) if batch_first else randn(5, 4, 3)
        packed = pack_padded_sequence(x, LENGTHS, batch_first, enforce_sorted=False)
        for input, B in ((x, 4), (packed, 4), (x[0], None)):
            states = [s if B is None else s.unsqueeze(1).expand(-1, B, -1) for s in stacked]
            got = results(ours, input)
            theirs.zero_grad()
            for leaf_ in learned.values():
                leaf_.grad = None
            output, finals = theirs(input, tuple(states) if kind == "LSTM" else states[0])
            named = dict(theirs.named_parameters()) | learned
            want = collect(output, finals, {name: named[name] for name, _ in ours.named_parameters()})
            assert_equal(got, want)


@KIND
def test_learned_state_is_the_reset_state(kind: str) -> None:
    """Of a row that resets everywhere the state is the learned one before every step; a state that is passed wins."""
    module = enlarged(build(fastrnn, kind, 3, 5, learn_initial_state=True, dtype=torch.float64))
    x = randn(4, 2, 3)
    resets = torch.ones(4, 2, dtype=torch.bool)
    output, _ = module(x, make_state(kind, 1, 2, hidden=5), resets=resets)
    apart, _ = module(x.reshape(1, 8, 3))
    torch.testing.assert_close(output.reshape(8, 5), apart[0])
    gradients = [torch.autograd.grad(y.sin().sum(), list(module.parameters())) for y in (output, apart)]
    torch.testing.assert_close(*gradients)

    zeros = map_state(torch.zeros_like, make_state(kind, 1, 2, hidden=5))
    output, _ = module(x, zeros, resets=resets, reset_state=zeros)
    plain = build(fastrnn, kind, 3, 5, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_0_l" not in k})
    torch.testing.assert_close(output, plain(x, resets=resets)[0])


def test_learned_state_of_rows_without_steps() -> None:
    module = enlarged(fastrnn.LSTM(3, 5, learn_initial_state=True))
    _, (h, c) = module(torch.randn(4, 2, 3), lengths=torch.tensor([0, 4]))
    assert torch.equal(h[0, 0], module.h_0_l0) and torch.equal(c[0, 0], module.c_0_l0)


@KIND
def test_learned_state_starts_as_zeros(kind: str) -> None:
    """So the module starts as one without it, from the same seed; meta modules are given their values later."""
    torch.manual_seed(3)
    plain = build(fastrnn, kind, 3, 5, **DEEP)
    torch.manual_seed(3)
    learned = build(fastrnn, kind, 3, 5, learn_initial_state=True, **DEEP)
    for name, p in learned.named_parameters():
        assert torch.equal(p, torch.zeros_like(p) if "_0_l" in name else getattr(plain, name))
    x = torch.randn(4, 2, 3)
    assert torch.equal(plain(x)[0], learned(x)[0])
    meta = build(fastrnn, kind, 3, 5, learn_initial_state=True, device="meta", **DEEP)
    assert meta.h_0_l0.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert not meta.h_0_l1_reverse.any() and meta.weight_hh_l0.any()


def test_learned_state_dict() -> None:
    plain, learned = fastrnn.LSTM(3, 5), fastrnn.LSTM(3, 5, learn_initial_state=True)
    assert not any("_0_l" in name for name in plain.state_dict())
    assert set(learned.state_dict()) - set(plain.state_dict()) == {"h_0_l0", "c_0_l0"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"h_0_l0", "c_0_l0"'):
        learned.load_state_dict(plain.state_dict())
    assert learned.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["h_0_l0", "c_0_l0"]
    assert list(map(len, learned.all_weights)) == [4]
    assert learned.double().h_0_l0.dtype == torch.float64


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_learned_state_derivatives(kind: str) -> None:
    module = enlarged(build(fastrnn, kind, 2, 2, bidirectional=True, learn_initial_state=True, dtype=torch.float64))
    x, lengths = randn(3, 3, 2), torch.tensor([3, 0, 2])
    resets = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(parameters, values, strict=True))
        output, finals = functional_call(module, named, (x,), {"lengths": lengths, "resets": resets})
        return output, *tensors(finals)

    values = tuple(parameters.values())
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, values)


def test_learned_state_under_vmap() -> None:
    models = [enlarged(fastrnn.LSTM(3, 5, learn_initial_state=True, dtype=torch.float64)) for _ in range(3)]
    x = randn(6, 4, 3)
    stacked, _ = stack_module_state(models)
    ensemble = vmap(lambda p: functional_call(models[0], p, (x,))[0])({k: v.detach() for k, v in stacked.items()})
    torch.testing.assert_close(ensemble, torch.stack([m(x)[0] for m in models]))
    torch.testing.assert_close(vmap(models[0], 1, (1, 1))(x), models[0](x))


# ---- every c ----


def lstm_by_hand(module: nn.Module, x: Tensor, h: Tensor, c: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """h and c of every step of one layer, [T, B, D*n] each, by a loop over rows and steps; 0 in the padding."""
    every_h, every_c = [], []
    for d, weights in enumerate(module._weights()[0]):
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        rows_h, rows_c = [], []
        for b, length in enumerate(lengths):
            hs, cs = [torch.zeros_like(h[d, b])] * len(x), [torch.zeros_like(c[d, b])] * len(x)
            state = h[d, b], c[d, b]
            for t in reversed(range(length)) if d else range(length):
                i, f, g, o = (w_ih @ x[t, b] + b_ih + w_hh @ state[0] + b_hh).chunk(4)
                after = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                out = o.sigmoid() * after.tanh()
                state = (out if w_hr is None else w_hr @ out), after
                hs[t], cs[t] = state
            rows_h.append(torch.stack(hs))
            rows_c.append(torch.stack(cs))
        every_h.append(torch.stack(rows_h, 1))
        every_c.append(torch.stack(rows_c, 1))
    return torch.cat(every_h, 2), torch.cat(every_c, 2)


@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_c(bidirectional: bool, proj: int) -> None:
    """Values, and the gradients of a loss of h, c, or both, of all arguments; lengths with a 0 among them."""
    D = 2 if bidirectional else 1
    options = {"bidirectional": bidirectional, "proj_size": proj, "dtype": torch.float64}
    for H in (3, 17, 129) if proj else SIZES:
        module = fastrnn.LSTM(3, H, return_all_states=True, **options)
        x, (h, c) = leaf(randn(5, 4, 3)), map_state(leaf, make_state("LSTM", D, 4, hidden=H, proj=proj))
        for lengths in (None, [5, 0, 1, 4]):
            given = None if lengths is None else torch.tensor(lengths)
            got = [(r := module(x, (h, c), lengths=given))[0], r[2]]
            want = lstm_by_hand(module, x, h, c, lengths or [5] * 4)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
            for used in ([0], [1], [0, 1]):
                leaves = [x, h, c, *module.parameters()]
                found = [
                    torch.autograd.grad(weighted([ys[i] for i in used]), leaves, retain_graph=True)
                    for ys in (got, want)
                ]
                torch.testing.assert_close(*found)


@pytest.mark.parametrize("proj", [0, 2])
def test_every_c_batched_gradients(proj: int) -> None:
    module = fastrnn.LSTM(
        3, 5, bidirectional=True, return_all_states=True, proj_size=proj, dtype=torch.float64, token_input=True
    )
    for x in (randn(6, 2, 3), torch.arange(12).reshape(6, 2) % 3):
        state, vectors = map_state(leaf, make_state("LSTM", 2, 2, hidden=5, proj=proj)), randn(4, 6, 2, 10)
        leaves, c = [*state, *module.parameters()], module(x, state)[2]
        got = torch.autograd.grad(c, leaves, vectors, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(c, leaves, v, retain_graph=True) for v in vectors]
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))))


def test_every_c_of_layouts() -> None:
    """Batch first, unbatched, packed, stacked, with resets: the same numbers, laid out as the output is."""
    module = fastrnn.LSTM(3, 5, **DEEP, return_all_states=True)
    x, lengths = torch.randn(5, 4, 3), torch.tensor([5, 2, 1, 4])
    output, (_, c_n), c = module(x, lengths=lengths)
    assert output.shape == c.shape == (5, 4, 10)
    last = fastrnn.pool(c, lengths, bidirectional=True)
    assert torch.equal(last, torch.cat([c_n[-2], c_n[-1]], 1))
    packed, _, packed_c = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert isinstance(packed_c, PackedSequence) and torch.equal(packed_c.batch_sizes, packed.batch_sizes)
    assert torch.equal(pad_packed_sequence(packed_c)[0], c)
    alone = module(x[:, 0])[2]
    assert alone.shape == (5, 10)
    torch.testing.assert_close(alone, c[:, 0])
    first = copy.deepcopy(module)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1), lengths=lengths)[2], c.transpose(0, 1))
    resets = torch.zeros(5, 4, dtype=torch.bool)
    resets[2] = True
    again = module(x, resets=resets)[2]
    torch.testing.assert_close(again, torch.cat([module(x[:2])[2], module(x[2:])[2]]))


def test_every_c_derivatives() -> None:
    module = enlarged(fastrnn.LSTM(2, 2, bidirectional=True, return_all_states=True, dtype=torch.float64))
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    resets = torch.tensor([[0, 0], [1, 0], [0, 0]], dtype=torch.bool)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        options = {"lengths": torch.tensor([3, 2]), "resets": resets}
        output, _, c = functional_call(module, named, (x,), options)
        return output, c

    values = (randn(3, 2, 2).requires_grad_(), *parameters.values())
    assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, values)


def test_every_c_under_vmap() -> None:
    module = fastrnn.LSTM(3, 5, bidirectional=True, return_all_states=True, dtype=torch.float64)
    x = randn(6, 4, 3)
    torch.testing.assert_close(vmap(lambda row: module(row)[2], 1, 1)(x), module(x)[2])
    x.requires_grad_()
    per_row = vmap(grad(lambda row: module(row)[2].sin().sum()), 1, 1)(x)
    torch.testing.assert_close(per_row, torch.autograd.grad(module(x)[2].sin().sum(), x)[0])


@pytest.mark.parametrize("proj", [0, 2])
def test_when_backward_is_fused(proj: int) -> None:
    module, x = fastrnn.LSTM(3, 5, return_all_states=True, proj_size=proj), torch.randn(6, 2, 3)
    with count_calls() as seen:
        output, _, c = module(x)
        (output.sum() + c.detach().sum()).backward()
    assert seen == FUSED
    with count_calls() as seen:
        output, _, c = module(x)
        (output.sum() + c.sum()).backward()
    assert seen == ({"forward": 1, "composite backward": 6} if proj else FUSED)


def test_every_c_of_a_packed_sequence_and_of_lengths_have_the_same_gradients() -> None:
    module = fastrnn.LSTM(3, 5, **DEEP, return_all_states=True, grad_clip=0.1, dtype=torch.float64)
    x, lengths, found = leaf(randn(70, 40, 3)), torch.randint(1, 71, (40,)), []
    for packed in (False, True):
        if packed:
            _, _, c = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            c = pad_packed_sequence(c, total_length=70)[0]
        else:
            c = module(x, lengths=lengths)[2]
        found.append(torch.autograd.grad(weighted([c]), [x, *module.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_c_of_half_types(dtype: torch.dtype) -> None:
    """Of half weights, and under autocast; gradients through c included."""
    x = torch.randn(6, 2, 3)
    wide = fastrnn.LSTM(3, 5, bidirectional=True, return_all_states=True)
    half = copy.deepcopy(wide).to(dtype)
    found = []
    for module, input, cast in ((wide, x, False), (half, x.to(dtype), False), (wide, x, True)):
        with torch.autocast("cpu", dtype, enabled=cast):
            _, _, c = module(input)
        module.zero_grad()
        c.float().sin().sum().backward()
        assert c.dtype == (torch.float32 if len(found) == 0 else dtype)
        found.append([c.float(), *(p.grad.float() for p in module.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.05, atol=30 * torch.finfo(dtype).eps)


def test_every_c_is_the_users() -> None:
    """In-place writing breaks no backward pass, for it is a copy of what backward reads."""
    module = fastrnn.LSTM(3, 5, return_all_states=True)
    for x in (torch.randn(6, 2, 3), torch.randn(1, 1, 3)):
        output, _, c = module(x)
        c.zero_()
        output.sum().backward()


# ---- the constructors ----

ALL: dict[str, Any] = dict.fromkeys(SWITCHES, True)


def test_repr() -> None:
    assert repr(fastrnn.LSTM(3, 5, batch_first=True, **ALL)) == (
        "LSTM(3, 5, batch_first=True, learn_initial_state=True, state_batch_first=True, return_all_states=True, "
        "token_input=True)"
    )
    assert repr(fastrnn.RNN(3, 5, state_batch_first=True)) == "RNN(3, 5, state_batch_first=True)"
    assert repr(fastrnn.GRU(3, 5, learn_initial_state=False)) == "GRU(3, 5)"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_options_are_checked(name: str) -> None:
    cls = getattr(fastrnn, name)
    for option in ("learn_initial_state", "state_batch_first"):
        with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
            cls(3, 5, **{option: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'learn_initial_states'"):
        cls(3, 5, learn_initial_states=True)
    if name == "LSTM":
        with pytest.raises(TypeError, match="return_all_states should be of type bool, got: str"):
            cls(3, 5, return_all_states="yes")
    else:
        with pytest.raises(ValueError, match="return_all_states argument is only supported for LSTM"):
            cls(3, 5, return_all_states=True)


def test_options_are_kept() -> None:
    """By deepcopy, pickle and torch.save; a module that was stored before there were options has them off."""
    module = enlarged(fastrnn.LSTM(3, 5, **ALL))
    x = torch.randn(6, 2, 3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for m in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert repr(m) == repr(module)
        torch.testing.assert_close(m(x), module(x), rtol=0, atol=0)
    plain = fastrnn.LSTM(3, 5)
    assert not set(ALL) & set(vars(plain))  # what a pickle of torch.nn.LSTM's holds, and no more
    assert len(pickle.loads(pickle.dumps(plain))(x)) == 2


COMPILED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tokens-lstm": ("LSTM", {**DEEP, "token_input": True}, True),
    "tokens-gru-batch-first": ("GRU", {"batch_first": True, "token_input": True}, True),
    "learned": ("LSTM", {"learn_initial_state": True, "bidirectional": True}, False),
    "state-batch-first": ("GRU", {"state_batch_first": True, **DEEP}, False),
    "every-c": ("LSTM", {"return_all_states": True, "bidirectional": True}, False),
    "all": ("LSTM", {**ALL, "proj_size": 2}, True),
}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, masked: bool) -> None:
    """fullgraph with dynamic sizes, training: as without."""
    kind, options, tokens = COMPILED[name]
    module = enlarged(build(fastrnn, kind, 11, 5, dtype=torch.float64, **options))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((3, 2), (4, 5)):  # the composite, where c has a gradient, is unrolled
        shape = (B, T) if module.batch_first else (T, B)
        x = random_tokens(*shape, vocabulary=11) if tokens else randn(*shape, 11)
        masks = {"lengths": torch.arange(B), "resets": torch.rand(shape) < 0.3} if masked else {}
        found = []
        for function in (compiled, module):
            leaves = torch.utils._pytree.tree_leaves(function(x, **masks))
            found.append((leaves, torch.autograd.grad(weighted(leaves), list(module.parameters()))))
        torch.testing.assert_close(*found)


def test_compile_step_pool_and_inductor() -> None:
    """With torch's own code generator, inference."""
    module = fastrnn.LSTM(11, 5, learn_initial_state=True, token_input=True)

    def function(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        output, state = module(tokens, lengths=lengths)
        word, state = module.step(tokens[0], fastrnn.detach(state))
        return word, *state, *(fastrnn.pool(output, lengths, how) for how in ("last", "mean", "max"))

    tokens, lengths = random_tokens(6, 3, vocabulary=11), torch.tensor([6, 0, 4])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(tokens, lengths), function(tokens, lengths))


def test_export_tokens() -> None:
    module, tokens = fastrnn.LSTM(11, 5, **ALL), random_tokens(6, 3, vocabulary=11)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    exported = torch.export.export(module, (tokens,), dynamic_shapes={"input": {0: T, 1: B}}).module()
    other = random_tokens(9, 4, vocabulary=11)
    torch.testing.assert_close(exported(other), module(other))


# ---- quantized ----


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@KIND
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    options = {"learn_initial_state": True, "state_batch_first": True, "num_layers": 2}
    module = enlarged(build(fastrnn, kind, 7, 5, **options))
    narrow = fastrnn.quantize(module, dtype)
    x, resets = torch.randn(6, 3, 7), torch.rand(6, 3) < 0.3
    plain = build(fastrnn, kind, 7, 5, num_layers=2)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_0_l" not in k})
    as_state = (lambda s: tuple(s)) if kind == "LSTM" else (lambda s: s[0])
    learned = as_state([s.detach() for s in module._initial_states(3)])
    want, states = fastrnn.quantize(plain, dtype)(x, learned, resets=resets, reset_state=learned)
    got, finals = narrow(x, resets=resets)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(tensors(finals), tensors(states), strict=True))
    state, steps = None, []
    for step, reset in zip(x, resets, strict=True):
        output, state = narrow.step(step, state, resets=reset)
        steps.append(output)
    torch.testing.assert_close(torch.stack(steps), want)
    with pytest.raises(ValueError, match=r"input: expected torch.float32 for quantized weights, got torch.int64"):
        narrow(random_tokens(6, 3, vocabulary=7))


def test_quantized_keeps_no_c() -> None:
    with pytest.raises(ValueError, match=r"expected return_all_states=False, got fastrnn\.LSTM with True"):
        fastrnn.quantize(fastrnn.LSTM(3, 5, return_all_states=True))


# ---- pool ----


def pooled_by_hand(output: Tensor, lengths: list[int], how: str, bidirectional: bool) -> Tensor:
    rows = []
    for b, length in enumerate(lengths):
        steps = output[:length, b]
        if length == 0:
            rows.append(torch.zeros_like(output[0, b]))
        elif how == "last":
            half = output.shape[2] // 2 if bidirectional else output.shape[2]
            rows.append(torch.cat([steps[-1, :half], steps[0, half:]]))
        else:
            rows.append(steps.mean(0) if how == "mean" else steps.max(0).values)
    return torch.stack(rows)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool(how: Any, bidirectional: bool) -> None:
    """Results, and gradients that are exactly 0 in a padding of NaN and inf."""
    for T, N in itertools.product(SIZES, (2, 18, 130)):
        lengths = [T, 0, 1, (T + 1) // 2]
        given = torch.tensor(lengths)
        padding = torch.arange(T)[:, None] >= given
        clean = leaf(randn(T, 4, N))
        want = pooled_by_hand(clean, lengths, how, bidirectional)
        (want_grad,) = torch.autograd.grad(weighted([want]), clean)
        for dirt in (torch.nan, torch.inf):
            dirty = leaf(torch.where(padding[..., None], dirt, clean.detach()))
            for input, options in ((dirty, {}), (dirty.transpose(0, 1), {"batch_first": True})):
                got = fastrnn.pool(input, given.int(), how, bidirectional=bidirectional, **options)
                (got_grad,) = torch.autograd.grad(weighted([got]), dirty)
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(got_grad, want_grad)
                assert (got_grad[padding] == 0).all()
        whole = fastrnn.pool(clean, how=how, bidirectional=bidirectional)
        torch.testing.assert_close(whole, pooled_by_hand(clean, [T] * 4, how, bidirectional))


@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool_of_packed_and_derivatives(how: Any) -> None:
    output = randn(5, 4, 3)
    want = pooled_by_hand(output, LENGTHS.tolist(), how, False)
    for batch_first in (False, True):  # a PackedSequence has no layout
        packed = pack_padded_sequence(output, LENGTHS, enforce_sorted=False)
        torch.testing.assert_close(fastrnn.pool(packed, how=how, batch_first=batch_first), want)
    function = lambda x: fastrnn.pool(x.sin(), torch.tensor([5, 0, 1, 4]), how)  # noqa: E731
    assert gradcheck(function, (output.requires_grad_(),), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (output,))
    torch.testing.assert_close(
        vmap(lambda x, n: fastrnn.pool(x, n, how))(
            torch.stack([output, -output]), torch.stack([LENGTHS, LENGTHS.flip(0)])
        ),
        torch.stack([fastrnn.pool(output, LENGTHS, how), fastrnn.pool(-output, LENGTHS.flip(0), how)]),
    )


def test_pool_last_is_the_final_state() -> None:
    module = fastrnn.GRU(3, 5, **DEEP)
    lengths = torch.tensor([5, 0, 1, 4])
    output, h_n = module(torch.randn(5, 4, 3), lengths=lengths)
    got = fastrnn.pool(output, lengths, bidirectional=True)
    assert torch.equal(got, torch.cat([h_n[-2], h_n[-1]], 1))


def test_pool_of_half_types() -> None:
    """A mean of values whose sum float16 does not hold."""
    output = torch.full((100, 2, 3), 1000, dtype=torch.float16)
    got = fastrnn.pool(output, torch.tensor([100, 70]), "mean")
    assert got.dtype == torch.float16 and (got == 1000).all()


X = torch.zeros(5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, None, "first"), ValueError, "how: expected 'last', 'mean' or 'max', got 'first'"),
        ((X[0],), RuntimeError, r"output: expected 3 dimensions, got \[4, 3\]"),
        ((X[:0], torch.zeros(4, dtype=torch.int64)), RuntimeError, "output: expected at least one step"),
        (([X],), TypeError, "output: expected a tensor or a PackedSequence, got list"),
        ((X.long(),), TypeError, "output: expected a float dtype, got torch.int64"),
        ((X, [5, 5, 5, 5]), TypeError, r"lengths: expected an integer tensor \[4\], got list"),
        ((X, torch.ones(4)), TypeError, "lengths: expected an integer dtype, got torch.float32"),
        ((X, torch.ones(5).long()), RuntimeError, r"lengths: expected \[4\] \(batch\), got \[5\]"),
        ((X, torch.tensor([5, 6, 0, 0])), ValueError, r"lengths: expected values in \[0, 5\], got 6"),
        ((X, torch.tensor([5, 0, -1, 0])), ValueError, r"lengths: expected values in \[0, 5\], got -1"),
        ((pack_padded_sequence(X, torch.tensor([5, 4, 3, 2])), torch.ones(4)), ValueError, "lengths: expected None"),
    ],
    ids=range(11),
)
def test_pool_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastrnn.pool(*arguments)
    if len(arguments) == 1 and error is RuntimeError:
        with pytest.raises(RuntimeError, match="an even last dimension with bidirectional, got 3"):
            fastrnn.pool(X, bidirectional=True)


# ---- detach ----


def test_detach() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    state = {"lstm": (x, x), "gru": x, "list": [None, (x,)]}
    got = fastrnn.detach(state)
    assert type(got["lstm"]) is tuple and type(got["list"]) is list and got["list"][0] is None
    for y in (*got["lstm"], got["gru"], got["list"][1][0]):
        assert not y.requires_grad and y.data_ptr() == x.data_ptr()
    assert fastrnn.detach(None) is None
    pair_of = torch.return_types.max((x, x))
    assert type(fastrnn.detach(PackedSequence(x, torch.tensor([2])))) is PackedSequence
    assert not fastrnn.detach(tuple(pair_of))[0].requires_grad
    (kept,) = fastrnn.detach(type("Cache", (list,), {})([x]))  # its constructor takes one iterable, as list's does
    assert torch.equal(kept, x) and not kept.requires_grad
    with pytest.raises(TypeError, match="state: expected tensors, None, tuples, lists or dicts of them, got float"):
        fastrnn.detach((x, 1.0))


# ---- long sequences ----


@KIND
def test_a_million_steps(kind: str) -> None:
    """Inference over T = 1e6: the end depends on no more than what came shortly before it."""
    T = 1_000_000
    module = build(fastrnn, kind, 2, 3)
    x = torch.randn(T, 1, 2)
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[T - 50] = True
    with torch.no_grad():
        output, finals = module(x, resets=resets)
        short, ends = module(x[-50:])
    assert output.shape == (T, 1, 3) and output.isfinite().all()
    torch.testing.assert_close(output[-50:], short)
    torch.testing.assert_close(finals, ends)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_training_over_many_steps(kind: str) -> None:
    """A step of T = 200,000, far past 65,535: the gradients of 20,000 sequences of 10 steps that are one."""
    T, parts = 200_000, 20_000
    module = build(fastrnn, kind, 2, 3, dtype=torch.float64)
    x = randn(T, 1, 2)
    resets = (torch.arange(T) % (T // parts) == 0)[:, None]
    got = results(module, x, resets=resets)
    split = x.view(parts, T // parts, 2).transpose(0, 1)
    module.zero_grad()
    output, _ = module(split)
    torch.testing.assert_close(output.transpose(0, 1).reshape(T, 1, 3), got["output"])
    weights = randn(T, 1, 3, seed=100).view(parts, T // parts, 3).transpose(0, 1)
    finals = {k: v for k, v in got.items() if k in ("h_n", "c_n")}
    last = module(split[:, -1:])[1]
    loss = (output * weights).sum()
    for i, (name, final) in enumerate(zip(finals, tensors(last), strict=True)):
        torch.testing.assert_close(final, finals[name])
        loss = loss + (final * randn(*final.shape, seed=101 + i)).sum()
    loss.backward()
    for name, p in module.named_parameters():
        want = got[f"grad of {name}"]
        assert (p.grad - want).abs().max() <= TOLERANCE[torch.float64] * want.abs().max().clamp(min=1)


def test_offsets_are_64_bit() -> None:
    """Steps further apart than 2^31 elements. Only the pages that are touched take memory."""
    T, H, apart = 3, 3, 2**30 + 2**20
    try:
        far = torch.empty((T - 1) * apart + H, dtype=torch.float32)
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    gates = far.as_strided((T, 1, H), (apart, H, 1))
    gates.copy_(torch.randn(T, 1, H))
    weight, h_0 = torch.randn(1, H, H), torch.zeros(1, H)
    args = (weight, None, None, h_0, None, None, None, None, None, [False], False)
    near = recurrent_forward("rnn_tanh", gates.contiguous(), *args)
    assert torch.equal(recurrent_forward("rnn_tanh", gates, *args)[0], near[0])
    module = fastrnn.RNN(H, H)
    with torch.no_grad():
        assert torch.equal(module(gates)[0], module(gates.contiguous())[0])


# ---- streaming ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@KIND
def test_chunks_are_the_sequence(kind: str, dtype: torch.dtype) -> None:
    """Fed in chunks of any sizes, states handed on: the outputs of one call. For equal bits see test_streaming.py."""
    for H, B in itertools.product(SIZES, (1, 5, 64)):
        module = build(fastrnn, kind, 3, H, num_layers=2, dtype=dtype)
        x = randn(30, B, 3, dtype=dtype)
        with torch.no_grad():
            whole = module(x)
            outputs, state = [], None
            for chunk in x.split([1, 2, 9, 1, 16, 1]):
                output, state = module(chunk, state)
                outputs.append(output)
        torch.testing.assert_close((torch.cat(outputs), state), whole)
