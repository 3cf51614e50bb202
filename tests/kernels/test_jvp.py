"""Forward-mode AD by the kernels on dual numbers: of results, and of gradients (forward over reverse), against
reference.py, which torch differentiates."""

from itertools import cycle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, jvp
from torch.nn.utils.rnn import PackedSequence

from fastrnn import ops, products, reference
from tests.helpers import KINDS, pair, randn
from tests.kernels.test_kernels import (
    BACKWARD_NAMES,
    CONSTANTS,
    FORWARD_NAMES,
    TOLERANCE,
    Case,
    assert_near,
    backward_arguments,
    cells_with_projection,
    double,
)
from tests.transform_cases import count_calls, loss_of, make_case

NAMES = [f"{kind} {name}" for kind in ("", "tangent of") for name in FORWARD_NAMES + BACKWARD_NAMES]
FUSED = {"forward jvp": 1, "backward jvp": 1}


def derivatives(case: Case, seed: int, constant: tuple[str, ...], exact: bool):
    """Results of both ops, and their tangents; exact: of the reference, in float64. constant: without a tangent."""
    arguments = case.arguments(seed)
    output, _, _, saved = ops.recurrent_forward(*arguments.values(), True)
    _, *grads = backward_arguments(arguments, output, saved, seed)[:4]
    given = arguments | dict(zip(("grad_output", "grad_h_n", "grad_c_n"), grads, strict=True))
    if exact:
        given = {name: double(x) for name, x in given.items()}
    leaves = {k: x for k, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves = {k: x for k, x in leaves.items() if k not in CONSTANTS and k not in constant}
    forward, backward = (
        (reference.forward, reference.backward)
        if exact
        else (lambda *args: ops.recurrent_forward(*args, True), ops.recurrent_backward)
    )

    def both(*values):
        now = given | dict(zip(leaves, values, strict=True))
        results = forward(*(now[name] for name in arguments))
        rest = [now[k] for k in arguments if k not in ("cell", "gates_ih", "bias_hh")]
        return *results, *backward(case.cell, *(now[k] for k in list(given)[-3:]), *rest, results[0], results[3])

    tangents = tuple(randn(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(leaves.values()))
    found, along = jvp(both, tuple(leaves.values()), tangents)
    return *found, *along


def check(case: Case, seed: int = 0, constant: tuple[str, ...] = ()) -> None:
    with count_calls() as calls:
        got = derivatives(case, seed, constant, exact=False)
    assert calls == FUSED | {"forward": 1}
    want = derivatives(case, seed, constant, exact=True)
    assert_near(got, want, 50 * TOLERANCE[case.dtype], NAMES, case)


WAYS = [("", "", ""), ("rows", "state", "all"), ("groups", "groups", "expected")]  # lengths, resets, noise


@pytest.mark.parametrize(("cell", "projected"), cells_with_projection())
def test_odd_sizes(cell, projected):
    for (B, h), way in zip([(1, 3), (17, 1), (3, 17), (129, 3), (3, 129)], cycle(WAYS), strict=False):
        if projected < h:
            lengths, resets, noise = way
            check(Case(cell, 4, B, 1 + B % 2, h, projected, lengths, resets, noise=noise), seed=B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ops.CELLS)
def test_narrower_types_and_constant_weights(cell, dtype):
    lengths, resets, noise = WAYS[1]
    for constant in ((), ("weight_hh",)):
        case = Case(cell, 12, 40, 1, 64, 0, lengths, resets, dtype=dtype, noise=noise)
        check(case, constant=constant)


def test_what_has_no_kernel_is_composed():
    """Tangents that have tangents; grad_clip has one, which does not clamp forward."""
    case = make_case("gru", requires_grad=False)

    def calls_of(function, inputs):
        with count_calls() as calls:
            found = function(*inputs)
        return calls, found

    def along(function):
        return lambda *x: jvp(function, x, tuple(t.cos() for t in x))[1]

    calls, found = calls_of(along(along(case.fused)), case.inputs)
    assert "forward jvp" not in calls and calls["composite forward"]
    torch.testing.assert_close(found, along(along(case.composite))(*case.inputs))


# ---- modules ----


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_vector_products(kind):
    """Forward over reverse, and the double backward, which differentiates the layer's own op."""
    ours, _ = pair(kind, 5, 9, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = randn(6, 3, 5)
    masks = {"lengths": torch.tensor([6, 2, 4]), "resets": randn(6, 3, seed=3) > 0.6}
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    along = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(weights.items())}, randn(*x.shape, seed=50)

    def loss(weights, x):
        return loss_of(lambda: functional_call(ours, weights, (x,), masks))()

    with count_calls() as calls:
        (of_weights, of_x) = jvp(grad(loss, (0, 1)), (weights, x), along)[1]
    assert calls == {name: 2 * count for name, count in FUSED.items()}

    leaves = [*ours.parameters(), x.clone().requires_grad_()]
    first = torch.autograd.grad(loss_of(lambda: ours(leaves[-1], **masks))(), leaves, create_graph=True)
    directions = [*along[0].values(), along[1]]
    product = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    for a, b in zip([*of_weights.values(), of_x], torch.autograd.grad(product, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "RNN_TANH"])
def test_reverse_over_forward(kind, packed):
    """Weights that require grad at the same time: a loss of the tangents, too, as of a network that solves a
    differential equation; against torch.nn, by either of torch's ways to ask for tangents."""
    ours, theirs = pair(kind, 3, 4, num_layers=2, dtype=torch.float64)
    sizes = (10, 3) if packed else (5, 3, 3)
    x, v = randn(*sizes), randn(*sizes, seed=1)

    def run(module, x):
        if not packed:
            return module(x)[0]
        return module(PackedSequence(x, torch.tensor([3, 3, 2, 1, 1])))[0].data

    def by_level(module):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(module, forward_ad.make_dual(x, v)))

    def by_function(module):
        return jvp(lambda x: run(module, x), (x,), (v,))

    def results(module, way):
        y, t = way(module)
        return y, t, *torch.autograd.grad(y.sin().sum() + t.square().sum(), list(module.parameters()))

    ways = (by_level,) if packed else (by_level, by_function)  # torch.nn has no packed one under torch.func
    for way in ways:
        with count_calls() as calls:
            found = results(ours, way)
        assert set(calls) <= {"forward", "backward", "forward jvp", "backward jvp"} and calls["forward jvp"] == 4
        torch.testing.assert_close(found, results(theirs, way), rtol=0, atol=1e-11)


def without_memory(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_hh", without_memory, "weight_hh: .* out of bounds for storage of size 0"),
        ("tangent_h_0", without_memory, "h_0: .* out of bounds for storage of size 0"),
        ("keep_h", without_memory, "keep_h: .* out of bounds for storage of size 0"),
        ("tangent_h_0", lambda x: x[:1], r"tangent of h_0: expected \[3, 4\] of Double, got \[1, 4\] of Double"),
        ("tangent_h_0", torch.Tensor.float, r"tangent of h_0: expected \[3, 4\] of Double, got \[3, 4\] of Float"),
        ("params", lambda _: None, "tangent of params: expected none, as there is no params, got one"),
    ],
)
def test_wrong_tangents_of_the_op(name, change, message):
    given = Case("lstm_peephole", 2, 3, 1, 4, noise="zoneout").arguments()
    given |= {f"tangent_{k}": x.cos() for k, x in given.items() if isinstance(x, torch.Tensor) and k not in CONSTANTS}
    given |= {name: change(given[name]), "save": True, "grad_clip": 0.0}
    op = ops.recurrent_forward_jvp
    with pytest.raises(RuntimeError, match=f"^recurrent_forward_jvp: {message}"):
        op(*(given.get(k) for k in ops.names_of(op)))


def test_products_of_float16_are_made_in_float32():
    """ATen's are ten times slower; each result is rounded once, forward, along a tangent and backward."""
    input, weight, bias = (
        randn(*sizes, seed=i, dtype=torch.float16) for i, sizes in enumerate([(6, 3, 65), (9, 65), (9,)])
    )
    wide = [x.float() for x in (input, weight, bias)]
    functional = torch.nn.functional.linear
    assert torch.equal(products.linear(input, weight, bias), functional(*wide).half())
    a, b = randn(70, 5, dtype=torch.float16), randn(70, 6, dtype=torch.float16)
    with torch.no_grad():
        for mine, want in [
            (products.transposed_product(a, b), a.double().t() @ b.double()),
            (products.product(a.t(), b), a.double().t() @ b.double()),
            (products.outer_products(a[:, None], b[:, None])[0], a.double().t() @ b.double()),
        ]:
            torch.testing.assert_close(mine.double(), want, rtol=6e-4, atol=1e-3)
    along = tuple(torch.ones_like(x) for x in (input, weight, bias))
    found = jvp(products.linear, (input, weight, bias), along)[1]
    torch.testing.assert_close(found, jvp(functional, tuple(wide), tuple(x.float() for x in along))[1].half())
