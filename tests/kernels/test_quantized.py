"""Narrow weights: the op against the same arithmetic in float64, and what quantize() makes of modules."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import ops, reference
from fastrnn.functional import LayerWeights
from fastrnn.quantized import int8_blocks
from tests.helpers import KINDS, build, make_state, map_state, randn, tensors

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.int8, torch.bfloat16)
SIZES = (1, 3, 17, 129)
quantized_forward = torch.ops.fastrnn.quantized_forward.default


def rounded_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that the narrow one stands for, in float64."""
    if dtype == torch.bfloat16:
        return weight.to(dtype).double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale.clamp(min=1e-38)).round().double() * scale.double()


def rounded_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row is multiplied as: itself, or 8 bits of its largest magnitude; x float32, the result float64."""
    if dtype == torch.bfloat16:
        return x.double()
    largest = x.abs().amax(-1, keepdim=True)
    q = (x * (127 / largest.clamp(min=1e-38)) + 128.5).floor() - 128
    return torch.where(largest > 0, q.double() * (largest / 127).double(), 0.0)


def direction_by_hand(cell: str, x: Tensor, w: LayerWeights, h: Tensor, c: Tensor | None, dtype: torch.dtype) -> tuple:
    """One direction in float64, but for what the scheme rounds; h goes through float32, as in the kernel."""
    rule = reference.CELLS[cell]
    weight_ih, weight_hh = rounded_weight(w.weight_ih, dtype), rounded_weight(w.weight_hh, dtype)
    zero = torch.zeros(weight_ih.shape[0], dtype=torch.float64)
    bias_ih, bias_hh = (zero if b is None else b.double() for b in (w.bias_ih, w.bias_hh))
    states, outputs = [h.double(), *([] if c is None else [c.double()])], []
    for step in x:
        gates_ih = rounded_rows(step, dtype) @ weight_ih.t() + bias_ih
        gates_hh = rounded_rows(states[0].float(), dtype) @ weight_hh.t() + bias_hh
        after, _ = rule.forward(gates_ih.chunk(rule.gates, 1), gates_hh.chunk(rule.gates, 1), tuple(states), ())
        states = list(after)
        outputs.append(states[0])
    return torch.stack(outputs), states


def enlarged(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x in module.parameters():
            x.mul_(1.5)
    return module


def away_from_ties(*shape: int) -> Tensor:
    """Rows that round to the same 8 bits whether or not the multiplication and the sum before it are fused: none of
    their values lies within a tenth of the middle between two. Every row holds its largest magnitude, 127 of them."""
    bits = torch.randint(-126, 127, shape) + 0.8 * (torch.rand(shape) - 0.5)
    bits[..., 0] = torch.where(torch.rand(shape[:-1]) < 0.5, -127.0, 127.0)
    return bits * (1 + torch.rand(*shape[:-1], 1)) / 127


def check_against_the_same_arithmetic(kind: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Odd sizes. One step, since a rounding of h that falls the other way is worth a whole 1/127 from there on."""
    for size in sizes:
        for H in sizes:
            for B in (1, 2, 5, 33):
                module = enlarged(build(fastrnn, kind, size, H, bias=size != 3))
                x = away_from_ties(1, B, size)
                h = away_from_ties(1, B, H)
                hx = (h, torch.randn(1, B, H)) if kind == "LSTM" else h
                got = fastrnn.quantize(module, dtype)(x, hx)
                states = [s[0] for s in tensors(hx)]
                (w,) = module._weights()[0]
                want, finals = direction_by_hand(
                    module.mode.lower(), x, w, states[0], states[1] if len(states) > 1 else None, dtype
                )
                for a, b in zip([got[0], *(s[0] for s in tensors(got[1]))], [want, *finals], strict=True):
                    torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_same_arithmetic(kind, dtype):
    check_against_the_same_arithmetic(kind, dtype, SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_sequences(kind):
    """Many steps and chunks, threads, both ways to read weights."""
    torch.set_num_threads(3)
    for T, B, size, H in [(40, 1, 17, 200), (150, 5, 33, 65), (9, 40, 64, 48)]:
        module = build(fastrnn, kind, size, H)
        x = torch.randn(T, B, size)
        (w,) = module._weights()[0]
        zero = torch.zeros(B, H)
        c = zero if kind == "LSTM" else None
        want, _ = direction_by_hand(module.mode.lower(), x, w, zero, c, torch.bfloat16)
        got, _ = fastrnn.quantize(module, torch.bfloat16)(x)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "proj"), [*((kind, 0) for kind in KINDS), ("LSTM", 5)])
