"""Every option of every class on the device of pretend_cuda.py, in a process of its own: JSON on standard output.

    python -m tests.cuda.calls

For every case: what it told of the device, and how far its results, gradients included, are from the CPU's.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn.functional import LayerWeights
from tests.cuda import pretend_cuda
from tests.helpers import KINDS, LIKE_GRU, build

T, B, I, H = 4, 3, 5, 6  # noqa: E741
LENGTHS = torch.tensor([2, 4, 1])
ROWS = torch.tensor([3, 1, 2, 3])  # of [B, T] input
RESETS = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
Put = Callable[[Any], Any]  # a tensor to where the case runs
Case = Callable[[Put], list[Tensor]]


def leaves(x: Any) -> list[Tensor]:
    """The float tensors of a result."""
    if isinstance(x, PackedSequence):
        return [x.data]
    if isinstance(x, Tensor):
        return [x] if x.is_floating_point() else []
    return [y for part in x for y in leaves(part)]


def put_module(module: Any, put: Put) -> Any:
    return module if put is same else pretend_cuda.module_to_device(module)


def same(x: Any) -> Any:
    return x


def state_of(kind: str, put: Put, rows: int = 1, width: int = H, batch: int = B) -> Any:
    generator = torch.Generator().manual_seed(5)
    widths = (width, H) if kind == "LSTM" else (H,)
    parts = tuple(put(torch.randn(rows, batch, n, generator=generator).requires_grad_()) for n in widths)
    return parts if kind == "LSTM" else parts[0]


def packed(put: Put, x: Tensor, enforce_sorted: bool) -> PackedSequence:
    lengths = LENGTHS.sort(descending=True).values if enforce_sorted else LENGTHS
    p = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    order = [None if i is None else put(i) for i in (p.sorted_indices, p.unsorted_indices)]
    return PackedSequence(put(p.data.detach().requires_grad_(x.requires_grad)), p.batch_sizes, *order)


def inputs() -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(1)).requires_grad_()


def called(kind: str, put: Put, options: dict[str, Any], call: Callable[..., Any]) -> list[Tensor]:
    """Results of the call and, where grad mode is on, the gradients of all parameters, inputs and states."""
    torch.manual_seed(3)
    module = put_module(build(fastrnn, kind, I, H, **options), put)
    wanted = list(module.parameters())

    def putting(x: Any) -> Any:
        moved = put(x)
        if isinstance(moved, Tensor) and moved.requires_grad:
            wanted.append(moved)
        return moved

    results = leaves(call(module, kind, putting))
    if not torch.is_grad_enabled():
        return results
    loss = sum((x.float().square().sum() for x in results), torch.zeros(()))
    return [*results, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def tokens() -> Tensor:
    return torch.tensor([[0, 1, 4], [2, 2, 0], [1, 3, 3], [4, 0, 1]])


# name -> (options of the constructor, (module, kind, put) -> results)
CALLS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "plain": ({}, lambda m, k, p: m(p(inputs()))),
    "state": ({}, lambda m, k, p: m(p(inputs()), state_of(k, p))),
    "unbatched": ({"batch_first": True}, lambda m, k, p: m(p(inputs()[:, 0].detach().requires_grad_()))),
    "layers": ({"num_layers": 2, "bidirectional": True}, lambda m, k, p: m(p(inputs()))),
    "dropout": ({"num_layers": 2, "dropout": 1.0}, lambda m, k, p: m(p(inputs()))),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda m, k, p: m(p(inputs().detach().bfloat16()))),
    "lengths": ({"bidirectional": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "lengths int32": ({"batch_first": True}, lambda m, k, p: m(p(inputs()), lengths=p(ROWS.int()))),
    "lengths of the host": ({"bidirectional": True}, lambda m, k, p: m(p(inputs()), lengths=LENGTHS)),
    "resets": ({}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "resets, two directions": ({"bidirectional": True}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "resets and lengths": (
        {"bidirectional": True},
        lambda m, k, p: m(p(inputs()), resets=p(RESETS), lengths=p(LENGTHS), reset_state=state_of(k, p, 2)),
    ),
    "reset_state": ({}, lambda m, k, p: m(p(inputs()), resets=p(RESETS), reset_state=state_of(k, p))),
    "packed, sorted": ({"num_layers": 2}, lambda m, k, p: m(packed(p, inputs(), True))),
    "packed": ({"bidirectional": True}, lambda m, k, p: m(packed(p, inputs(), False))),
    "packed, state": ({}, lambda m, k, p: m(packed(p, inputs(), False), state_of(k, p))),
    "packed, recompute": ({"recompute": 2}, lambda m, k, p: m(packed(p, inputs(), False))),
    "packed, empty": ({}, lambda m, k, p: m(PackedSequence(p(inputs()[0, :0]), torch.tensor([0])))),
    "packed tokens": ({"token_input": True}, lambda m, k, p: m(packed(p, tokens(), False))),
    "tokens": ({"num_layers": 2, "token_input": True}, lambda m, k, p: m(p(tokens()))),
    "tokens, lengths": (
        {"bidirectional": True, "token_input": True},
        lambda m, k, p: m(p(tokens()), lengths=p(LENGTHS)),
    ),
    "learn_initial_state": (
        {"learn_initial_state": True, "bidirectional": True},
        lambda m, k, p: m(p(inputs()), resets=p(RESETS)),
    ),
    "learn_initial_state, packed": ({"learn_initial_state": True}, lambda m, k, p: m(packed(p, inputs(), False))),
    "state_batch_first": ({"state_batch_first": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "grad_clip": ({"grad_clip": 0.01, "bidirectional": True}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "recompute": ({"recompute": 2, "bidirectional": True}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "recompute, lengths": ({"recompute": 2}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "num_heads": ({"num_heads": 2, "bidirectional": True}, lambda m, k, p: m(p(inputs()), state_of(k, p, 2))),
    "residual, return_all_layers": (
        {"num_layers": 3, "residual": True, "return_all_layers": True}, lambda m, k, p: m(p(inputs()))
    ),
    "weight_dropout": ({"weight_dropout": 1.0}, lambda m, k, p: m(p(inputs()))),
    "locked_dropout": ({"num_layers": 2, "locked_dropout": 1.0}, lambda m, k, p: m(packed(p, inputs(), False))),
    "recurrent_dropout": ({"recurrent_dropout": 1.0, "bidirectional": True}, lambda m, k, p: m(p(inputs()))),
    "zoneout": ({"zoneout": 1.0, "bidirectional": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "zoneout, packed": ({"zoneout": 1.0}, lambda m, k, p: m(packed(p, inputs(), False), state_of(k, p))),
    "expected zoneout": ({"zoneout": 0.3}, lambda m, k, p: m.eval()(p(inputs()), resets=p(RESETS))),
    "pool last": (
        {"bidirectional": True},
        lambda m, k, p: fastrnn.pool(m(p(inputs()), lengths=p(LENGTHS))[0], p(LENGTHS), bidirectional=True),
    ),
    "pool mean, packed": ({}, lambda m, k, p: fastrnn.pool(m(packed(p, inputs(), False))[0], how="mean")),
    "pool max, packed": ({}, lambda m, k, p: fastrnn.pool(m(packed(p, inputs(), True))[0], how="max")),
    "step": ({}, lambda m, k, p: m.step(p(inputs()[0].detach()), state_of(k, p), resets=p(RESETS[0]))),
    "detach": ({}, lambda m, k, p: m(p(inputs()), fastrnn.detach(m(p(inputs()))[1]))),
}  # fmt: skip
GRU_CALLS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "layer_norm": ({"layer_norm": True, "bidirectional": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "reset_after": ({"reset_after": False, "bidirectional": True}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
}  # fmt: skip
LSTM_CALLS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "proj_size": ({"proj_size": 2, "bidirectional": True}, lambda m, k, p: m(p(inputs()), state_of(k, p, 2, 2))),
    "proj_size, resets": ({"proj_size": 2}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "return_all_states": ({"return_all_states": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "peephole": ({"peephole": True, "bidirectional": True}, lambda m, k, p: m(p(inputs()), resets=p(RESETS))),
    "layer_norm": ({"layer_norm": True, "bidirectional": True}, lambda m, k, p: m(p(inputs()), lengths=p(LENGTHS))),
    "return_all_states, packed": ({"return_all_states": True}, lambda m, k, p: m(packed(p, inputs(), False))),
}  # fmt: skip


def cell_call(kind: str, put: Put) -> list[Tensor]:
    torch.manual_seed(3)
    cell = put_module(getattr(fastrnn, f"{kind}Cell")(I, H), put)
    results = leaves((cell(put(inputs()[0].detach())), cell(put(inputs()[0, 0].detach()))))
    return [*results, *torch.autograd.grad(sum(x.sum() for x in results), list(cell.parameters()))]


def functional_call(put: Put) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    weights = [[LayerWeights(*(put(torch.randn(s).mul(0.3).requires_grad_()) for s in shapes)) for _ in range(2)]]
    output, finals = fastrnn.functional.lstm(
        put(inputs()), None, weights, lengths=put(LENGTHS), resets=put(RESETS), reset_state=state_of("LSTM", put, 2)
    )
    flat = [x for w in weights[0] for x in w if x is not None]
    return [output, *finals, *torch.autograd.grad(output.square().sum(), flat)]


def second(kind: str, put: Put, options: dict[str, Any], call: Callable[..., Any]) -> list[Tensor]:
    """Gradients of gradients."""
    torch.manual_seed(3)
    module = put_module(build(fastrnn, kind, I, H, **options), put)
    results = leaves(call(module, kind, put))
    parameters = list(module.parameters())
    first = torch.autograd.grad(sum(x.square().sum() for x in results), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))


def mapped(kind: str, put: Put) -> list[Tensor]:
    """Outputs of a batch of packed sequences, and the parameters' gradients of each one."""
    torch.manual_seed(3)
    module = put_module(build(fastrnn, kind, I, H, bidirectional=True), put)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    rows = pack_padded_sequence(inputs(), LENGTHS, enforce_sorted=False)

    def loss(parameters: dict[str, Tensor], data: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = torch.func.functional_call(module, parameters, (PackedSequence(data, rows.batch_sizes),))
        return output.data.square().sum(), output.data

    data = put(torch.stack([rows.data.detach(), rows.data.detach() + 0.5]))
    grads, output = torch.vmap(torch.func.grad(loss, has_aux=True), (None, 0))(parameters, data)
    return [output, *grads.values()]


# Kinds that go the way of a GRU, but for what the ops make of their cells: some calls are enough.
FEW = ("layers", "lengths", "resets and lengths", "packed", "tokens, lengths", "recompute", "num_heads")


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {"functional": functional_call}
    for kind in (*KINDS, *LIKE_GRU):
        calls = CALLS | {"LSTM": LSTM_CALLS, "GRU": GRU_CALLS}.get(kind, {})
        if kind in LIKE_GRU:
            calls = {name: CALLS[name] for name in FEW}
        for name, (options, call) in calls.items():

            def train(put: Put, kind: str = kind, options: Any = options, call: Any = call) -> list[Tensor]:
                return called(kind, put, options, call)

            def infer(put: Put, train: Case = train) -> list[Tensor]:
                with torch.no_grad():
                    return train(put)

            found |= {f"{kind}, {name}, training": train, f"{kind}, {name}, inference": infer}
        if kind in ("LSTM", "GRU"):
            for name in ("plain", "lengths", "resets and lengths", "packed", "learn_initial_state"):
                options, call = CALLS[name]
                found[f"{kind}, {name}, double backward"] = lambda put, kind=kind, options=options, call=call: second(
                    kind, put, options, call
                )
        found[f"{kind}, vmap, packed"] = lambda put, kind=kind: mapped(kind, put)
    for kind in ("LSTM", "GRU", "RNN"):
        found[f"{kind}Cell"] = lambda put, kind=kind: cell_call(kind, put)
    return found


def worst(got: list[Any], want: list[Any]) -> float:
    """The largest error, of the larger of 1 and the largest value."""
    errors = [0.0]
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a = pretend_cuda.host(a).detach().float()
            assert a.shape == b.shape
            b = b.detach().float()
            if a.numel():
                errors.append(((a - b).abs().max() / b.abs().max().clamp(min=1)).item())
    return max(errors)


def main() -> None:
    torch.autograd.set_multithreading_enabled(False)  # no thread for a device that is none
    torch.set_num_threads(1)
    told: dict[str, dict[str, Any]] = {}
    for name, case in cases().items():
        want = case(same)
        record: dict[str, Any] = {"error": "", "told": [], "ops": []}
        with pretend_cuda.Device() as device:
            try:
                got = case(pretend_cuda.to_device)
            except Exception:
                record["error"] = traceback.format_exc()
        if not record["error"]:
            record |= {"told": device.told, "ops": sorted(set(device.ops)), "off": worst(got, want)}
        told[name] = record
    json.dump(told, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the backend's own end is not ours


if __name__ == "__main__":
    main()
