"""grad_clip against a loop in plain torch, one row and step at a time, whose states pass a clamping identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import reference
from fastrnn.ops import recurrent_backward, recurrent_forward
from tests.helpers import KINDS, build, make_state, randn, tensors
from tests.transform_cases import assert_close, backward_arguments, every_cell, make_case, variants

CLIP = 0.05


class Clamped(torch.autograd.Function):
    """x, whose gradient is clamped."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None


def one_step(kind: str, w: dict[str, Tensor], x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h = states[0]
    ih, hh = w["weight_ih"] @ x + w.get("bias_ih", 0), w["weight_hh"] @ h + w.get("bias_hh", 0)
    if kind.startswith("RNN"):
        return (torch.tanh(ih + hh) if kind == "RNN_TANH" else torch.relu(ih + hh),)
    if kind == "GRU":
        (r, z), n = ((ih + hh).chunk(3)[k].sigmoid() for k in range(2)), ih.chunk(3)[2]
        n = torch.tanh(n + r * hh.chunk(3)[2])
        return (n + z * (h - n),)
    i, f, g, o = (ih + hh).chunk(4)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (w["weight_hr"] @ h if "weight_hr" in w else h, c)


def by_loop(kind, module, input, states, clip, lengths=None, resets=None, fresh=None):
    """input [T, B, I], states [L*D, B, n] each: output [T, B, D*R] and the final states."""
    T, B = input.shape[:2]
    lengths = [T] * B if lengths is None else lengths.tolist()
    layers = module.num_layers
    directions = 2 if module.bidirectional else 1
    finals: list[list[Tensor]] = [[] for _ in states]
    for index in range(layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{index}" + ("_reverse" if direction else "")
            w = {n.removesuffix(suffix): p for n, p in module.named_parameters() if n.endswith(suffix)}
            at = index * directions + direction
            rows = []
            last: list[list[Tensor]] = [[] for _ in states]
            for b in range(B):
                s = tuple(x[at, b] for x in states)
                outs = [s[0].new_zeros(s[0].shape)] * T
                times = range(lengths[b])
                for t in reversed(times) if direction else times:
                    crossed = t + 1 if direction else t
                    if resets is not None and crossed < lengths[b] and resets[crossed, b]:
                        s = tuple(x[at, b] for x in fresh) if fresh else tuple(torch.zeros_like(x) for x in s)
                    s = one_step(kind, w, input[t, b], tuple(Clamped.apply(x, clip) for x in s))
                    outs[t] = s[0]
                rows.append(torch.stack(outs))
                for k, x in enumerate(s):
                    last[k].append(x)
            outputs.append(torch.stack(rows, 1))
            for k, x in enumerate(last):
                finals[k].append(torch.stack(x))
        input = torch.cat(outputs, -1)
    return input, tuple(torch.stack(x) for x in finals)


def compared(kind, module, input, state, clip=CLIP, **sequence):
    """Asserts equal outputs, states and gradients; returns the gradients."""
    leaves = [input, *tensors(state), *tensors(sequence.get("reset_state")), *module.parameters()]
    for x in leaves:
        x.requires_grad_()

    def run(output, finals):
        results = (output, *tensors(finals))
        loss = sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(results))
        return [x.detach() for x in results], torch.autograd.grad(loss, leaves)

    got = run(*module(input, state, **sequence))
    fresh = sequence.get("reset_state")
    want = run(
        *by_loop(
            kind, module, input, tensors(state), clip, sequence.get("lengths"), sequence.get("resets"),
            None if fresh is None else tensors(fresh),
        )
    )  # fmt: skip
    assert_close(got, want)
    return got[1]


def made(kind, I, H, **options):  # noqa: E741
    torch.manual_seed(3)
    return build(fastrnn, kind, I, H, dtype=torch.float64, grad_clip=CLIP, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1, 3, 17, 129])
def test_against_a_loop_that_clamps(kind, hidden):
    """Every width of the last vector; without lengths and with. The clamp changes the gradients."""
    T, B = 6, 3
    module, state = made(kind, 4, hidden), make_state(kind, 1, B, hidden=hidden)
    input = randn(T, B, 4)
    clamped = compared(kind, module, input, state)
    module.grad_clip = None
    free = compared(kind, module, input, state, clip=float("inf"))
    assert not torch.allclose(clamped[0], free[0])
    module.grad_clip = CLIP
    compared(kind, module, input, state, lengths=torch.tensor([4, 0, 6]))


@pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 3)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequences(kind, proj, bidirectional):
    """Lengths, resets, a reset state and layers together, and a packed sequence."""
    T, B, H = 7, 4, 5
    options = dict(proj_size=proj) if proj else {}
    module = made(kind, 3, H, num_layers=2, bidirectional=bidirectional, **options)
    count = 4 if bidirectional else 2
    state = make_state(kind, count, B, hidden=H, proj=proj)
    fresh = make_state(kind, count, B, hidden=H, proj=proj, seed=40)
    input = randn(T, B, 3)
    lengths = torch.tensor([7, 2, 0, 5])
    resets = randn(T, B, seed=5) > 0.6
    compared(kind, module, input, state, lengths=lengths, resets=resets, reset_state=fresh)
    compared(kind, module, input, state, resets=resets)

    lengths = torch.tensor([7, 5, 5, 1])
    leaves = [input, *tensors(state), *module.parameters()]
    packed, of_packed = module(pack_padded_sequence(input, lengths), state)
    padded, of_padded = module(input, state, lengths=lengths)
    padded = pack_padded_sequence(padded, lengths)

    def grads(output, finals):
        return torch.autograd.grad(sum(x.square().sum() for x in (output.data, *tensors(finals))), leaves)

    assert_close(grads(packed, of_packed), grads(padded, of_padded))


@variants()
def test_the_op_is_its_reference(cell, options):
    case = make_case(cell, requires_grad=False, **options)
    args = backward_arguments(case)
    for clip in (0.1, 1e-3):
        assert_close(recurrent_backward(*args, clip), reference.backward(*args, clip))
    changed = not torch.allclose(recurrent_backward(*args, 1e-3)[3], recurrent_backward(*args)[3])
    constant = cell == "lstm_norm" and options.get("h") == 1  # a vector of one unit, normalised
    assert changed or constant or cell == "rnn_relu"  # whose units may all be off


@variants()
def test_the_composite_is_the_op(cell, options):
    case = make_case(cell, **options)

    def grads(forward):
        return torch.autograd.grad(sum(x.sin().sum() for x in forward), case.inputs)

    fused = recurrent_forward(*case.arguments(), True, 0.1)[:3]
    assert_close(grads(fused), grads(reference.forward(*case.arguments(), 0.1)[:3]))
    free = recurrent_forward(*case.arguments(), True)[:3]
    assert_close(grads(free), grads(reference.forward(*case.arguments())[:3]))


# not relu: a step of finite differences from its outputs of 0 crosses the kink
@variants("plain", "everything", "projection-everything", cells=("lstm", "gru", "rnn_tanh"))
def test_double_backward(cell, options):
    """The gradient as a function of its own inputs, clamps and all, differs from itself as its derivative says."""
    case = make_case(cell, **options)
    args = backward_arguments(case, requires_grad=True)
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]

    def function(*given):
        rest = iter(given)
        full = [next(rest) if isinstance(x, Tensor) and x.requires_grad else x for x in args]
        return [x for x in recurrent_backward(*full, 0.1) if x.numel()]

    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_of_a_module(kind):
    """Against the loop's, whose clamp torch differentiates. The second gradients are small: they too are clamped on
    their way through the forward pass, at other places than the loop's."""
    module, state = made(kind, 3, 4), make_state(kind, 1, 2, hidden=4)
    input = randn(4, 2, 3).requires_grad_()
    leaves = [input, *module.parameters()]

    def second(output):
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return [1e6 * x for x in torch.autograd.grad(sum(x.square().sum() for x in first) * 1e-6, leaves)]

    assert_close(second(module(input, state)[0]), second(by_loop(kind, module, input, tensors(state), CLIP)[0]))