def test_rows_do_not_know_each_other(kind, proj, dtype):
    """Every row of a batch with lengths and resets, both directions and two layers, alone: the same bits where sums
    are integers, the same but for rounding otherwise."""
    options = {"proj_size": proj} if proj else {}
    module = fastrnn.quantize(build(fastrnn, kind, 6, 33, num_layers=2, bidirectional=True, **options), dtype)
    T, B = 23, 7
    x, lengths = torch.randn(T, B, 6), torch.tensor([23, 1, 0, 7, 23, 16, 2])
    resets = torch.rand(T, B) < 0.2
    torch.set_num_threads(2)
    output, state = module(x, lengths=lengths, resets=resets)
    torch.set_num_threads(1)
    exact = dtype == torch.int8 and not proj
    for b, length in enumerate(lengths.tolist()):
        assert (output[length:, b] == 0).all()
        if length == 0:
            continue
        alone, final = module(x[:length, b : b + 1], resets=resets[:length, b : b + 1])
        for got, want in [(output[:length, b], alone[:, 0])] + [
            (s[:, b], f[:, 0]) for s, f in zip(tensors(state), tensors(final), strict=True)
        ]:
            torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization says that it is deprecated, at length
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_no_worse_than_torchs_int8(kind):
    """Error against float32, root mean square, beside torch's dynamic quantization (which has no RNN layer)."""
    sums = torch.zeros(2)
    for seed in range(3):
        torch.manual_seed(seed)
        module = build(nn, kind, 64, 96)
        x = torch.randn(30, 8, 64)
        ours = build(fastrnn, kind, 64, 96)
        ours.load_state_dict(module.state_dict())
        exact = ours(x)[0]
        got = fastrnn.quantize(ours)(x)[0]
        error = (got - exact).square().mean()
        if kind in ("LSTM", "GRU"):
            theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)}, torch.qint8)
            other = (theirs(x)[0] - exact).square().mean()
        else:
            other = (0.01 * exact.std()) ** 2
        sums += torch.stack((error, other)).detach()
    assert sums[0].sqrt() <= 1.1 * sums[1].sqrt()


# Of the error of output, over its root mean square: root mean square and largest. docs/measured.md promises these.
PROMISED = {torch.int8: (0.02, 0.5), torch.bfloat16: (0.004, 0.1)}


def enlarged_recurrence(kind: str, gain: float) -> nn.Module:
    module = build(fastrnn, kind, 64, 64)
    with torch.no_grad():
        module.weight_hh_l0.mul_(gain)
    return module


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    size, difference = exact.square().mean().sqrt(), got.double() - exact
    return (difference.square().mean().sqrt() / size).item(), (difference.abs().max() / size).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "gain"), [*((kind, gain) for kind in KINDS[:3] for gain in (1, 2)), ("LSTM", 4), ("GRU", 4)]
)
def test_the_promised_error(kind, gain, dtype):
    """Against float64 of the exact weights, at every length; it does not grow with it."""
    module = enlarged_recurrence(kind, gain)
    x = torch.randn(1000, 4, 64)
    with torch.no_grad():
        got, exact = fastrnn.quantize(module, dtype)(x)[0], copy.deepcopy(module).double()(x.double())[0]
    found = {steps: errors(got[:steps], exact[:steps]) for steps in (1, 10, 100, 1000)}
    for rms, largest in found.values():
        assert rms <= PROMISED[dtype][0] and largest <= PROMISED[dtype][1]
    assert found[1000][0] < 1.25 * found[100][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chaos_keeps_no_promise(dtype):
    """A network whose float32 run is another one than float64's: ten steps are near, and later ones are finite."""
    module, x = enlarged_recurrence("RNN_TANH", 4), torch.randn(1000, 4, 64)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double())[0]
        wide, got = module(x)[0], fastrnn.quantize(module, dtype)(x)[0]
    assert errors(wide, exact)[0] > 0.5 and errors(wide[:10], exact[:10])[0] < 1e-5
    assert errors(got[:10], exact[:10])[0] < 3 * PROMISED[dtype][0] and got.abs().max() <= 1


