"""Constructors and calls as help(), inspect and type checkers show them. torch.nn beside: test_surface.py."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from fastrnn.options import SWITCHES, VALUES
from tests.helpers import build

LAYERS = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LiGRU", "MGU"])
X = torch.zeros(3, 2, 4)


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


@LAYERS
def test_options(name: str) -> None:
    """Each is a keyword, and an instance without it reads the default from its class."""
    options = {k: p.default for k, p in parameters(getattr(fastrnn, name)).items() if p.kind is p.KEYWORD_ONLY}
    lstms = {"return_all_states", "peephole", "forget_bias"}
    lacking = {"LSTM": {"reset_after"}, "GRU": lstms}.get(name, lstms | {"layer_norm", "reset_after"})
    assert set(options) == {*SWITCHES, *VALUES} - lacking
    for option, default in options.items():
        assert default == getattr(getattr(fastrnn, name), option)


@LAYERS
def test_help_tells_every_argument(name: str) -> None:
    """Each with its default and a text, in one place of the class's own help."""
    cls = getattr(fastrnn, name)
    shown = pydoc.plain(pydoc.render_doc(cls))
    head = shown[: shown.index("Method resolution order")]
    assert "*args" not in head
    # Above the text stands the signature, which Python 3.13 shows a line an argument.
    head = head[head.index(inspect.getdoc(cls).partition("\n")[0]) :]
    for argument, p in parameters(cls).items():
        default = "" if p.default is p.empty else f" (default {p.default!r})"
        assert len(re.findall(rf"(?m)^ \|\s+{re.escape(argument + default)}: \S+", head)) == 1, argument
    for argument, p in parameters(cls.forward).items():
        how = ("by keyword, " if p.kind is p.KEYWORD_ONLY else "") + f"default {p.default!r}"
        told = argument if p.default is p.empty else f"{argument} ({how})"
        assert re.search(rf"(?m)^ \|\s+{re.escape(told)}: \S+", head), argument
    assert ("return_all_states (default" in head) == ("peephole (default" in head) == (name == "LSTM")


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LiGRU", "MGU", "LSTMCell", "GRUCell", "RNNCell"])
def test_an_unknown_argument_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}.__init__\(\) got an unexpected keyword argument 'batchfirst'"):
        getattr(fastrnn, name)(3, 4, batchfirst=True)
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'length'"):
        getattr(fastrnn, name)(4, 6)(X[0], length=3)


def test_a_projection_of_gru_by_position() -> None:
    """torch.nn makes a module whose calls fail."""
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN or GRU"):
        fastrnn.GRU(4, 6, 1, True, False, 0.0, False, 3)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_RELU", "MGU"])
def test_subclasses_pass_arguments_on(kind: str) -> None:
    class Own(getattr(fastrnn, kind.partition("_")[0])):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    options = {"nonlinearity": "relu"} if kind == "RNN_RELU" else {}
    module = Own(4, 6, num_layers=2, grad_clip=1.0, **options)
    assert (module.num_layers, module.grad_clip) == (2, 1.0)
    assert module.mode == kind


def test_quantized_classes_are_not_constructed() -> None:
    made = fastrnn.quantize(fastrnn.GRU(4, 6))
    with pytest.raises(TypeError, match=r"QuantizedGRU is made by fastrnn.quantize\(module\)"):
        type(made)(4, 6)


@pytest.mark.parametrize("kind", ["RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LiGRU"])
def test_made_in_a_compiled_function(kind: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return build(fastrnn, kind, 4, 6)(x)[0]

    assert torch.compile(function, backend="eager")(X).shape == (3, 2, 6)


CHECKED = """\
import torch
from torch.nn.utils.rnn import PackedSequence
import fastrnn

def check(x: torch.Tensor, packed: PackedSequence) -> None:
    lstm = fastrnn.LSTM(4, 6, 2, batch_first=True, token_input=True, device="cpu", dtype=torch.float64)
    output, (h_n, c_n) = lstm(x, (x, x), lengths=x, resets=x, reset_state=None)
    rnn = fastrnn.RNN(4, 6, 1, "relu", grad_clip=1.0, recompute=2)
    reveal_type(lstm(x))  # tuple[Any, tuple[Any, Any]]
    reveal_type(rnn(x))  # tuple[Any, Any]
    reveal_type(fastrnn.LSTMCell(4, 6)(x))  # tuple[Any, Any]
    fastrnn.LSTM(3, 4, batchfirst=True)  # "batchfirst"
    fastrnn.GRU(3, 4, batchfirst=True)  # "batchfirst"
    fastrnn.RNN(3, 4, dropuot=0.1)  # "dropuot"
    fastrnn.MGU(3, 4, layer_norm=True)  # "layer_norm"
    fastrnn.GRU(3, 4, return_all_states=True)  # "return_all_states"
    fastrnn.RNN(3, 4, 1, False)  # Argument 4
    lstm(x, length=x)  # "length"
    rnn(x, reset=x)  # "reset"
    fastrnn.LSTMCell(4, 6)(x, state=(x, x))  # "state"
"""


def test_a_type_checker_finds_misspelt_arguments(tmp_path: Path) -> None:
    """Without torch's own types, which take most of a minute to read: tensors are Any."""
    pytest.importorskip("mypy")
    source, config = tmp_path / "snippet.py", tmp_path / "mypy.ini"
    source.write_text(CHECKED)
    root = Path(fastrnn.__file__).parent.parent
    config.write_text(f"[mypy]\nmypy_path = {root}\ncache_dir = {tmp_path}\n[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(source)]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    found: dict[int, str] = {}
    for line, text in re.findall(r"(?m)^.*snippet\.py:(\d+): (.*)$", told):
        found[int(line)] = found.get(int(line), "") + text
    lines = dict(enumerate(CHECKED.splitlines(), 1))
    expected = {n: line.rpartition("  # ")[2] for n, line in lines.items() if "  # " in line}
    assert found.keys() == expected.keys(), told
    for n, part in expected.items():
        assert part in found[n], found[n]