@every_cell
def test_transforms(cell):
    """vmap(grad), over rows and over weights, is a loop of grads; grad of a jvp sees the clamp; jvp itself does not."""
    case = make_case(cell, T=4, B=1, reverse=(False,), requires_grad=False)
    names = case.names
    batched = tuple(torch.stack([x, 0.5 * x, -x]) for x in case.inputs)

    def loss(*given):
        return sum(x.sin().sum() for x in recurrent_forward(*case.arguments(*given), True, 0.02)[:1])

    grad = torch.func.grad(loss, tuple(range(len(names))))
    got = torch.func.vmap(grad)(*batched)
    want = [torch.stack(x) for x in zip(*(grad(*(x[k] for x in batched)) for k in range(3)), strict=True)]
    assert_close(list(got), want)
    over_rows = tuple(0 if name in ("gates_ih", "h_0", "c_0") else None for name in names)
    given = [x if dim == 0 else y for x, y, dim in zip(batched, case.inputs, over_rows, strict=True)]
    got = torch.func.vmap(grad, over_rows)(*given)
    want = [grad(*(x[k] if d == 0 else x for x, d in zip(given, over_rows, strict=True))) for k in range(3)]
    assert_close(list(got), [torch.stack(x) for x in zip(*want, strict=True)])

    free = tuple(range(len(names)))

    def composite(*given):
        return sum(x.sin().sum() for x in reference.forward(*case.arguments(*given), 0.02)[:1])

    tangents = tuple(x.cos() for x in case.inputs)
    jvp = torch.func.jvp(loss, case.inputs, tangents)
    unclamped = torch.func.jvp(lambda *x: reference.forward(*case.arguments(*x))[0].sin().sum(), case.inputs, tangents)
    assert_close(jvp, unclamped)
    # forward over reverse: the derivative of the clamped gradient
    got = torch.func.jvp(grad, case.inputs, tangents)[1]
    step = 1e-6
    shifted = [grad(*(x + s * t for x, t in zip(case.inputs, tangents, strict=True))) for s in (step, -step)]
    want = tuple((a - b) / (2 * step) for a, b in zip(*shifted, strict=True))
    assert_close(got, want, 1e-6)
    assert_close(torch.func.grad(composite, free)(*case.inputs), grad(*case.inputs))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell):
    """That the ops take a bound says nothing of a cell; test_export.py has the ops without one, of every cell."""
    case = make_case(cell, T=2, lengths="rows", resets="rows")
    opcheck(recurrent_forward, (*case.arguments(), True, 0.1))
    opcheck(recurrent_backward, (*backward_arguments(case, requires_grad=True), 0.1))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled(kind):
    module = made(kind, 3, 5, bidirectional=True)
    input = randn(6, 2, 3).requires_grad_()
    leaves = [input, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(input)[0].square().sum(), leaves)
    assert_close(got, torch.autograd.grad(module(input)[0].square().sum(), leaves))


def test_nan_stays_and_half_types_run():
    case = make_case("lstm", requires_grad=False, reverse=(False,))
    args = backward_arguments(case)
    args[1] = args[1].clone()
    args[1][-1, 0] = torch.nan
    got = recurrent_backward(*args, 0.1)
    assert got[0][:, 0].isnan().all() and not got[0][:, 1].isnan().any()
    module = fastrnn.GRU(3, 4, grad_clip=0.01, dtype=torch.bfloat16)
    module(torch.ones(9, 2, 3, dtype=torch.bfloat16))[0].sum().backward()
    assert module.weight_hh_l0.grad.isfinite().all()


def test_the_option():
    module = fastrnn.LSTM(3, 4, grad_clip=2)
    assert module.grad_clip == 2.0 and str(module) == "LSTM(3, 4, grad_clip=2.0)"
    assert "grad_clip" not in vars(fastrnn.LSTM(3, 4)) and str(fastrnn.LSTM(3, 4, grad_clip=None)) == "LSTM(3, 4)"
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="grad_clip should be above 0, got"):
            fastrnn.RNN(3, 4, grad_clip=wrong)
    for wrong in ("1", True, torch.ones(())):
        with pytest.raises(TypeError, match="grad_clip should be of type float or None, got:"):
            fastrnn.GRU(3, 4, grad_clip=wrong)
    case = make_case("gru", requires_grad=False)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"recurrent_forward: grad_clip: expected 0 \(none\) or a number above"):
            recurrent_forward(*case.arguments(), False, wrong)
        with pytest.raises(ValueError, match=r"recurrent_backward: grad_clip: expected 0 \(none\) or a number above"):
            recurrent_backward(*backward_arguments(case), wrong)