def test_the_promise_stands_on_the_page_and_held_in_the_stored_run():
    page = (ROOT / "docs/measured.md").read_text()
    for dtype, (rms, largest) in PROMISED.items():
        assert f"| {str(dtype).removeprefix('torch.')} | {100 * rms:g}% | {100 * largest:g}% |" in page
    run = sorted((ROOT / "benchmarks/results").glob("*-quantizederror-*.json"))[-1]
    rows = {(row["case"]["name"], row["peer"]): row["drift"] for row in json.loads(run.read_text())["rows"]}
    chaotic = {name for (name, peer), drift in rows.items() if peer == "fastrnn" and drift["rms"][-1] > 1e-4}
    assert chaotic == {f"rnn-10000x4x{H}x{H}-gain4" for H in (64, 256, 1024)}
    for (name, peer), drift in rows.items():
        if peer != "fastrnn" and name not in chaotic:
            rms, largest = PROMISED[torch.int8 if peer == "ourint8" else torch.bfloat16]
            assert max(drift["rms"]) <= rms and max(drift["largest"]) <= largest


def test_special_values():
    """A row of zeros, a NaN and an infinity: each stays in its row."""
    module = fastrnn.quantize(fastrnn.GRU(9, 20))
    x = torch.randn(3, 5, 9)
    x[:, 1] = 0
    want, _ = module(x)
    x[1, 2, 3], x[1, 3, 3] = float("nan"), float("inf")
    got, _ = module(x)
    assert want.isfinite().all()
    for row in (0, 1, 4):
        assert torch.equal(got[:, row], want[:, row])
    assert got[1:, 2].isnan().all() and got[0].isfinite().all()


