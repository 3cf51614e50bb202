"""Gates in the memory of `saved` (csrc/torch/layer.cpp): forward makes them there, and backward writes their gradients
there where nobody will look again at what was saved. That is for layers that are a recurrence with products around it,
as CUDA's are, and which the CPU's are made to be here.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import _C
from fastrnn.layer import fused
from fastrnn.records import LayerCall, LayerStates, LayerWeights
from tests.helpers import build

ROOT = Path(__file__).resolve().parents[2]
T, B, I, H = 5, 3, 4, 7  # noqa: E741
KINDS = ("LSTM", "GRU", "RNN")
VARIANTS = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"bidirectional": True}) for kind in KINDS),
    ("LSTM", {"peephole": True}), ("LSTM", {"layer_norm": True, "bidirectional": True}), ("LSTM", {"proj_size": 3}),
    ("LSTM", {"zoneout": (0.3, 0.2)}), ("LSTM", {"layer_norm": True, "zoneout": (0.3, 0.2)}),
    ("GRU", {"layer_norm": True}), ("GRU", {"reset_after": False}), ("GRU", {"zoneout": 0.3, "bidirectional": True}),
    ("LiGRU", {}), ("LiGRU", {"bidirectional": True}), ("MGU", {}), ("SLSTM", {}), ("SLSTM", {"bidirectional": True}),
]  # fmt: skip
OPTIONS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([2, 5, 0])},
    "resets": {"resets": torch.rand(T, B, generator=torch.Generator().manual_seed(4)) < 0.3},
}


@pytest.fixture(autouse=True, params=[True, False], ids=["products", "kernel"])
def by_products(request):
    """And as the CPU's layers are: nobody else's memory is theirs either."""
    before = _C.set_layers_by_products(request.param)
    yield request.param
    _C.set_layers_by_products(before)


def module_and_input(kind, dtype, **options):
    torch.manual_seed(1)
    return build(fastrnn, kind, I, H, dtype=dtype, **options), torch.randn(T, B, I).to(dtype).requires_grad_()


def loss(results):
    output, finals, *cells = results
    finals = finals if isinstance(finals, tuple) else (finals,)
    return sum((x.float().square().sum() for x in (output, *finals, *cells)), torch.zeros(()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=str)
def test_the_gradients_are_those_of_a_graph_that_is_kept(kind, variant, options, dtype, bias):
    if "layer_norm" in variant and not bias:
        pytest.skip("has biases")
    module, x = module_and_input(kind, dtype, bias=bias, **variant)
    module.eval()  # zoneout keeps what may be expected
    given = OPTIONS[options]
    leaves = [x, *module.parameters()]
    value = loss(module(x, **given))
    kept = [torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2)]
    last = torch.autograd.grad(value, leaves)
    exact = build(fastrnn, kind, I, H, dtype=torch.float64, bias=bias, **variant).eval()
    exact.load_state_dict(module.state_dict())
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(loss(exact(wide, **given)), [wide, *exact.parameters()])
    for first, second, third, right in zip(*kept, last, want, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
        error = (third.double() - right).abs().max() / right.abs().max().clamp(min=1)
        assert error < (0.06 if "layer_norm" in variant else 0.03), float(error)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_somebody_else_holds_is_left_alone(kind):
    module, x = module_and_input(kind, torch.bfloat16)
    weights = [
        LayerWeights(*(getattr(module, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
    ]
    none = LayerStates(*[None] * len(LayerStates._fields))
    found = fused(LayerCall(kind.lower(), x, weights, none))
    held = found.saved.detach()
    before = held.clone()
    found.output.float().sum().backward()
    assert before.numel() and torch.equal(held, before)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_hooks_have_packed_is_left_alone(kind):
    module, x = module_and_input(kind, torch.bfloat16)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(module(x))
    before = [tensor.clone() for tensor in packed]
    value.backward()
    assert len(packed) > 3 and all(map(torch.equal, packed, before))


PEAKS = """
import sys
import torch
import fastrnn
from benchmarks.memory import peak_of

torch.set_num_threads(1)
fastrnn._C.set_layers_by_products(True)
T, B, H = 64, 64, 256
directions = int(sys.argv[2])
module = getattr(fastrnn, sys.argv[1])(H, H, bias=False, bidirectional=directions == 2, dtype=torch.float32)
x, grad = (torch.randn(T, B, n * H) for n in (1, directions))
module(x[:2].requires_grad_())[0].backward(grad[:2])
made = []
peaks = [peak_of(lambda: made.append(module(x)[0]))]
peaks += [peak_of(lambda: made[0].backward(grad, retain_graph=retain)) for retain in (True, False)]
print(*(peak / (T * B * H * 4) for peak in peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("kind", "saved", "gates"), [("LSTM", 5, 4), ("GRU", 4, 3)])
def test_memory_at_most(kind, saved, gates, directions, by_products):
    """Of both passes, in sizes of the output: no tensor of the gates beside what is saved, none of their gradients."""
    if not by_products:
        pytest.skip("no gates are made")
    command = [sys.executable, "-c", PEAKS, kind, str(directions)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    forward, kept, last = (float(peak) / directions for peak in done.stdout.split())
    assert forward < saved + 1 + 0.75 * gates
    assert kept - last > 0.75 * gates


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_through_every_c_takes_the_kernel(dtype, options):
    module, x = module_and_input("LSTM", dtype, return_all_states=True, **options)
    output, _, cells = module(x, lengths=OPTIONS["lengths"]["lengths"])
    grad = torch.randn(cells.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = torch.autograd.grad([output, cells], [x, *module.parameters()], [torch.ones_like(output), grad])
    assert not any("tanh_backward" in event.key for event in profile.key_averages()), "a loop of ATen's ops ran"
    exact, wide = module_and_input("LSTM", torch.float64, return_all_states=True, **options)
    exact.load_state_dict(module.state_dict())
    wide = x.detach().double().requires_grad_()
    output, _, cells = exact(wide, lengths=OPTIONS["lengths"]["lengths"])
    want = torch.autograd.grad([output, cells], [wide, *exact.parameters()], [torch.ones_like(output), grad.double()])
    for a, b in zip(found, want, strict=True):
        assert (a.double() - b).abs().max() / b.abs().max().clamp(min=1) < (0.03 if dtype is torch.bfloat16 else 1e-5)
