"""Nested tensors of layout torch.jagged in and out: as rows alone, and as padded input with lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastrnn
from fastrnn import modules, nested
from tests.helpers import KINDS, build, leaf, make_state, map_state, randn, tensors, weighted
from tests.sequences.cases import KIND

I, H = 4, 5  # noqa: E741
LENGTHS = (2, 6, 1, 4, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "batch_first says nothing": {"batch_first": True},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "learned state, batch first": {"learn_initial_state": True, "state_batch_first": True},
    "recompute": {"recompute": 2, "num_layers": 2},
    "every layer": {"num_layers": 2, "residual": True, "return_all_layers": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def nest(rows: Any) -> Tensor:
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


def rows_of(lengths: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(n, I, seed=k, dtype=dtype) for k, n in enumerate(lengths)]


def make(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = build(fastrnn, kind, I, H, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) * 0.4)
    return module


def padded(x: Tensor, batch_first: bool) -> Tensor:
    return nn.utils.rnn.pad_sequence(x.unbind(), batch_first=batch_first)


def leaves_of(output: Any) -> list[Tensor]:
    """The values of every layer."""
    return [x.values() for x in (output if isinstance(output, tuple) else (output,))]


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 0, 2), (5,), (2, 2)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@KIND
def test_as_with_lengths(kind: str, option: str, lengths: tuple[int, ...]) -> None:
    """Results and every gradient. Rows of no steps are padded, all others packed."""
    module, B = make(kind, **OPTIONS[option]), len(lengths)
    count = module.num_layers * (1 + module.bidirectional)
    leading = (B, count) if module.state_batch_first else (count, B)
    found = []
    for way in ("nested", "lengths"):
        x = nest(rows_of(lengths)).requires_grad_()
        hx = map_state(leaf, make_state(kind, *leading, hidden=H))
        hx = None if option.startswith("learned") else hx
        if way == "nested":
            output, finals = module(x, hx)
            for y in output if isinstance(output, tuple) else (output,):
                assert y.layout == torch.jagged and y.shape[:2] == x.shape[:2]  # the nested size, too
                assert y.offsets() is x.offsets() or torch.equal(y.offsets(), x.offsets())
            values = leaves_of(output)
        else:
            output, finals = module(padded(x, module.batch_first), hx, lengths=torch.tensor(lengths))
            layers = output if isinstance(output, tuple) else (output,)
            rows = [y if module.batch_first else y.transpose(0, 1) for y in layers]
            values = [torch.cat([y[b, :n] for b, n in enumerate(lengths)]) for y in rows]
        leaves = [x, *tensors(hx), *module.parameters()]
        results = [*values, *tensors(finals)]
        grads = torch.autograd.grad(weighted(results), leaves)
        found.append((results, [grads[0].values(), *grads[1:]]))
    torch.testing.assert_close(*found)


@KIND
def test_each_row_as_alone(kind: str) -> None:
    module, rows = make(kind, num_layers=2, bidirectional=True), rows_of(LENGTHS)
    output, finals = module(nest(rows))
    for b, (row, got) in enumerate(zip(rows, output.unbind(), strict=True)):
        want, states = module(row)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(map_state(lambda s, b=b: s[:, b], finals), states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module, rows = make("LSTM", num_layers=2), rows_of(LENGTHS)
    want = module(nest(rows))[0].values()
    x = nest(rows).to(dtype)
    got = module.to(dtype)(x)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.values().double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        got = module.float()(x.float())[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.values().double(), want, rtol=0, atol=0.05)


@KIND
def test_tokens(kind: str) -> None:
    module = make(kind, token_input=True, num_layers=2)
    tokens = [torch.randint(I, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    output, finals = module(nest(tokens))
    want, states = module(nest([nn.functional.one_hot(x, I).double() for x in tokens]))
    torch.testing.assert_close(output.values(), want.values())
    torch.testing.assert_close(finals, states)


def test_every_c_and_peepholes() -> None:
    module, rows = make("LSTM", return_all_states=True, peephole=True), rows_of(LENGTHS)
    output, (_, c_n), cells = module(nest(rows))
    assert cells.shape[:2] == output.shape[:2]
    torch.testing.assert_close(torch.stack([c[-1] for c in cells.unbind()]), c_n[0])


def test_dropout_between_layers() -> None:
    """One mask a row, as packed: the rows are drawn for as they are sorted."""
    module, rows = make("GRU", num_layers=2, locked_dropout=0.5, weight_dropout=0.5), rows_of((6, 4, 1))
    torch.manual_seed(5)
    got, finals = module(nest(rows))
    torch.manual_seed(5)
    want, states = module(nn.utils.rnn.pack_sequence(rows))
    torch.testing.assert_close(list(got.unbind()), nn.utils.rnn.unpack_sequence(want))
    torch.testing.assert_close(finals, states)


def test_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels read rows as they are, but for training by segments."""
    module, calls, network = make("LSTM").float(), [], modules.network
    monkeypatch.setattr(modules, "network", lambda *args, **options: calls.append(options) or network(*args, **options))
    module(nest(rows_of(LENGTHS)).float())
    module(nest(rows_of((3, 0))).float())
    module.recompute = 2
    module(nest(rows_of((3, 0))).float())
    assert [options["offsets"] is not None for options in calls] == [True, True, False]
    assert calls[1]["offsets"].tolist() == [0, 3, 3] and calls[2]["lengths"].tolist() == [3, 0]


