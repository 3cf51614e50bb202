"""Calls of modules that C++ makes alone (csrc/torch/module_call.cpp): same bits as by network.py, and only where
nothing asks for more."""

import contextlib
import functools
import itertools
import threading
import time
from itertools import product

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, modules
from tests.helpers import CELL_KINDS, KINDS, LIKE_GRU, assert_equal, build, make_state, map_state, randn, tensors

normal = functools.partial(randn, dtype=torch.float32)

MODULES = [
    *((kind, {}) for kind in (*KINDS, *LIKE_GRU)),
    ("LSTM", {"proj_size": 5}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM", {"bidirectional": True, "proj_size": 5}),
    ("GRU", {"bidirectional": True}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"peephole": True, "proj_size": 5}),
    ("LSTM", {"layer_norm": True}),
    ("GRU", {"layer_norm": True, "bidirectional": True}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {"num_heads": 3}),
    ("GRU", {"num_heads": 3, "bidirectional": True}),
    ("LSTM", {"num_heads": 3, "bidirectional": True, "peephole": True}),
    ("LSTM", {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.4}),
    ("LSTM", {"zoneout": 0.3, "recurrent_dropout": 0.2, "num_heads": 3, "bidirectional": True}),
    ("GRU", {"zoneout": 0.3, "layer_norm": True}),
]
of_every_module = pytest.mark.parametrize(("kind", "options"), MODULES, ids=str)


def module_calls(kind, options, dtype):
    """Modules with these options, and of each an input and states or None."""
    hidden, directions = 17 * options.get("num_heads", 1), 1 + options.get("bidirectional", False)
    for layers, bias, batch_first, given, (T, B) in product(
        (1, 3), (True, False), (True, False), (True, False), ((1, 1), (1, 17), (30, 3))
    ):
        if options.get("layer_norm") and not bias:
            continue
        shape = {"num_layers": layers, "bias": bias, "batch_first": batch_first, "dtype": dtype}
        module = build(fastrnn, kind, 9, hidden, **shape, **options)
        input = normal(*((B, T) if batch_first else (T, B)), 9, dtype=dtype)
        hx = None
        if given:
            sizes = {"hidden": hidden, "proj": options.get("proj_size", 0)}
            hx = make_state(kind, layers * directions, B, dtype=dtype, **sizes)
        yield module, input, hx


