"""tools/stable_abi.py: an op by torch's usual C++ interface and by its stable ABI: they do the same, and are timed."""

import contextlib
import io
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import stable_abi  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")

T, B, I, H = 3, 2, 5, 4  # noqa: E741
NAMES = [argument.name for argument in torch.ops.fastrnn.layer_forward.default._schema.arguments]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the tool says. The libraries that it compiles, for a quarter of a minute, stay in this process."""
    options = ["--rounds", "2", "--calls", "3", "--under", sys.executable]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        stable_abi.main(["--folder", str(tmp_path_factory.mktemp("stable")), *options])
    return said.getvalue()


def test_the_tool_tells_times_and_what_runs(ran):
    rows = re.findall(r"^\| (.*) \| [\d.]+ us \([\d.]+\) \| [\d.]+ us \([\d.]+\) \|$", ran, re.M)
    assert len(rows) == 5 and rows[-1] == "`fastrnn.LSTM`"
    for kind in ("usual", "stable"):
        assert f"{kind} under torch {torch.__version__}: runs" in ran


def test_a_library_that_does_not_load_is_told(tmp_path):
    (tmp_path / "libstable.so").write_bytes(b"no library")
    assert stable_abi.under(sys.executable, "stable", tmp_path / "libstable.so").endswith(": file too short")


def arguments(**others):
    """Of every tensor that the op takes."""
    given = dict(zip(NAMES, stable_abi.arguments(), strict=False))
    state, rows = torch.zeros(2, B, H), torch.zeros(T, B, 2 * H)
    given.update(dict.fromkeys(("h_0", "c_0", "reset_h", "reset_c", "mask_h"), state), keep_h=rows, keep_c=rows)
    given.update(lengths=torch.tensor([3, 1]), resets=torch.zeros(T, B, dtype=torch.bool), input=torch.zeros(T, B, I))
    given.update(weight_ih=[torch.zeros(4 * H, I)] * 2, weight_hh=[torch.zeros(4 * H, H)] * 2, reverse=[False, True])
    given.update(bias_ih=[torch.zeros(4 * H)] * 2, bias_hh=[torch.zeros(4 * H)] * 2)
    return given | others


def outcome(kind, given):
    """Sizes and dtypes, or an error's type and what it begins with."""
    try:
        return [(x.shape, x.dtype) for x in getattr(torch.ops, stable_abi.space(kind)).layer_forward(**given)]
    except Exception as error:
        return type(error), re.search(r"\w+: [^\n.]*", str(error).rpartition("layer_forward, ")[2])[0]


@pytest.mark.parametrize(
    ("others", "wrong"),
    [
        ({}, None),
        ({"save": True, "all_states": True}, None),
        ({"lengths": None, "resets": None, "keep_h": None, "h_0": None}, None),
        ({"cell": "gru"}, "cell: expected 'lstm'"),
        ({"input": torch.zeros(T, B, I + 1)}, "weight_ih: other sizes"),
        ({"mask_h": torch.zeros(2, B, H, dtype=torch.float64)}, "mask_h: another dtype"),
        ({"resets": torch.zeros(T, B)}, "resets: another dtype"),
        ({"c_0": torch.zeros(2, H, B).mT}, "c_0: not contiguous"),
        ({"bias_hh": []}, "bias_hh: another number of groups"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_both_give_the_same(others, wrong, ran):
    usual = outcome("usual", arguments(**others))
    assert outcome("stable", arguments(**others)) == outcome("stable_by_name", arguments(**others)) == usual
    if wrong:
        assert usual[0] is RuntimeError and usual[1].startswith(wrong)
    else:
        saved = torch.Size([T, B, 10 * H] if others.get("save") else [0])
        assert [size for size, _ in usual] == [(T, B, 2 * H), (2, B, H), (2, B, H), usual[3][0], saved]