def test_blocks():
    weight = torch.randn(3 * 17, 5)
    weight[4] = 0
    blocks, scale, total = int8_blocks(weight, 3)
    assert blocks.shape == (2, 2, 3, 16, 4) and scale.shape == total.shape == (2, 3, 16)
    flat = blocks.permute(2, 0, 3, 1, 4).reshape(3, 32, 8)
    restored = flat * scale.transpose(0, 1).reshape(3, 32, 1)
    torch.testing.assert_close(
        restored[:, :17, :5].reshape(51, 5), weight, rtol=0, atol=weight.abs().max().item() / 254
    )
    assert (flat[:, 17:] == 0).all() and (flat[:, :, 5:] == 0).all()
    assert torch.equal(total.transpose(0, 1).reshape(3, 32), 128 * flat.sum(2, dtype=torch.int32))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa):
    if isa == "avx2" and ops._C.instruction_set() == "baseline":
        pytest.skip("this CPU has no avx2")
    script = (
        "from tests.kernels.test_quantized import *\n"
        f"assert ops._C.instruction_set() == {isa!r}\n"
        "torch.manual_seed(0)\n"
        "for kind in KINDS:\n"
        "    for dtype in DTYPES:\n"
        "        test_rows_do_not_know_each_other(kind, 0, dtype)\n"
        "for kind in KINDS[:3]:\n"
        "    test_the_promised_error(kind, 2, torch.int8)\n"
        "check_against_the_same_arithmetic('LSTM', torch.int8, (3, 17))\n"
        "check_against_the_same_arithmetic('GRU', torch.bfloat16, (3, 17))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=os.environ | {"FASTRNN_ISA": isa})


# ---- modules ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_makes(dtype):
    lstm = fastrnn.LSTM(8, 12, num_layers=2, batch_first=True, dropout=0.5)
    model = nn.ModuleDict({"a": nn.Linear(3, 8), "rnn": lstm, "again": lstm, "cell": fastrnn.GRUCell(8, 8)})
    before = copy.deepcopy(model.state_dict())
    made = fastrnn.quantize(model, dtype)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model["rnn"] is lstm and made["rnn"] is made["again"] and made["rnn"] is not lstm
    assert isinstance(made["rnn"], fastrnn.LSTM) and not list(made["rnn"].parameters())
    assert isinstance(made["cell"], fastrnn.GRUCell) and len(list(made["cell"].parameters())) == 4
    assert str(made["rnn"]) == f"QuantizedLSTM(8, 12, num_layers=2, batch_first=True, dropout=0.5, dtype={dtype})"
    made.train()
    assert not made["rnn"].training
    x = torch.randn(2, 5, 8)
    want = made["rnn"](x)[0]
    torch.testing.assert_close(want, lstm.eval()(x)[0], rtol=0, atol=0.05)
    assert torch.equal(want, made["rnn"](x)[0]), "no dropout"
    for other in (copy.deepcopy(made["rnn"]), pickle.loads(pickle.dumps(made["rnn"]))):
        assert torch.equal(other(x)[0], want)
    loaded = fastrnn.quantize(fastrnn.LSTM(8, 12, num_layers=2, batch_first=True), dtype)
    loaded.load_state_dict(made["rnn"].state_dict())
    assert torch.equal(loaded(x)[0], want)
    full = sum(p.numel() * p.element_size() for p in lstm.parameters())
    held = sum(b.numel() * b.element_size() for b in made["rnn"].buffers())
    assert held < 0.65 * full


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_somebody_added_stays(dtype):
    """Hooks of a call, buffers and modules; what the copy adds to its own leaves the other alone."""
    module, seen = fastrnn.GRU(8, 12), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(
        lambda m, args, kwargs, result: (result[0] + m.shift + m.sub(args[0]), result[1]), with_kwargs=True
    )
    module.register_buffer("shift", torch.ones(12))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module.sub = nn.Sequential(nn.Linear(8, 12))
    made, x = fastrnn.quantize(module, dtype), torch.randn(5, 3, 8)
    torch.testing.assert_close(made(x)[0], module(x)[0], rtol=0, atol=0.05)
    assert seen == ["before"] * 2 and "passing" not in made.state_dict() and "sub.0.weight" in made.state_dict()
    assert made.sub[0].weight is not module.sub[0].weight and made.shift is not module.shift
    made.register_forward_hook(lambda *call: 1 / 0)
    module(x)


class Watched(nn.Module):
    """A model that looks at what goes through its parts."""

    def __init__(self):
        super().__init__()
        self.seen, self.rnn, self.head = [], fastrnn.GRU(8, 12), nn.Linear(12, 3)
        self.rnn.scale, self.rnn.dropped = nn.Parameter(torch.ones(12)), nn.Dropout()
        self.rnn.register_forward_hook(self.look)
        self.rnn.register_forward_hook(lambda m, args, result: (result[0] * m.scale, result[1]))
        self.head.register_forward_hook(self.look)
        self.dropped = self.rnn.dropped

    def look(self, module, args, result):
        self.seen.append(type(module).__name__)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def test_hooks_of_a_model_look_at_the_copy():
    model, x = Watched(), torch.randn(5, 3, 8)
    model.rnn.compile(backend="eager")
    made = fastrnn.quantize(model)
    with torch.no_grad():
        [p.zero_() for p in model.parameters()]
        assert made(x).abs().max() > 0.01, "nothing of it is the other's"
    assert made.seen == ["QuantizedGRU", "Linear"] and not model.seen
    assert made.dropped is made.rnn.dropped and made.dropped.training and not made.rnn.training
    assert [name for name, _ in made.rnn.named_parameters()] == ["scale"]
    outer, inner = fastrnn.GRU(8, 8), fastrnn.GRU(8, 8)
    outer.sub, inner.__dict__["others"] = inner, [outer]
    for order in ((outer, inner), (inner, outer)):
        both = fastrnn.quantize(nn.ModuleList(order))
        a, b = (both[order.index(m)] for m in (outer, inner))
        assert a.sub is b and type(b) is fastrnn.quantized.QuantizedGRU


def test_weights_are_not_drawn_anew():
    made = fastrnn.quantize(fastrnn.GRU(8, 12, layer_norm=True, learn_initial_state=True))
    made.h_0_l0.fill_(1)
    with pytest.raises(RuntimeError, match="QuantizedGRU: quantized weights are not drawn anew"):
        made.reset_parameters()
    assert (made.h_0_l0 == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_unbatched_and_states(dtype):
    module = fastrnn.quantize(fastrnn.GRU(6, 10, bidirectional=True), dtype)
    x, lengths = torch.randn(9, 3, 6), torch.tensor([4, 9, 2])
    packed, final = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    output, state = module(x, lengths=lengths)
    assert torch.equal(pad_packed_sequence(packed)[0], output) and torch.equal(final, state)
    hx = torch.randn(2, 3, 10)
    whole, end = module(x, hx)
    assert torch.equal(module(x[:, 0], hx[:, 0])[0], whole[:, 0]) or dtype == torch.bfloat16
    torch.testing.assert_close(module(x[:, 0], hx[:, 0])[1], end[:, 0], rtol=0, atol=1e-5)


ADVICE = ": convert it first, fastrnn.quantize(fastrnn.convert(module))"


class Derived(fastrnn.LSTM):
    def forward(self, *args):
        return super().forward(*args)[0]


def test_refuses():
    lstm, with_a_forward, pruned = fastrnn.LSTM(4, 5), fastrnn.GRU(4, 5), fastrnn.LSTM(4, 5)
    with_a_forward.forward = with_a_forward.forward
    prune.random_unstructured(pruned, "weight_hh_l0", 0.5)
    pruned_state = fastrnn.GRU(4, 5, learn_initial_state=True)
    prune.random_unstructured(pruned_state, "h_0_l0", 0.5)
    for module, dtype, kind, message in [
        (lstm, torch.float16, ValueError, "dtype: expected torch.int8 or torch.bfloat16, got torch.float16"),
        ("a", torch.int8, TypeError, "module: expected a torch.nn.Module, got str"),
        (nn.LSTM, torch.int8, TypeError, "module: expected a torch.nn.Module, got the class LSTM"),
        (nn.Linear(4, 5), torch.int8, TypeError, "or a module holding one, got torch.nn.Linear"),
        (nn.LSTM(4, 5), torch.int8, TypeError, f"got torch.nn.LSTM{ADVICE}"),
        (
            nn.Sequential(nn.GRU(4, 5)),
            torch.int8,
            TypeError,
            f"got torch.nn.Sequential with a torch.nn.GRU in it{ADVICE}",
        ),
        (fastrnn.GRUCell(4, 5), torch.int8, TypeError, "got fastrnn.GRUCell"),
        (fastrnn.GRU(4, 5).double(), torch.int8, TypeError, "weight_ih_l0: expected torch.float32, got torch.float64"),
        (fastrnn.GRU(4, 5, device="meta"), torch.int8, ValueError, "weight_ih_l0: expected device cpu, got meta"),
        (fastrnn.quantize(lstm), torch.int8, TypeError, "quantized already"),
        (Derived(4, 5), torch.int8, TypeError, "Derived, derived from one"),
        (with_a_forward, torch.int8, TypeError, "got fastrnn.GRU with another, set on the instance"),
        (pruned, torch.int8, TypeError, "weight_hh_l0: expected a parameter, got a tensor: remove its weight norm"),
        (pruned_state, torch.int8, TypeError, "h_0_l0: expected a parameter, got a tensor: remove its weight norm"),
    ]:
        with pytest.raises(kind) as caught:
            fastrnn.quantize(module, dtype)
        assert message in str(caught.value)
    made = fastrnn.quantize(lstm)
    x = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="inference"):
        made(x.clone().requires_grad_())
    with torch.no_grad():
        made(x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"input: expected torch\.float32"):
        made(x.double())
    with pytest.raises(RuntimeError, match="Expected 4, got 6"):
        made(torch.randn(3, 2, 6))
    made._buffers["weight_ih_l0"] = made.weight_ih_l0.to("meta")
    with pytest.raises(RuntimeError, match="weight_ih_l0: expected device cpu, got meta"):
        made(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_cannot_be_cast_or_moved(kind, dtype):
    """Said at once, and nothing is changed; what changes nothing is allowed."""
    made = fastrnn.quantize(build(fastrnn, kind, 4, 5, 2), dtype)
    model, x = nn.Sequential(made), torch.randn(3, 2, 4)
    before, weights = made(x)[0], {name: b.clone() for name, b in made.named_buffers()}
    told = f"{type(made).__name__}: expected to stay float32 .* got a move to "
    for move, got in (
        (lambda m: m.half(), "torch.float16 on cpu"),
        (lambda m: m.double(), "torch.float64 on cpu"),
        (lambda m: m.bfloat16(), "torch.bfloat16 on cpu"),
        (lambda m: m.to(torch.float64), "torch.float64 on cpu"),
        (lambda m: m.to("meta"), "torch.float32 on meta"),
        (lambda m: m.to_empty(device="meta"), "torch.float32 on meta"),
    ):
        for module in (made, model):
            with pytest.raises(TypeError, match=told + got):
                move(module)
    for module in (made, model):
        for same in (module.cpu(), module.float(), module.to(torch.float32), module.to("cpu"), module.share_memory()):
            assert same is module
    for name, buffer in made.named_buffers():
        assert buffer.dtype == weights[name].dtype and torch.equal(buffer, weights[name])
    assert torch.equal(made(x)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_fill_no_block(kind):
    """Blocks of int8 hold 4 columns: 3 features fit the blocks of 4, and were taken without a word."""
    made = fastrnn.quantize(build(fastrnn, kind, 4, 5))
    for features in (1, 3, 5):
        with pytest.raises(RuntimeError, match=f"Expected 4, got {features}"):
            made(torch.randn(3, 2, features))


def arguments(dtype=torch.int8, **changes):
    module = fastrnn.quantize(fastrnn.GRU(6, 17), dtype)
    b = module._buffers
    given = {
        "cell": "gru", "input": torch.randn(3, 2, 6), "weight_ih": b["weight_ih_l0"],
        "scale_ih": b.get("weight_ih_l0_scale"), "sum_ih": b.get("weight_ih_l0_sum"), "bias_ih": b["bias_ih_l0"],
        "weight_hh": b["weight_hh_l0"], "scale_hh": b.get("weight_hh_l0_scale"), "sum_hh": b.get("weight_hh_l0_sum"),
        "bias_hh": b["bias_hh_l0"], "weight_hr": None, "params": None, "h_0": torch.zeros(2, 17), "c_0": None,
        "lengths": None, "resets": None, "reset_h": None, "reset_c": None, "mask_h": None, "keep_h": None,
        "keep_c": None, "reverse": [False],
    }  # fmt: skip
    return (given | changes).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(3, 2, 6).double()}, "input: expected dtype Float, got Double"),
        ({"input": torch.zeros(3, 2, 9)}, "weight_ih: expected [1, 2, 3, 3, 16, 4], got [1, 2, 2, 3, 16, 4]"),
        ({"weight_ih": torch.zeros(1, 51, 6)}, "weight_ih: expected dtype BFloat16 or Char, got Float"),
        ({"weight_hh": torch.zeros(1, 51, 17).bfloat16()}, "weight_hh: expected [1, 2, 5, 3, 16, 4], got [1, 51, 17]"),
        ({"scale_hh": None}, "scale_hh: expected a tensor with weights of Char, got none"),
        ({"sum_ih": torch.zeros(1, 2, 3, 16)}, "sum_ih: expected dtype Int, got Float"),
        ({"h_0": torch.zeros(2, 40)}, "bias_ih: expected [1, 120], got [1, 51]"),
        ({"h_0": torch.zeros(17)}, "h_0: expected [batch, 1 * width], got [17]"),
        ({"reverse": []}, "h_0: expected [batch, 0 * width]"),
        ({"cell": "none"}, "cell: expected one of"),
    ],
)
def test_op_refuses(changes, message):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        quantized_forward(*arguments(**changes))
    assert message in str(caught.value)


