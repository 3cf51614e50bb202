"""The sequence options together: repr, checks and copies, under torch.compile and export, and of quantized modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from tests.helpers import (
    build,
    randn,
    tensors,
    weighted,
)
from tests.sequences.cases import ALL, DEEP, KIND, enlarged, random_tokens

# ---- the constructors ----


def test_repr() -> None:
    assert repr(fastrnn.LSTM(3, 5, batch_first=True, **ALL)) == (
        "LSTM(3, 5, batch_first=True, learn_initial_state=True, state_batch_first=True, return_all_states=True, "
        "token_input=True, peephole=True, residual=True, return_all_layers=True)"
    )
    assert repr(fastrnn.RNN(3, 5, state_batch_first=True)) == "RNN(3, 5, state_batch_first=True)"
    assert repr(fastrnn.GRU(3, 5, learn_initial_state=False)) == "GRU(3, 5)"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_options_are_checked(name: str) -> None:
    cls = getattr(fastrnn, name)
    for option in ("learn_initial_state", "state_batch_first"):
        with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
            cls(3, 5, **{option: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'learn_initial_states'"):
        cls(3, 5, learn_initial_states=True)
    if name == "LSTM":
        with pytest.raises(TypeError, match="return_all_states should be of type bool, got: str"):
            cls(3, 5, return_all_states="yes")
    else:
        with pytest.raises(ValueError, match="return_all_states argument is only supported for LSTM"):
            cls(3, 5, return_all_states=True)


def test_options_are_kept() -> None:
    """By deepcopy, pickle and torch.save; a module that was stored before there were options has them off."""
    module = enlarged(fastrnn.LSTM(3, 5, **ALL))
    x = torch.randn(6, 2, 3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for m in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert repr(m) == repr(module)
        torch.testing.assert_close(m(x), module(x), rtol=0, atol=0)
    plain = fastrnn.LSTM(3, 5)
    assert not set(ALL) & set(vars(plain))  # what a pickle of torch.nn.LSTM's holds, and no more
    assert len(pickle.loads(pickle.dumps(plain))(x)) == 2


COMPILED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tokens-lstm": ("LSTM", {**DEEP, "token_input": True}, True),
    "tokens-gru-batch-first": ("GRU", {"batch_first": True, "token_input": True}, True),
    "learned": ("LSTM", {"learn_initial_state": True, "bidirectional": True}, False),
    "state-batch-first": ("GRU", {"state_batch_first": True, **DEEP}, False),
    "every-c": ("LSTM", {"return_all_states": True, "bidirectional": True}, False),
    "all": ("LSTM", {**ALL, "proj_size": 2}, True),
}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str, masked: bool) -> None:
    """fullgraph with dynamic sizes, training: as without."""
    kind, options, tokens = COMPILED[name]
    module = enlarged(build(fastrnn, kind, 11, 5, dtype=torch.float64, **options))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((3, 2), (4, 5)):  # the composite, where c has a gradient, is unrolled
        shape = (B, T) if module.batch_first else (T, B)
        x = random_tokens(*shape, vocabulary=11) if tokens else randn(*shape, 11)
        masks = {"lengths": torch.arange(B), "resets": torch.rand(shape) < 0.3} if masked else {}
        found = []
        for function in (compiled, module):
            leaves = torch.utils._pytree.tree_leaves(function(x, **masks))
            found.append((leaves, torch.autograd.grad(weighted(leaves), list(module.parameters()))))
        torch.testing.assert_close(*found)


def test_compile_step_pool_and_inductor() -> None:
    """With torch's own code generator, inference."""
    module = fastrnn.LSTM(11, 5, learn_initial_state=True, token_input=True)

    def function(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        output, state = module(tokens, lengths=lengths)
        word, state = module.step(tokens[0], fastrnn.detach(state))
        return word, *state, *(fastrnn.pool(output, lengths, how) for how in ("last", "mean", "max"))

    tokens, lengths = random_tokens(6, 3, vocabulary=11), torch.tensor([6, 0, 4])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(tokens, lengths), function(tokens, lengths))


def test_export_tokens() -> None:
    module, tokens = fastrnn.LSTM(11, 5, **ALL), random_tokens(6, 3, vocabulary=11)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    exported = torch.export.export(module, (tokens,), dynamic_shapes={"input": {0: T, 1: B}}).module()
    other = random_tokens(9, 4, vocabulary=11)
    torch.testing.assert_close(exported(other), module(other))


# ---- quantized ----


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@KIND
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    options = {"learn_initial_state": True, "state_batch_first": True, "num_layers": 2}
    module = enlarged(build(fastrnn, kind, 7, 5, **options))
    narrow = fastrnn.quantize(module, dtype)
    x, resets = torch.randn(6, 3, 7), torch.rand(6, 3) < 0.3
    plain = build(fastrnn, kind, 7, 5, num_layers=2)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_0_l" not in k})
    as_state = (lambda s: tuple(s)) if kind == "LSTM" else (lambda s: s[0])
    learned = as_state([s.detach() for s in module._initial_states(3)])
    want, states = fastrnn.quantize(plain, dtype)(x, learned, resets=resets, reset_state=learned)
    got, finals = narrow(x, resets=resets)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(tensors(finals), tensors(states), strict=True))
    state, steps = None, []
    for step, reset in zip(x, resets, strict=True):
        output, state = narrow.step(step, state, resets=reset)
        steps.append(output)
    torch.testing.assert_close(torch.stack(steps), want)
    with pytest.raises(ValueError, match=r"input: expected torch.float32 for quantized weights, got torch.int64"):
        narrow(random_tokens(6, 3, vocabulary=7))


def test_quantized_keeps_no_c() -> None:
    with pytest.raises(ValueError, match=r"expected return_all_states=False, got fastrnn\.LSTM with True"):
        fastrnn.quantize(fastrnn.LSTM(3, 5, return_all_states=True))
