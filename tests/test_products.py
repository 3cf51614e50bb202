"""The matrix products around a recurrence: the op, its choice of path, and derivatives on either."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastrnn import products

gemm = torch.ops.fastrnn.gemm.default
SIZES = [(1, 1, 1), (3, 17, 129), (129, 3, 17), (100, 600, 300), (7, 64, 700), (33, 1000, 257), (1000, 33, 512)]


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


def test_gemm_opcheck():
    for turn_a, turn_b in product((False, True), repeat=2):
        a = torch.randn(5, 3) if turn_a else torch.randn(3, 5)
        b = torch.randn(4, 5) if turn_b else torch.randn(5, 4)
        torch.library.opcheck(gemm, (a, b, torch.randn(4), turn_a, turn_b))


@pytest.mark.parametrize("batch_major", [False, True])
@pytest.mark.parametrize("needed", list(product((False, True), repeat=3)), ids=str)
def test_linear_equals_atens(needed, batch_major):
    x = torch.randn(5, 20, 7, dtype=torch.float64)
    x = x.transpose(0, 1) if batch_major else x
    inputs = [x, torch.randn(9, 7, dtype=torch.float64), torch.randn(9, dtype=torch.float64)]
    leaves = [i.detach().requires_grad_(n) for i, n in zip(inputs, needed, strict=True)]
    got, want = products.linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == any(needed)
    if batch_major:
        assert got.transpose(0, 1).is_contiguous()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if wanted:
        weight = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, wanted, weight), torch.autograd.grad(want, wanted, weight))


def test_linear_higher_derivatives():
    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert x.shape[0] * x.shape[1] >= products._FEWEST_ROWS
    torch.autograd.gradcheck(products.linear, (x, w, b))
    torch.autograd.gradgradcheck(products.linear, (x, w, b))
    direction = torch.randn_like(x)
    got = torch.func.jvp(lambda x: products.linear(x, w, b), (x,), (direction,))
    torch.testing.assert_close(got, torch.func.jvp(lambda x: F.linear(x, w, b), (x,), (direction,)))


def test_own_kernel_is_taken_where_it_can_be(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_gemm", lambda *args: calls.append(args) or gemm(*args))
    x, w = torch.randn(8, 8, 3), torch.randn(5, 3, requires_grad=True)
    products.linear(x, w, None).sum().backward()
    assert len(calls) == 2  # forward and the weight's gradient; the input needs none
    calls.clear()
    for unusual in (
        lambda: products.linear(x[:2, :2], w, None),
        lambda: products.linear(x.bfloat16(), w.bfloat16(), None),
        lambda: torch.func.vmap(lambda x: products.linear(x, w, None))(x.expand(2, 8, 8, 3)),
        lambda: torch.func.grad(lambda w: products.linear(x, w, None).sum())(w.detach()),
    ):
        unusual()
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, w, None).dtype == torch.bfloat16
    assert not calls