def test_opcheck():
    for dtype in DTYPES:
        torch.library.opcheck(quantized_forward, tuple(arguments(dtype)))


def test_compiles():
    for dtype in DTYPES:
        module = fastrnn.quantize(fastrnn.LSTM(6, 9), dtype)
        x = torch.randn(4, 3, 6)
        with torch.no_grad():
            want = module(x)
            got = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(got[0], want[0])


def test_states_are_not_shared_with_the_arguments():
    module = fastrnn.quantize(fastrnn.LSTM(3, 4))
    hx = make_state("LSTM", 1, 2, hidden=4, dtype=torch.float32)
    kept = map_state(torch.clone, hx)
    module(randn(5, 2, 3).float(), hx)
    assert all(torch.equal(a, b) for a, b in zip(tensors(hx), tensors(kept), strict=True))


def test_sparse_input_is_told():
    module = fastrnn.quantize(fastrnn.LSTM(3, 4))
    with pytest.raises(ValueError, match="input: expected a dense tensor for quantized weights, got layout"):
        module(torch.zeros(5, 2, 3).to_sparse())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_tangents_are_refused(kind: str, dtype: torch.dtype) -> None:
    """They would be lost without a word."""
    module, x = fastrnn.quantize(getattr(fastrnn, kind)(4, 6), dtype), torch.randn(5, 2, 4)
    told = "expected an input and states without requires_grad or tangents"
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=told):
        module(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match=told):
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        module(x)
