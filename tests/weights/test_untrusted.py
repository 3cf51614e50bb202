"""What comes from elsewhere: checkpoints hold tensors alone, and a file that is broken gives an error and no more."""

from __future__ import annotations

import ast
import copy
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, LIKE_GRU, build
from tests.weights.test_weights import Layer, keras_arrays, keras_layer, onnx_case

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS, *LIKE_GRU, "SLSTM", "quantized"])
def test_checkpoints_need_no_pickle(kind: str) -> None:
    """``weights_only=True`` loads every module's state_dict, with which another computes the same."""

    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        if kind == "quantized":
            return fastrnn.quantize(fastrnn.GRU(3, 4, 2))
        return build(fastrnn, kind, 3, 4, **({} if "Cell" in kind else {"learn_initial_state": True}))

    module, other = made(0), made(1)
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict()}, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True)["model"])
    x = torch.randn(2, 3) if "Cell" in kind else torch.randn(5, 2, 3)
    a, b = (m(x) for m in (module, other))
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("kind", [*KINDS, "SLSTM", "quantized"])
def test_state_dicts_that_do_not_fit(kind: str) -> None:
    """A tensor of another size is refused by its name; the module still computes."""
    module: Any = fastrnn.quantize(fastrnn.LSTM(3, 17)) if kind == "quantized" else build(fastrnn, kind, 3, 17)
    for name, x in module.state_dict().items():
        for wrong in (x[:-1], x[None], x.new_empty(0), x.flatten()[0]):
            broken = {**module.state_dict(), name: wrong}
            with pytest.raises(RuntimeError, match=rf"size mismatch for {name}"):
                module.load_state_dict(broken)
    assert module(torch.randn(4, 2, 3))[0].shape == (4, 2, 17)


def test_no_code_is_run_from_data() -> None:
    """The package unpickles nothing, evaluates no text and starts no process."""
    for path in (ROOT / "fastrnn").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.partition(".")[0] for name in names} & {"pickle", "marshal", "subprocess", "shelve"}, (
                    path
                )
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "torch.load"), (path, called)


VALUES: tuple[Any, ...] = (None, "text", b"\xff", -1, 2**70, 3.5, float("nan"), [], [None], {}, np.zeros(0), object())


def broken_array(x: Any, rng: random.Random) -> Any:
    """An array of another shape or dtype, or something else."""
    axis = rng.randrange(x.ndim)
    ways = (
        lambda: x[None],
        lambda: x.flatten(),
        lambda: np.delete(x, 0, axis),
        lambda: x.take([], axis),
        lambda: x.astype("int64"),
        lambda: x.astype("complex128"),
        lambda: x.astype(object),
        lambda: x.astype(str),
        lambda: np.array(1.0),
        lambda: rng.choice(VALUES),
    )
    return rng.choice(ways)()


def assert_told(error: Exception) -> None:
    assert isinstance(error, (TypeError, ValueError)), f"{type(error).__name__}: {error}"
    assert len(str(error)) > 15, error


def test_broken_onnx_nodes() -> None:
    """Attributes of any value, inputs that are not there, arrays of any shape: an error that says so, or a module."""
    rng, errors = random.Random(0), 0
    for _ in range(600):
        kind = rng.choice(["LSTM", "GRU", "RNN", "RNN_RELU"])
        node, arrays = onnx_case(
            kind,
            rng.choice(["forward", "reverse", "bidirectional"]),
            given=rng.choice(["", "BLS", "BLSP"[: 4 if kind == "LSTM" else 3]]),
        )
        node = copy.deepcopy(node)
        for _ in range(rng.randint(1, 2)):
            what = rng.randrange(5)
            if what == 0:
                name = rng.choice(list(arrays))
                arrays[name] = broken_array(np.asarray(arrays[name]), rng) if getattr(arrays[name], "ndim", 0) else None
            elif what == 1:
                arrays.pop(rng.choice(list(arrays)))
            elif what == 2:
                attribute = rng.choice(node.attribute)
                attribute.i, attribute.s = rng.choice([-1, 0, 3, 2**40]), rng.choice([b"", b"\xff\xfe", b"forward"])
                attribute.strings = rng.choice([[], [b"\xff"], [b"Tanh"] * 9])
            elif what == 3:
                node.input = node.input[: rng.randint(1, len(node.input))]
            else:
                node.input[rng.randrange(len(node.input))] = rng.choice(["", "no such name", "X"])
            if not arrays:
                break
        try:
            layer = fastrnn.from_onnx(node, arrays)
        except Exception as error:
            assert_told(error)
            errors += 1
        else:
            assert isinstance(layer.module, torch.nn.Module)
    assert errors > 300


def test_broken_keras_layers() -> None:
    rng, errors = random.Random(0), 0
    for _ in range(600):
        kind = rng.choice(["LSTM", "GRU", "RNN"])
        layer: Layer = keras_layer(kind, keras_arrays(kind, 4))
        for _ in range(rng.randint(1, 2)):
            what = rng.randrange(4)
            if what == 0 and layer.arrays:
                k = rng.randrange(len(layer.arrays))
                layer.arrays[k] = (
                    broken_array(np.asarray(layer.arrays[k]), rng) if getattr(layer.arrays[k], "ndim", 0) else None
                )
            elif what == 1:
                layer.arrays = layer.arrays[: rng.randrange(3)]
            elif what == 2:
                layer.config[rng.choice(list(layer.config))] = rng.choice(VALUES)
            else:
                layer.config.pop(rng.choice(list(layer.config)), None)
            if not layer.config:
                break
        try:
            module = fastrnn.from_keras(layer)
        except Exception as error:
            assert_told(error)
            errors += 1
        else:
            assert isinstance(module, torch.nn.Module)
    assert errors > 300