def test_sizes_that_nobody_knows() -> None:
    """Made of values and offsets, whose longest row torch has not looked for: padded to that, and no further."""
    rows = rows_of((3, 0, 2))
    x = torch.nested.nested_tensor_from_jagged(torch.cat(rows), torch.tensor([0, 3, 3, 5]))
    assert nested.jagged(x).padded().shape == (3, 3, I)
    torch.testing.assert_close(make("LSTM")(x)[0].values(), make("LSTM")(nest(rows))[0].values())


def test_values_that_no_row_has() -> None:
    x = torch.nested.nested_tensor_from_jagged(randn(7, I), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"input: expected offsets up to 7 \(its values\), got 5"):
        make("LSTM")(x)


def test_holes() -> None:
    """As torch.nested.narrow leaves them: the output has the rows without."""
    x = randn(3, 6, I)
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4])
    holes = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    module = make("GRU")
    want = module(nest([x[b, s : s + n] for b, (s, n) in enumerate(zip(starts, lengths, strict=True))]))
    output, finals = module(holes)
    torch.testing.assert_close(list(output.unbind()), list(want[0].unbind()))
    torch.testing.assert_close(finals, want[1])


def test_numeric_gradients() -> None:
    """Of what a nested tensor is made of, and of weights. torch has no double backward through nested tensors."""
    module = make("LSTM", num_layers=2)
    values, names = torch.cat(rows_of((2, 3, 1))), [name for name, _ in module.named_parameters()]

    def run(values: Tensor, *weights: Tensor) -> Tensor:
        x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 5, 6]))
        return functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0].values()

    assert torch.autograd.gradcheck(run, (values.requires_grad_(), *module.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    """One graph for batches of any rows, forward and backward."""
    module = make(kind, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, (3, 7), (1, 2, 5)):
        found = []
        for way in (compiled, module):
            x = nest(rows_of(lengths)).requires_grad_()
            output, finals = way(x)
            assert output.shape[:2] == x.shape[:2]
            results = [output.values(), *tensors(finals)]
            grads = torch.autograd.grad(weighted(results), [x, *module.parameters()])
            found.append((results, [grads[0].values(), *grads[1:]]))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["last", "mean", "max"])
def test_pool(how: Any) -> None:
    module, lengths = make("LSTM", bidirectional=True), (2, 0, 5)
    x = nest(rows_of(lengths))
    want = fastrnn.pool(module(padded(x, False), lengths=torch.tensor(lengths))[0], torch.tensor(lengths), how)
    torch.testing.assert_close(fastrnn.pool(module(x)[0], how=how), want)
    with pytest.raises(ValueError, match="lengths: expected None with a nested output, got Tensor"):
        fastrnn.pool(module(x)[0], torch.tensor(lengths), how)


def test_quantized_and_converted() -> None:
    module, rows = make("LSTM", num_layers=2).float(), rows_of(LENGTHS, torch.float32)
    want = module(nest(rows))[0].values()
    torch.testing.assert_close(fastrnn.quantize(module)(nest(rows))[0].values(), want, rtol=0, atol=0.05)
    theirs = nn.LSTM(I, H, 2)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(fastrnn.convert(theirs)(nest(rows))[0].values(), want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_errors(kind: str) -> None:
    module, x = make(kind), nest(rows_of(LENGTHS))
    older = torch.nested.nested_tensor([r for r in rows_of(LENGTHS) if len(r)], layout=torch.strided)
    for name, call in (("input", module), ("output", fastrnn.pool)):
        with pytest.raises(ValueError, match=f"{name}: expected a nested tensor of layout torch.jagged, got torch.str"):
            call(older)
    with pytest.raises(ValueError, match="lengths: expected None with a nested input, got Tensor"):
        module(x, lengths=torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match="resets: expected None with a nested input, got Tensor"):
        module(x, resets=torch.zeros(6, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"input: expected a nested tensor \[B, j, I\]"):
        module(x.transpose(1, 2))
    with pytest.raises(ValueError, match=rf"{kind}: Expected nested input to be \[B, j, 4\], got \[5, j\d+\]"):
        module(nest([torch.zeros(n).double() for n in LENGTHS]))
    with pytest.raises(ValueError, match=rf"{kind}: Expected nested input to be \[B, j, 4\], got \[5, j\d+, 4, 1\]"):
        module(nest([r[..., None] for r in rows_of(LENGTHS)]))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 4, got 3"):
        module(nest([r[:, 1:] for r in rows_of(LENGTHS)]))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        module(x.float())
    with pytest.raises(ValueError, match="does not match weight dtype"):
        module(nest([torch.zeros(n, I, dtype=torch.int64) for n in LENGTHS]))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        module(nest([torch.zeros(0, I).double()] * 2))
    for lengths in (LENGTHS, (3, 0)):
        hx = make_state(kind, 1, len(lengths) + 1, hidden=H)
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, \d, 5\), got \[1, \d, 5\]"):
            module(nest(rows_of(lengths)), hx)
    with pytest.raises(RuntimeError, match="should also be 3-D"):
        module(x, make_state(kind, 1, hidden=H))
    with pytest.raises(TypeError, match=r"hx: expected a "):
        module(x, "text")
