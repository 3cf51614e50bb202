"""The samples and error inputs that torch tests its own recurrent modules with, run on ours.

They come out of the installed torch (``common_modules.module_db``), so each torch version brings its own. Their
numbers are asserted, lest a change there leaves nothing to run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import fastrnn
from tests.helpers import assert_equal, evaluate, evaluate_cell

# torch.nn warns once that it has no faster kernel for projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

# Forward samples and error inputs per dtype and mode, equal in torch 2.11, 2.13 and 2.15.
COUNTS = {
    "RNN": (32, 14),
    "GRU": (16, 14),
    "LSTM": (32, 14),
    "RNNCell": (3, 6),
    "GRUCell": (2, 6),
    "LSTMCell": (2, 4),
}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
KIND = pytest.mark.parametrize("kind", COUNTS)


def module_info(kind: str) -> ModuleInfo:
    (info,) = (info for info in module_db if info.module_cls is getattr(nn, kind))
    return info


def samples(kind: str, dtype: torch.dtype, training: bool) -> list[Any]:
    torch.manual_seed(0)
    info = module_info(kind)
    return list(info.module_inputs_func(info, "cpu", dtype, requires_grad=False, training=training))


def error_inputs(kind: str, dtype: torch.dtype, training: bool) -> list[Any]:
    torch.manual_seed(0)
    info = module_info(kind)
    return list(info.module_error_inputs_func(info, "cpu", dtype, requires_grad=False, training=training))


def described(index: int, sample: Any) -> str:
    constructor, forward = sample.constructor_input, sample.forward_input
    shapes = [getattr(x, "shape", type(x).__name__) for x in forward.args] if forward else None
    return f"sample {index}: {constructor.args} {constructor.kwargs}, forward {shapes}"


@KIND
@FLOATS
@MODES
def test_counts(kind: str, dtype: torch.dtype, training: bool) -> None:
    inputs = samples(kind, dtype, training), error_inputs(kind, dtype, training)
    assert tuple(map(len, inputs)) == COUNTS[kind]


@KIND
@FLOATS
@MODES
def test_forward_samples(kind: str, dtype: torch.dtype, training: bool) -> None:
    """Equal to torch.nn with the same parameters, gradients included, and to the sample's own reference."""
    seen = 0
    for index, sample in enumerate(samples(kind, dtype, training)):
        constructor, forward = sample.constructor_input, sample.forward_input
        ours, theirs = (
            getattr(space, kind)(*constructor.args, **constructor.kwargs).to(dtype).train(training)
            for space in (fastrnn, nn)
        )
        ours.load_state_dict(theirs.state_dict())
        try:
            run = evaluate_cell if kind.endswith("Cell") else evaluate
            assert_equal(*(run(module, *forward.args, **forward.kwargs) for module in (ours, theirs)))
            if sample.reference_fn is not None:
                actual = ours(*forward.args, **forward.kwargs)
                assert_close(actual, sample.reference_fn(ours, *forward.args, **forward.kwargs))
                seen += 1
        except AssertionError as error:
            error.add_note(described(index, sample))
            raise
    assert seen == COUNTS[kind][0]  # so far every sample has a reference


def raised(function: Any, *args: Any, **kwargs: Any) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@KIND
@FLOATS
@MODES
def test_error_inputs(kind: str, dtype: torch.dtype, training: bool) -> None:
    """The type and text that torch.nn raises, which is also what torch's own test wants."""
    for index, wrong in enumerate(error_inputs(kind, dtype, training)):
        constructor, forward = (
            wrong.module_error_input.constructor_input,
            wrong.module_error_input.forward_input,
        )
        note = described(index, wrong.module_error_input)
        errors = []
        for space in (fastrnn, nn):
            make = getattr(space, kind)
            if wrong.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                errors.append(raised(make, *constructor.args, **constructor.kwargs))
            else:
                module = make(*constructor.args, **constructor.kwargs).to(dtype).train(training)
                errors.append(raised(module, *forward.args, **forward.kwargs))
        ours, theirs = errors
        assert theirs is not None and ours is not None, note
        assert type(ours) is type(theirs), note
        assert str(ours) == str(theirs), note
        assert isinstance(ours, wrong.error_type), note
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            raise ours
