"""docs/architecture.md: the cell that it adds is one."""

import re
import subprocess
from pathlib import Path

import torch

from fastrnn import reference

ROOT = Path(__file__).resolve().parents[2]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)


def test_the_cell_of_the_page_is_right(tmp_path):
    """Registered beside the others, with its backward against central differences of its forward."""
    header, line = blocks("cpp")
    (tmp_path / "leaky.h").write_text(header.replace('"activations.h"', '"cells/activations.h"'))
    (tmp_path / "more.h").write_text(f'#include "leaky.h"\n#define FASTRNN_FOR_EACH_MORE_CELL(X) {line}')
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    command += ['-DFASTRNN_MORE_CELLS="more.h"', str(ROOT / "tests/cpp/test_cells.cpp"), "-o", str(tmp_path / "cells")]
    subprocess.run(command, check=True)
    done = subprocess.run([str(tmp_path / "cells")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^leaky .* ok$", done.stdout, re.M)


def test_the_equation_of_the_page_is_right():
    """Its backward is what torch makes of its forward, the gradient of the saved value included."""
    (text,) = blocks("python")
    space = {"CELLS": {}, "Cell": reference.Cell}
    exec(text, space)
    cell = space["CELLS"]["leaky"]
    gates_ih, gates_hh, h = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    a = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    (after,), (n,) = cell.forward((gates_ih,), (gates_hh,), (h,), (a,))
    grad, grad_n = torch.randn_like(after), torch.randn_like(n)
    want = torch.autograd.grad((after, n), (gates_ih, gates_hh, h, a), (grad, grad_n))
    got = [x for (x,) in cell.backward((n,), (h,), (after,), (grad,), (grad_n,), (a,))]
    got[3] = got[3].sum(0)  # every row has its own
    torch.testing.assert_close(got, list(want))
