"""Weights in files of other packages: whole ones give what was saved, broken ones an error and never other weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import pytest
import torch
from torch import Tensor, nn

import fastrnn

from ..helpers import CELL_KINDS, KINDS, LIKE_GRU, build
from .packages import needs

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
SafetensorError = needs("safetensors").SafetensorError
load, load_file, save_file = (getattr(needs("safetensors.torch"), x) for x in ("load", "load_file", "save_file"))
onnx = needs("onnx")
DecodeError = needs("google.protobuf.message").DecodeError
keras = needs("keras")

MODULES: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: build(fastrnn, kind, 3, 17) for kind in (*KINDS, *CELL_KINDS, *LIKE_GRU, "SLSTM")},
    "options": lambda: fastrnn.LSTM(3, 16, 2, bidirectional=True, peephole=True, num_heads=2, learn_initial_state=True),
    "proj_size": lambda: fastrnn.LSTM(3, 17, 2, proj_size=5, bias=False, dtype=torch.bfloat16),
    "layer_norm": lambda: fastrnn.GRU(3, 17, layer_norm=True, dtype=torch.float16),
    "by token": lambda: fastrnn.GRU(9, 17, token_input=True).store_by_token(),
    "fake_quantize": lambda: fastrnn.fake_quantize(fastrnn.RNN(3, 17)),
    "int8": lambda: fastrnn.quantize(fastrnn.LSTM(3, 17, 2, bidirectional=True)),
    "bfloat16": lambda: fastrnn.quantize(fastrnn.MGU(3, 17), torch.bfloat16),
}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        x.dtype == wanted[name].dtype and torch.equal(x, wanted[name]) for name, x in found.items()
    )


def cut(data: bytes) -> Iterator[bytes]:
    """Files that end too early: at every byte of the beginning and the end, and at some between."""
    last = len(data) - 24
    return (data[:end] for end in sorted({*range(24), *range(24, last, len(data) // 25), *range(last, len(data))}))


def flipped(data: bytes) -> Iterator[bytes]:
    """Each has one other bit than data."""
    for at in range(8 * len(data)):
        yield data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


# ---- safetensors ----


@pytest.mark.parametrize("name", MODULES)
def test_safetensors(name: str, tmp_path: Path) -> None:
    """Another module has the weights then, and its own strides. (They are saved contiguous: other strides, as those of
    weights by token, are refused.)"""
    module, other = MODULES[name](), MODULES[name]()
    wanted = module.state_dict()
    save_file({name: x.contiguous() for name, x in wanted.items()}, tmp_path / "weights")
    strides = [x.stride() for x in other.state_dict().values()]
    other.load_state_dict(load_file(tmp_path / "weights"))
    assert same(other.state_dict(), wanted)
    assert [x.stride() for x in other.state_dict().values()] == strides


@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "int8"])
def test_broken_safetensors(name: str, tmp_path: Path) -> None:
    """The file is none, or a module refuses the names and sizes in it: with any bit of the header flipped, too."""
    module, path = MODULES[name](), tmp_path / "weights"
    save_file(module.state_dict(), path)
    data = path.read_bytes()
    for broken in cut(data):
        path.write_bytes(broken)
        with pytest.raises((SafetensorError, RuntimeError)):
            module.load_state_dict(load_file(path))
    header = 8 + int.from_bytes(data[:8], "little")  # the number is the size of what describes the tensors
    for broken in flipped(data[:header]):
        with pytest.raises((SafetensorError, RuntimeError)):
            module.load_state_dict(load(broken + data[header:]))


# ---- ONNX and Keras ----


def check_cuts(path: Path, read: Callable[[], dict[str, Tensor]], *errors: type[Exception]) -> None:
    """A file that ends too early gives one of the errors, or lacks what is of no use and has all the weights."""
    data, whole, told = path.read_bytes(), read(), 0
    for broken in cut(data):
        path.write_bytes(broken)
        try:
            found = read()
        except errors:
            told += 1
        else:
            assert same(found, whole)
    assert told > 40


@pytest.mark.parametrize("kind", KINDS)
def test_cut_onnx(kind: str, tmp_path: Path) -> None:
    path, module = tmp_path / "model.onnx", build(fastrnn, kind, 3, 17)

    def read() -> dict[str, Tensor]:
        graph = onnx.load(path).graph
        (node,) = (x for x in graph.node if x.op_type in ("LSTM", "GRU", "RNN"))  # ValueError: there is none
        return fastrnn.from_onnx(node, {x.name: x for x in graph.initializer}).module.state_dict()

    onnx.save(fastrnn.to_onnx(module), path)
    assert same(read(), module.state_dict())
    check_cuts(path, read, DecodeError, ValueError)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_cut_keras(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    model = keras.Sequential([keras.Input((5, 3)), getattr(keras.layers, kind)(17)])

    def read() -> dict[str, Tensor]:
        return fastrnn.from_keras(keras.saving.load_model(path).layers[0]).state_dict()

    model.save(path)
    assert same(read(), fastrnn.from_keras(model.layers[0]).state_dict())
    check_cuts(path, read, BadZipFile, ValueError)