@pytest.fixture
def by_network(monkeypatch):
    """Runs a function whose modules call network.py."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(_C, "module_forward", lambda *call: None)
            return function(*args, **kwargs)

    return run


@pytest.fixture
def calls(monkeypatch):
    """Whether C++ made each call."""
    taken, module_forward = [], _C.module_forward

    def spy(*args):
        found = module_forward(*args)
        taken.append(isinstance(found, tuple))
        return found

    monkeypatch.setattr(_C, "module_forward", spy)
    return taken


def flat(results):
    return [x for each in tensors(results) for x in tensors(each)]


def assert_same_bits(a, b):
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)


def compare(by_network, function, *args, **kwargs):
    """By C++ alone and by network.py, which draw the same."""
    torch.manual_seed(0)
    got, next_draw = function(*args, **kwargs), torch.rand(())
    torch.manual_seed(0)
    assert_same_bits(got, by_network(function, *args, **kwargs))
    assert torch.equal(next_draw, torch.rand(()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@of_every_module
def test_same_bits(kind, options, dtype, mode, by_network, calls):
    for training, (module, input, hx) in zip(itertools.cycle((True, False)), module_calls(kind, options, dtype)):
        with mode():
            compare(by_network, module.train(training), input, hx)
    assert len(calls) == (24 if "layer_norm" in options else 48) and all(calls)


def step(module, input, hx, options):
    """Results, and the gradients of all of them by everything."""
    leaves = [x.detach().requires_grad_() for x in (input, *tensors(hx))]
    given = () if hx is None else (tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1],)
    results = [x for x in flat(module(leaves[0], *given, **options)) if x is not None and x.is_floating_point()]
    leaves += module.parameters()
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, weights, allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@of_every_module
def test_same_bits_of_training(kind, options, dtype, by_network, calls):
    for module, input, hx in module_calls(kind, options, dtype):
        compare(by_network, step, module, input, hx, {})
    assert len(calls) == (24 if "layer_norm" in options else 48) and all(calls)


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_same_bits_of_training_cells(kind, by_network, calls):
    for B, bias, given in product((1, 17, 40), (True, False), (True, False)):
        module = build(fastrnn, kind, 9, 17, bias=bias)
        hx = make_state(kind, B, hidden=17, dtype=torch.float32) if given else None
        input = normal(B, 9)
        assert_same_bits(step(module, input, hx, {}), by_network(step, module, input, hx, {}))
    assert len(calls) == 12 and all(calls)


@pytest.mark.parametrize("option", ["lengths", "resets", "grad_clip", "packed"])
def test_same_bits_of_training_with_options(option, by_network, calls):
    """Lengths and packed sequences go by network.py either way; the rest need not."""
    for kind in ("LSTM", "GRU"):
        module = build(fastrnn, kind, 9, 17, num_layers=2, **({"grad_clip": 0.01} if option == "grad_clip" else {}))
        input, lengths, options = normal(7, 4, 9), torch.tensor([7, 5, 2, 1]), {}
        if option in ("lengths", "resets"):
            options[option] = lengths if option == "lengths" else torch.rand(7, 4) < 0.4

        def packed(x, *hx, module=module):
            return module(pack_padded_sequence(x, lengths), *hx)

        called = packed if option == "packed" else module
        called.parameters = module.parameters
        hx = make_state(kind, 2, 4, hidden=17, dtype=torch.float32)
        assert_same_bits(step(called, input, hx, options), by_network(step, called, input, hx, options))
    assert calls == ([] if option == "lengths" else [option != "packed"] * 2)


def test_training_gives_what_torch_expects(by_network):
    """Only what is asked for, double backward, checkpoints, hooks, modes, and nothing kept after the pass."""
    module, x = build(fastrnn, "LSTM", 3, 5, num_layers=2), normal(4, 2, 3)
    module.weight_hh_l0.requires_grad_(False)
    module.bias_ih_l1.requires_grad_(False)
    module(x)[0].sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == ["weight_hh_l0", "bias_ih_l1"]
    assert x.grad is None
    module.requires_grad_().zero_grad()
    x.requires_grad_()

    def double(call):
        (g,) = torch.autograd.grad(call(x)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *module.parameters()])

    torch.testing.assert_close(double(module), by_network(double, module))
    plain = torch.autograd.grad(module(x)[0].sin().sum(), x)
    for how in (
        lambda: torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False),
        lambda: module.__call__(x)[0],
    ):
        with torch.autograd.graph.save_on_cpu():
            y = how()
        assert_same_bits(torch.autograd.grad(y.sin().sum(), x), plain)
    with _Ones():
        y = module(x)[0]
    assert_same_bits(torch.autograd.grad(y.sin().sum(), x), plain)
    y = module(x)[0].sin().sum()
    with _Ones():
        assert_same_bits(torch.autograd.grad(y, x), plain)
    y = module(x)[0]
    module.weight_hh_l0.data.add_(0)  # no version
    with torch.no_grad():
        module.weight_hh_l1.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    batched = torch.autograd.grad(
        module(x)[0], x, torch.eye(8).view(8, 4, 2, 1).expand(8, 4, 2, 5), is_grads_batched=True
    )
    torch.testing.assert_close(batched[0][3], torch.autograd.grad(module(x)[0][1, 1].sum(), x)[0])


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_cells_step_is_one_node(kind, by_network):
    """And that does all that views around a node did: every order, batched, hooked, and it sees what was changed."""
    module, x = build(fastrnn, kind, 3, 5), normal(2, 3).requires_grad_()
    hx = map_state(torch.Tensor.requires_grad_, make_state(kind, 2, hidden=5, dtype=torch.float32))
    leaves = [x, *tensors(hx), *module.parameters()]

    def loss():
        return sum(y.sin().sum() for y in tensors(module(x, hx)))

    after = tensors(module(x, hx))
    assert len({y.grad_fn for y in after}) == 1
    edges = [node for node, _ in after[0].grad_fn.next_functions if node is not None]
    assert all(node.variable is of for node, of in zip(edges, [x, *module.parameters(), *tensors(hx)], strict=True))
    assert not any(y._is_view() for y in after)

    def penalty():
        first = torch.autograd.grad(loss(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        return [*second, *torch.autograd.grad(sum(g.square().sum() for g in second), leaves)]

    torch.testing.assert_close(penalty(), by_network(penalty))
    plain = torch.autograd.grad(loss(), leaves)
    with torch.autograd.graph.save_on_cpu():
        hooked = loss()
    assert_same_bits(torch.autograd.grad(hooked, leaves), plain)
    checked = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(checked, leaves), plain)
    rows = torch.eye(10).view(10, 2, 5)
    batched = torch.autograd.grad(after[-1], leaves, rows, is_grads_batched=True, retain_graph=True)
    for row, *each in zip(rows, *batched, strict=True):
        torch.testing.assert_close(each, list(torch.autograd.grad(after[-1], leaves, row, retain_graph=True)))
    for changed in (x, *tensors(hx)):
        y = loss()
        with torch.no_grad():
            changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_same_bits_of_cells(kind, bias, by_network, calls):
    for B, given in product((1, 17, 40), (True, False)):
        module = build(fastrnn, kind, 9, 17, bias=bias)
        hx = make_state(kind, B, hidden=17, dtype=torch.float32) if given else None
        with torch.no_grad():
            assert_same_bits(module(normal(B, 9), hx), by_network(module, normal(B, 9), hx))
    assert len(calls) == 6 and all(calls)


@of_every_module
def test_same_bits_with_resets(kind, options, by_network, calls):
    """Some steps, some steps by other strides, and all: each in a third of the calls, and with every size."""
    for i, (module, input, hx) in enumerate(module_calls(kind, options, torch.float32)):
        sizes = input.shape[:2]
        resets = torch.ones(sizes).bool()
        if (i + i // 3) % 3:
            resets = torch.rand(sizes) < 0.5 if (i + i // 3) % 3 == 1 else (torch.rand(sizes[::-1]) < 0.5).t()
        with torch.no_grad():
            compare(by_network, module, input, hx, resets=resets)
        with_resets = {"resets": resets}
        compare(by_network, step, module, input, hx, with_resets)
        zeros = None if hx is None else map_state(torch.zeros_like, hx)
        torch.manual_seed(0)
        plain = step(module, input, hx, with_resets)
        torch.manual_seed(0)
        assert_same_bits(plain, by_network(step, module, input, hx, with_resets | {"reset_state": zeros}))
    assert len(calls) == (24 if "layer_norm" in options else 48) * 3 and all(calls)


def test_quantized_options_go_by_network(by_network, calls):
    """What C++ knows of narrow weights has neither params nor groups."""
    for options in ({"peephole": True}, {"layer_norm": True}, {"num_heads": 3}, {"bidirectional": True}):
        for dtype in fastrnn.quantized.DTYPES:
            module, input = fastrnn.quantize(build(fastrnn, "LSTM", 9, 51, **options), dtype), normal(30, 3, 9)
            assert_same_bits(module(input), by_network(module, input))
    assert calls == [False] * 8


@pytest.mark.parametrize("dtype", fastrnn.quantized.DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 5)])
def test_same_bits_of_narrow_weights(kind, proj, dtype, by_network, calls):
    options = {"proj_size": proj} if proj else {}
    for layers, bias, batch_first, given, (T, B) in product(
        (1, 3), (True, False), (True, False), (True, False), ((1, 1), (1, 17), (30, 3))
    ):
        module = fastrnn.quantize(
            build(fastrnn, kind, 9, 17, num_layers=layers, bias=bias, batch_first=batch_first, **options), dtype
        )
        input = normal(*((B, T) if batch_first else (T, B)), 9)
        hx = make_state(kind, layers, B, hidden=17, proj=proj, dtype=torch.float32) if given else None
        resets = torch.rand(input.shape[:2]) < 0.5 if layers == 1 else None
        assert_same_bits(module(input, hx, resets=resets), by_network(module, input, hx, resets=resets))
    assert len(calls) == 48 and all(calls)


def test_not_for_narrow_weights_that_have_changed_their_kind(by_network, calls):
    for dtype, change in (
        (torch.int8, lambda m: m._buffers.update({name: b.double() for name, b in m.named_buffers()})),
        (torch.int8, lambda m: m.register_buffer("weight_hh_l0_scale", torch.ones(3))),
        (torch.bfloat16, lambda m: m.register_buffer("weight_hh_l0", m.weight_hh_l0.float())),
    ):
        module = fastrnn.quantize(build(fastrnn, "GRU", 9, 17), dtype)
        change(module)
        messages = []
        for way in (lambda x, m=module: m(x), lambda x, m=module: by_network(m, x)):
            with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
                way(normal(4, 2, 9))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert calls == [False] * 3


def test_any_layout_of_the_input(by_network, calls):
    module = build(fastrnn, "LSTM", 6, 9)
    for x in (
        normal(5, 4, 12)[..., ::2],
        normal(4, 5, 6).transpose(0, 1),
        normal(10, 4, 6)[::2],
        normal(1, 4, 6).expand(5, 4, 6),
    ):
        with torch.no_grad():
            assert_equal(dict(enumerate(flat(module(x)))), dict(enumerate(flat(by_network(module, x)))))
    assert calls == [False, True, True, True]  # features that lie apart are for others


class _Ones(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Sub(torch.Tensor):
    pass


SPECIAL = {
    "gradients": contextlib.nullcontext,
    "dispatch mode": _Ones,
    "function mode": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu"),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_not_where_more_is_asked_for(what, calls):
    module, x = build(fastrnn, "GRU", 3, 5), normal(4, 2, 3)
    with contextlib.nullcontext() if what == "gradients" else torch.no_grad(), SPECIAL[what]():
        module(x)
    assert calls == [what == "gradients"]


def test_not_for_special_tensors(calls):
    module, x = build(fastrnn, "GRU", 3, 5), normal(4, 2, 3)
    with torch.no_grad():
        module(x.as_subclass(_Sub))
        with forward_ad.dual_level():
            output, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(output).tangent is not None
        torch.func.vmap(lambda x: module(x)[0])(normal(3, 4, 2, 3))
        module.to("meta")(x.to("meta"))
    assert calls == [False] * 4


def test_not_for_special_modules(calls):
    x = normal(4, 2, 3)

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    with torch.no_grad():
        plain = build(fastrnn, "GRU", 3, 5)
        expected = fastrnn.GRU(3, 5)
        expected.load_state_dict(plain.state_dict())
        expected.weight_hh_l0.mul_(2)
        parametrize.register_parametrization(plain, "weight_hh_l0", Double())
        assert torch.equal(plain(x)[0], expected(x)[0])
        build(fastrnn, "GRU", 3, 5, bidirectional=True, residual=True)(x)
        build(fastrnn, "GRU", 3, 5, state_batch_first=True)(x)
        build(fastrnn, "GRU", 3, 5, num_layers=2, dropout=0.5)(x)
        build(fastrnn, "GRU", 3, 5)(x, lengths=torch.tensor([1, 4]))
        build(fastrnn, "GRU", 3, 5, learn_initial_state=True)(x, resets=torch.ones(4, 2).bool())
        build(fastrnn, "GRU", 3, 5)(x[:, 0])  # unbatched
    assert calls == [False, True, False]


def test_any_truth_of_batch_first(calls):
    module, x = build(fastrnn, "LSTM", 3, 5, bidirectional=True, batch_first=True), normal(4, 2, 3)
    want = module(x)[0]
    for value in (1, "yes"):
        module.batch_first = value
        assert torch.equal(module(x)[0], want)
    assert all(calls)


def test_sees_new_weights(calls):
    module, x = build(fastrnn, "LSTM", 3, 5), normal(4, 2, 3)
    with torch.no_grad():
        first = module(x)[0]
        module.weight_hh_l0.data.mul_(3)
        changed = module(x)[0]
        other = {name: p + 1 for name, p in module.named_parameters()}
        called = torch.func.functional_call(module, other, (x,))[0]
    assert not torch.equal(first, changed) and not torch.equal(changed, called) and all(calls)


@pytest.mark.parametrize(
    "args",
    [
        (normal(4, 2, 4),),
        (normal(4, 2, 3), (normal(1, 2, 5), normal(1, 3, 5))),
        (normal(4, 2, 3).double(),),
        (normal(4, 2, 3), normal(1, 2, 5)),
        ("text",),
    ],
)
def test_errors_are_the_by_networks(args, by_network):
    module, messages = build(fastrnn, "LSTM", 3, 5), []
    for way in (lambda *a: module(*a), lambda *a: by_network(module, *a)):
        with torch.no_grad(), pytest.raises(Exception) as caught:
            way(*args)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "h_0"])
def test_not_without_memory(name, grad, by_network):
    """A storage that was resized under its tensor: torch says so."""
    for size in (0, 4):
        module, h_0 = build(fastrnn, "GRU", 3, 5), normal(1, 2, 5)
        (h_0 if name == "h_0" else getattr(module, name)).untyped_storage().resize_(size)
        for way in (module, functools.partial(by_network, module)):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="out of bounds for storage"):
                way(normal(4, 2, 3), h_0)


def test_attributes_of_wrong_kinds():
    module = build(fastrnn, "LSTM", 3, 5)
    module.grad_clip = "much"
    with pytest.raises(TypeError, match="must be real number, not str"):
        module(normal(4, 2, 3))[0].sum().backward()
    module.mode = "\ud800"
    with pytest.raises(UnicodeEncodeError):
        module(normal(4, 2, 3))


def test_results_own_their_memory():
    module, x = build(fastrnn, "LSTM", 3, 5), normal(1, 2, 3)
    with torch.no_grad():
        output, (h_n, c_n) = module(x)
        h_n.zero_(), c_n.zero_()
    assert output.abs().sum() > 0
    assert map_state(lambda x: x.is_inference(), (h_n, c_n)) == (False, False)
    assert modules._UNKNOWN_TO_C  # of which each sends a call to network.py


def test_many_calls_from_several_threads():
    """10,000 calls from four Python threads, some with a node of autograd, some on two threads: always the same."""
    torch.set_num_threads(2)
    cases = []
    for kind, T, B, H in [("LSTM", 1, 1, 16), ("GRU", 3, 2, 17), ("RNN_TANH", 1, 5, 33), ("LSTM", 20, 16, 128)]:
        module, x = build(fastrnn, kind, 8, H), normal(T, B, 8)
        with torch.no_grad():
            cases.append((module, x, flat(module(x))))
    wrong = []

    def work(worker):
        for i in range(2500):
            module, x, expected = cases[3 if i % 25 == 0 else (i + worker) % 3]
            with torch.set_grad_enabled(i % 10 == 0):
                if not all(torch.equal(a, b) for a, b in zip(flat(module(x)), expected, strict=True)):
                    wrong.append((worker, i))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_may_go_meanwhile():
    """A weight of a later layer is taken away while the one below runs: the call goes on with what it began with."""
    module, x = build(fastrnn, "LSTM", 3, 5, num_layers=2), normal(4, 2, 3)
    expected = module(x)[0].detach()

    def pack(saved):
        module._parameters.pop("weight_ih_l1", None)
        return saved.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = module(x)[0]
    assert "weight_ih_l1" not in module._parameters and torch.equal(output, expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0_reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_directions_without_memory(dtype, name, grad):
    """The weights of both directions are put together, which must not read what is not there."""
    module = build(fastrnn, "LSTM", 3, 4, bidirectional=True).to(dtype)
    getattr(module, name).untyped_storage().resize_(0)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="out of bounds for storage"):
        module(normal(4, 2, 3).to(dtype))


@pytest.mark.parametrize("trained", [0, 1, 2], ids=["inference", "training", "double backward"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_heads": 2}, {"peephole": True}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_weights_may_be_exchanged_meanwhile(options, trained):
    """Another thread gives the parameters other memory, of the same values, while the kernel runs without the lock."""
    torch.set_num_threads(1)
    module, x = fastrnn.LSTM(64, 256, num_layers=2, **options).requires_grad_(trained == 2), normal(60, 4, 64)
    x = x.to(module.weight_ih_l0.dtype).requires_grad_(trained > 0)

    def run():
        output = module(x)[0]
        if not trained:
            return output
        (grad,) = torch.autograd.grad(output.sum(), x, create_graph=trained == 2)
        return torch.autograd.grad(grad.square().sum(), x)[0] if trained == 2 else grad

    expected = run().clone()
    values, done = {name: p.clone() for name, p in module.named_parameters()}, threading.Event()

    def exchange():
        while not done.is_set():
            for name, value in values.items():
                module._parameters[name].data = value.clone()
            [torch.full_like(value, 1e3) for value in values.values()]  # into the memory that was given back
            time.sleep(0)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        results = [run() for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(y, expected) for y in results)
