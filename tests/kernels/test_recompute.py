"""recompute: what the module gives without it, from the states of every k-th step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from tests.helpers import (
    KINDS,
    assert_equal,
    build,
    evaluate,
    leaf,
    make_state,
    map_state,
    randn,
    strided,
    tensors,
    threads,
)
from tests.transform_cases import assert_close, count_calls

T, B, I, H = 11, 4, 3, 5  # noqa: E741
KIND_AND_PROJECTION = [*((kind, 0) for kind in KINDS), ("LSTM", 2)]
every_kind = pytest.mark.parametrize(("kind", "proj"), KIND_AND_PROJECTION)


def both(kind, every, **options):
    """(with recompute, without), with equal parameters."""
    if not options.get("proj_size"):
        options.pop("proj_size", None)
    torch.manual_seed(4)
    plain = build(fastrnn, kind, I, H, **{"dtype": torch.float64, **options})
    module = build(fastrnn, kind, I, H, recompute=every, **{"dtype": torch.float64, **options})
    module.load_state_dict(plain.state_dict())
    return module, plain


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sequence", ["plain", "lengths", "resets", "reset state", "all"])
def test_as_without(kind, proj, bidirectional, sequence):
    """Results and every gradient, of two layers; a clamp and a reset on a boundary between segments among them."""
    options = {"lengths": torch.tensor([T, 3, 0, 8])} if sequence in ("lengths", "all") else {}
    count = 4 if bidirectional else 2
    state = make_state(kind, count, B, hidden=H, proj=proj)
    if sequence in ("resets", "reset state", "all"):
        options["resets"] = randn(T, B, seed=3) > 0.3
        options["resets"][[4, 8], 0] = True
    module, plain = both(
        kind, 4, proj_size=proj, num_layers=2, bidirectional=bidirectional, grad_clip=0.5 if sequence == "all" else None
    )

    def run(module):
        fresh = map_state(leaf, make_state(kind, count, B, hidden=H, proj=proj, seed=40))
        more = {"reset_state": fresh} if sequence in ("reset state", "all") else {}
        results = evaluate(module, strided(randn(T, B, I)), state, **options, **more)
        for name, x in zip(("reset_h", "reset_c"), tensors(fresh) if more else (), strict=False):
            results[f"grad of {name}"] = x.grad
        return results

    assert_equal(run(module), run(plain))


@every_kind
@pytest.mark.parametrize("every", [1, 2, 3, 10, 11, 12, 1000])
def test_every_number_of_steps(kind, proj, every):
    module, plain = both(kind, every, proj_size=proj, bidirectional=True)
    assert_equal(evaluate(module, randn(T, B, I)), evaluate(plain, randn(T, B, I)))


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed(kind, proj, bidirectional):
    module, plain = both(kind, 3, proj_size=proj, num_layers=2, bidirectional=bidirectional)
    input = pack_padded_sequence(randn(T, B, I), torch.tensor([4, 11, 1, 7]), enforce_sorted=False)
    state = make_state(kind, 4 if bidirectional else 2, B, hidden=H, proj=proj)
    assert_equal(evaluate(module, input, state), evaluate(plain, input, state))
    one = pack_sequence([randn(1, I)])
    assert_equal(evaluate(module, one), evaluate(plain, one))


@pytest.mark.parametrize("count", [1, 2])
def test_every_bit_from_run_to_run(count):
    module, _ = both("LSTM", 8, bidirectional=True, dtype=torch.float32)
    input = randn(90, 17, I, dtype=torch.float32)
    with threads(count):
        first, second = evaluate(module, input), evaluate(module, input)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_learned_and_batch_first_states(kind):
    options = dict(learn_initial_state=True, state_batch_first=True, batch_first=True, bidirectional=True)
    module, plain = both(kind, 4, **options)
    for each in (module, plain):
        with torch.no_grad():
            for i, x in enumerate(each.parameters()):
                x.copy_(randn(*x.shape, seed=60 + i) * 0.4)
    resets = randn(B, T, seed=3) > 0.3
    assert_equal(evaluate(module, randn(B, T, I), resets=resets), evaluate(plain, randn(B, T, I), resets=resets))


def test_every_c_of_the_last_layer_is_kept():
    module, plain = both("LSTM", 4, num_layers=2, return_all_states=True)

    def run(module):
        output, _, cells = module(randn(T, B, I))
        return [output, cells, *torch.autograd.grad((output * cells).sum(), list(module.parameters()))]

    with count_calls() as calls:
        got = run(module)
    assert_close(got, run(plain))
    assert calls["forward"] == 1 + 2 * 3  # the last layer's, and the first one's segments twice


@pytest.mark.parametrize("needing", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_any_subset_may_need_a_gradient(kind, needing):
    def run(module):
        module.requires_grad_(False)
        input, state = randn(T, B, I), make_state(kind, 1, B, hidden=H)
        named = dict(module.named_parameters()) | {"input": input, "h_0": tensors(state)[0]}
        output, finals = module(input.requires_grad_(needing == "input"), state) if needing == "input" else (None, None)
        if output is None:
            named[needing].requires_grad_()
            output, finals = module(input, state)
        return torch.autograd.grad(tensors(finals)[-1].sum() + output.sum(), named[needing])

    module, plain = both(kind, 4)
    assert_close(run(module), run(plain))


def test_an_unused_result_and_no_rows():
    module, plain = both("LSTM", 4, bidirectional=True)
    for pick in (lambda y: y[0], lambda y: y[1][0], lambda y: y[1][1]):
        want = torch.autograd.grad(pick(plain(randn(T, B, I))).sum(), list(plain.parameters()))
        assert_close(torch.autograd.grad(pick(module(randn(T, B, I))).sum(), list(module.parameters())), want)
    output = module(randn(T, 0, I))[0]
    assert output.shape == (T, 0, 2 * H)
    output.sum().backward()
    assert not module.weight_hh_l0.grad.any()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_double_backward(kind):
    """Of arguments that are made of one another, too."""
    module, plain = both(kind, 4)

    def second(module):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        weights = {name: x * scale for name, x in module.named_parameters()}
        input = randn(T, B, I) * weights["weight_hh_l0"].mean()
        output = torch.func.functional_call(module, weights, (input,))[0]
        leaves = [scale, *module.parameters()]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)]

    assert_close(second(module), second(plain))


def test_batched_gradients():
    module, plain = both("GRU", 4)
    vectors = randn(3, T, B, H)

    def run(module):
        output = module(randn(T, B, I))[0]
        return torch.autograd.grad(output, list(module.parameters()), vectors, is_grads_batched=True)

    assert_close(run(module), run(plain))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_transforms_recompute_nothing_but_run(kind):
    module, plain = both(kind, 4)
    weights = {name: x.detach() for name, x in module.named_parameters()}

    def loss(module):
        return lambda w, x: torch.func.functional_call(module, w, (x[:, None],))[0].square().sum()

    def gradients(module):
        return torch.func.vmap(torch.func.grad(loss(module)), (None, 1))(weights, randn(T, B, I))

    assert_close(gradients(module), gradients(plain))
    tangents = {name: x.cos() for name, x in weights.items()}
    got, want = (
        torch.func.jvp(lambda w, m=m: loss(m)(w, randn(T, I)), (weights,), (tangents,)) for m in (module, plain)
    )
    assert_close(got, want)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = randn(T, B, I)
    got = torch.autograd.grad(compiled(input)[0].square().sum(), list(module.parameters()))
    assert_close(got, torch.autograd.grad(plain(input)[0].square().sum(), list(plain.parameters())))


@every_kind
@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_is_recomputed_where_there_are_no_kernels(monkeypatch, kind, proj, bidirectional):
    """On a device that no kernel of ours knows the network is the reference's, once."""
    module, plain = both(kind, 4, proj_size=proj, num_layers=2, bidirectional=bidirectional)
    state = make_state(kind, 4 if bidirectional else 2, B, hidden=H, proj=proj)
    masks = dict(lengths=torch.tensor([T, 3, 0, 8]), resets=randn(T, B, seed=3) > 0.3)
    want = evaluate(plain, randn(T, B, I), state, **masks)
    monkeypatch.delitem(fastrnn.fallback.KERNELS, "cpu")
    with count_calls() as calls:
        assert_equal(evaluate(module, randn(T, B, I), state, **masks), want)
    assert calls["composite forward"] == 2 * T and "forward" not in calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_autocast_and_tokens(dtype):
    module, plain = both("GRU", 4, dtype=dtype)
    input = randn(T, B, I, dtype=dtype)
    assert_equal(evaluate(module, input), evaluate(plain, input), 0.02)
    module, plain = both("LSTM", 4, dtype=torch.float32, bidirectional=True, token_input=True)
    input = randn(T, B, I, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(evaluate(module, input), evaluate(plain, input), 0.05)

    def of_tokens(module):
        output, finals = module(torch.arange(T * B).reshape(T, B) % I)
        return torch.autograd.grad(output.sum() + finals[0].square().sum(), list(module.parameters()))

    torch.testing.assert_close(of_tokens(module), of_tokens(plain))


@pytest.mark.parametrize(("kind", "limit"), [("LSTM", 0.2), ("GRU", 0.2)])
def test_what_is_kept(kind, limit):
    """Bytes that the graph holds between the passes."""

    def kept(module):
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = module(randn(256, B, I))[0]
        output.sum().backward()
        return sum(storages.values())

    module, plain = both(kind, 16)
    assert kept(module) < limit * kept(plain)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("changed", ["input", "h_0", "weight_hh_l0", "resets"])
def test_what_changed_since_is_noticed(tokens, changed):
    module, _ = both("LSTM", 4, token_input=tokens)
    given = {"input": torch.arange(T * B).reshape(T, B) % I if tokens else randn(T, B, I)}
    state = make_state("LSTM", 1, B, hidden=H)
    given |= {"h_0": state[0], "resets": randn(T, B) > 0, **dict(module.named_parameters())}
    output = module(given["input"], state, resets=given["resets"])[0]
    with torch.no_grad():
        given[changed].copy_(given[changed].flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("tokens", [False, True])
def test_bad_input_as_without(tokens):
    """Segments see parts of it alone, and checkpoints cast."""
    input = torch.zeros(T, B, dtype=torch.long) if tokens else randn(T, B, I)
    for module in both("LSTM", 4, token_input=tokens):
        for wrong in (T + 1, -1):
            with pytest.raises(ValueError, match=rf"lengths: expected values in \[0, {T}\], got {wrong}"):
                module(input, lengths=torch.tensor([T, 1, wrong, 2]))
        with pytest.raises(RuntimeError, match=r"hx\[0\]: expected torch.float64 .*, got torch.float32"):
            module(input, make_state("LSTM", 1, B, hidden=H, dtype=torch.float32))


def test_without_gradients_it_is_one_call():
    module, _ = both("LSTM", 4)
    with count_calls() as calls, torch.no_grad():
        module(randn(T, B, I))
    assert calls["forward"] == 1


def test_the_option():
    module = fastrnn.GRU(3, 4, recompute=16, grad_clip=0.5)
    assert module.recompute == 16 and str(module) == "GRU(3, 4, grad_clip=0.5, recompute=16)"
    assert "recompute" not in vars(fastrnn.GRU(3, 4, recompute=0))
    with pytest.raises(ValueError, match=r"recompute should be 0 \(off\) or a number of steps, got -1"):
        fastrnn.LSTM(3, 4, recompute=-1)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match="recompute should be of type int, got:"):
            fastrnn.RNN(3, 4, recompute=wrong)


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_many_segments_of_half_types_add_up(kind, how):
    """Their gradients' sum in a half type would stop growing: 0.2 to 0.6 off, where one segment is 0.003 off."""
    T = 1000
    module, plain = both(kind, 1, dtype=torch.float32)
    x, grad = randn(T, B, I).float(), randn(T, B, H, seed=5).float() + 0.5
    if how != "autocast":
        module, plain, x = (y.to(getattr(torch, how)) for y in (module, plain, x))

    def run(module):
        around = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        with around:
            output = module(x)[0]
        return torch.autograd.grad(output, list(module.parameters()), grad.to(output.dtype))

    for a, b in zip(run(module), run(plain), strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()
