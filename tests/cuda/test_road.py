"""The Python road of CUDA calls, without a GPU: no op mixes devices, none waits for the device, all can be captured in
a CUDA graph. pretend_cuda.py is the device, calls.py the calls.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastrnn
from tests.helpers import KINDS, LIKE_GRU, build

ROOT = Path(__file__).resolve().parents[2]
STARTS = ("functional", "LSTMCell", "GRUCell", "RNNCell", *(f"{kind}," for kind in (*KINDS, *LIKE_GRU)))


@pytest.fixture(scope="module")
def road():
    done = subprocess.run([sys.executable, "-m", "tests.cuda.calls"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of_kind(road, kind):
    found = {name: record for name, record in road.items() if name.startswith(kind)}
    assert found
    return found


@pytest.mark.parametrize("kind", STARTS)
def test_every_call_runs_and_is_right(road, kind):
    for name, record in of_kind(road, kind).items():
        assert not record["error"], f"{name}:\n{record['error']}"
        assert record["off"] < 1e-5, f"{name}: off by {record['off']}"


@pytest.mark.parametrize("kind", STARTS)
def test_nothing_waits_or_copies_from_the_host(road, kind):
    """So all of it can be captured. What is left are copies that wait for nothing: of lengths that the user has on the
    host, and under vmap of a packed sequence's lengths and its rows' places."""
    copy = "aten._to_copy.default: copies {} from host to device"
    left = {"lengths of the host": [copy.format([3])], "vmap, packed": [copy.format([3]), copy.format([7])]}
    for name, record in of_kind(road, kind).items():
        assert record["told"] == next((told for case, told in left.items() if case in name), []), name


def test_float32_products_are_ours(road):
    """ATen's obey the switch of torch.backends.cuda.matmul, which torch.nn's cells obey and its layers do not. A layer
    is one op each way, which sees to it (tests/cuda/test_products.py)."""
    others = ("double backward", "vmap", "bfloat16", "Cell", "step")
    aten = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
    seen = 0
    for name, record in road.items():
        if not any(other in name for other in others):
            assert not aten & set(record["ops"]), name
            assert "fastrnn.layer_forward.default" in record["ops"], name
            seen += "fastrnn.layer_backward.default" in record["ops"]
    assert seen > 50


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_hold_nothing_of_the_host(kind):
    """A constant tensor in a compiled training step would be copied to the device in every call."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    module = build(fastrnn, kind, 4, 6, bidirectional=True)
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    resets = torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    compiled(torch.randn(3, 2, 4), resets=resets, lengths=torch.tensor([3, 2]))[0].sum().backward()
    assert len(graphs) == 2
    for node in (node for graph in graphs for node in graph.graph.nodes):
        assert node.op != "get_attr" and "lift_fresh" not in str(node.target), node.format_node()


def test_the_device_tells():
    """What the walk would find, on the device itself."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


FAULTS = """
import os
import torch
from tests.cuda.pretend_cuda import DEVICE, Device, to_device

x, host = to_device(torch.arange(4.0)), torch.arange(4)


def told(function):
    with Device() as device:
        function()
    return device.told


assert x.is_cuda and x.device == DEVICE and not told(lambda: x * 2 + torch.ones(4, device=DEVICE))
try:
    told(lambda: x < host)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise AssertionError("mixed devices passed")
for fault, what in {
    lambda: torch.tensor([1, 2], device=DEVICE): "from host to device, and waits",
    lambda: host.to(DEVICE): "from host to device, and waits",
    lambda: x.cpu(): "from device to host, and waits",
    lambda: x[host]: "copies indices",
    lambda: x[x > 2]: "looks at values",
    lambda: x.nonzero(): "looks at values",
    lambda: int(x[0]): "looks at values",
    lambda: bool(x.sum() > 2): "looks at values",
}.items():
    assert len(found := told(fault)) == 1 and what in found[0], (what, found)
os._exit(0)
"""
