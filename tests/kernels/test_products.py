"""The matrix products around a recurrence: the op, its choice of path, and derivatives on either."""

from itertools import product

import pytest
import torch

from fastrnn import products

gemm = torch.ops.fastrnn.gemm.default
SIZES = [
    (1, 1, 1), (3, 17, 129), (129, 3, 17), (100, 600, 300), (7, 64, 700), (33, 1000, 257), (1000, 33, 512),
    (33, 300, 17), (45, 1100, 33),  # long rows of few products, and of more columns than a block has
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [*SIZES, (20, 13, 0), (0, 3, 4), (3, 0, 4)], ids=str)
def test_gemm(sizes, dtype, threads):
    torch.set_num_threads(threads)
    m, n, k = sizes
    for turn_a, turn_b, biased in product((False, True), repeat=3):
        a = torch.randn(k, m, dtype=dtype) if turn_a else torch.randn(m, k, dtype=dtype)
        b = torch.randn(n, k, dtype=dtype) if turn_b else torch.randn(k, n, dtype=dtype)
        bias = torch.randn(n, dtype=dtype) if biased else None
        want = (a.t() if turn_a else a).double() @ (b.t() if turn_b else b).double()
        want = want + (0 if bias is None else bias.double())
        got = gemm(a, b, bias, turn_a, turn_b)
        assert got.shape == (m, n) and got.dtype == dtype
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * epsilon * (k + 8))


def test_gemm_reads_any_layout():
    a, b = torch.randn(60, 90)[:, 20:70], torch.randn(50, 40).t().contiguous().t()
    torch.testing.assert_close(gemm(a, b, None, False, False), a @ b)
    torch.testing.assert_close(
        gemm(a.expand(60, 50), torch.ones(1, 1).expand(50, 9), None, False, False)[:, 3], a.sum(1)
    )


@pytest.mark.parametrize(
    ("a", "b", "bias", "message"),
    [
        (torch.ones(2), torch.ones(2, 2), None, "a and b: expected 2 dimensions each, got [2] and [2, 2]"),
        (torch.ones(2, 3), torch.ones(2, 4), None, "b: expected 3 in dimension 0"),
        (torch.ones(2, 3), torch.ones(3, 4), torch.ones(3), "bias: expected [4], got [3]"),
        (torch.ones(2, 3), torch.ones(3, 4).double(), None, "b: expected Float on cpu (as a is), got Double"),
        (torch.ones(2, 3).half(), torch.ones(3, 4).half(), None, "a: expected float32 or float64, got Half"),
    ],
)
def test_gemm_refuses(a, b, bias, message):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        gemm(a, b, bias, False, False)
    assert message in str(caught.value)


# ---- products of groups ----

GROUPS = [(40, 3, 65, 33), (2, 3, 4, 5), (70, 1, 50, 40), (0, 2, 3, 4), (40, 0, 65, 33)]  # rows, P, m, n


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_grouped_products(sizes, dtype, threads):
    """On the micro-kernel and, small, on ATen's product: with rows apart, and weights that are transposed views."""
    torch.set_num_threads(threads)
    rows, P, m, n = sizes
    input, out = (torch.randn(P, rows, k, dtype=dtype).transpose(0, 1) for k in (n, m))
    bias = torch.randn(P, m, dtype=dtype)
    for weight in (torch.randn(P, m, n, dtype=dtype), torch.randn(P, n, m, dtype=dtype).transpose(1, 2)):
        for given in (None, bias):
            got, want = (f(input, weight, given) for f in (products.grouped_linear, products.linear_by_aten))
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(products.grouped_outer(out, input), products.outer_by_aten(out, input))


@pytest.mark.parametrize("op", [products.grouped_linear, products.grouped_outer], ids=str)
def test_derivatives_of_grouped_products(op):
    """Of any order and in any mode: with rows enough for the micro-kernel, checked by finite differences."""
    shapes = ((33, 2, 3), (2, 4, 3), (2, 4)) if op is products.grouped_linear else ((33, 2, 4), (33, 2, 3))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(op, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: op(*x).sin(), inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(5, 2, 3), torch.ones(2, 4, 4), None), "expected input [rows, P, n], weight [P, m, n]"),
        ((torch.ones(5, 2, 3), torch.ones(2, 4, 3), torch.ones(4)), "and bias [P, m]"),
        ((torch.ones(5, 2, 3), torch.ones(5, 3, 3)), "expected a [rows, P, m] and b [rows, P, n]"),
    ],
)
def test_grouped_products_refuse(arguments, message):
    op = products.grouped_linear if len(arguments) == 3 else products.grouped_outer
    with pytest.raises(RuntimeError) as caught:
        op(*arguments)
    assert message in str(caught.value)


def test_gemm_opcheck():
    for turn_a, turn_b in product((False, True), repeat=2):
        a = torch.randn(5, 3) if turn_a else torch.randn(3, 5)
        b = torch.randn(4, 5) if turn_b else torch.randn(5, 4)
        torch.library.opcheck(gemm, (a, b, torch.randn(4), turn_a, turn_b))


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
def test_products(rows):
    a, b, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((rows, 5), (rows, 17), (5, 3)))
    torch.testing.assert_close(products.transposed_product(a, b), a.t() @ b, rtol=0, atol=1e-13)
    torch.testing.assert_close(products.product(a, c), a @ c, rtol=0, atol=1e-13)


def test_own_kernel_is_taken_where_it_can_be(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_gemm", lambda *args: calls.append(args) or gemm(*args))
    a, b, w = torch.randn(64, 5), torch.randn(64, 3), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        products.transposed_product(a, b)
        products.product(a, w)
    assert len(calls) == 2
    calls.clear()
    for unusual in (
        lambda: products.product(a, w),  # a graph is wanted
        lambda: products.transposed_product(a[:8], b[:8]),
        lambda: products.transposed_product(a.bfloat16(), b.bfloat16()),
        lambda: torch.func.vmap(products.transposed_product)(a.expand(2, 64, 5), b.expand(2, 64, 3)),
        lambda: torch.func.grad(lambda w: products.product(a, w).sum())(w.detach()),
    ):
        unusual()
    with torch.autocast("cpu", torch.bfloat16):
        assert products.transposed_product(a, b).dtype == torch.bfloat16
    assert not calls
