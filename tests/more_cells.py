"""The equations of the cell in more_cells.h, as reference.py has those of the package's cells.

The kernels of every device are compiled with it and compared with these equations: what a new cell needs
is its header, its line in the registry and its entry in ``reference.CELLS``, and nothing else.
"""

import re
from pathlib import Path

import torch

from fastrnn.reference import Cell, States

HEADER = Path(__file__).parent / "more_cells.h"
# The compiler's flag for kernels of the package's cells and these.
WITH_MORE_CELLS = f'-DFASTRNN_MORE_CELLS="{HEADER}"'
# Kernels compile for much longer than tests run them. So they are not optimised, and calls stay calls: always_inline,
# without its leading underscores, is what the project's own headers say, and its copies of a function at every call are
# most of what an unoptimised kernel consists of.
QUICKLY = ("-O0", "-Dalways_inline=unused")
AROUND_KERNELS = ("recurrent", "plan", "team", "processors")  # files of csrc/cpu that every instruction set shares


def only(*cells: str) -> str:
    """One more, by which there are no others of the package's cells than `cells`: each takes its time to compile."""
    registry = (Path(__file__).parents[1] / "csrc/cells/registry.h").read_text()
    lines = {name: line for line, name in re.findall(r'(X\("(\w+)", .*\))', registry)}
    return f"-DFASTRNN_FOR_EACH_CELL(X)={' '.join(lines[cell] for cell in cells)} FASTRNN_FOR_EACH_MORE_CELL(X)"


EPSILON = 1e-2


def _norm_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    variance, mean = torch.var_mean(gates_hh[0], -1, correction=0, keepdim=True)
    scale = (variance + EPSILON).rsqrt().expand_as(gates_hh[0])
    n = (gates_hh[0] - mean) * scale
    return ((gates_ih[0] + params[0] * n).tanh(),), (n, scale)


def _norm_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    n, scale = saved
    grad = grads[0] * (1 - states[0] * states[0])
    grad_n, grad_scale = grad * params[0], torch.zeros_like(grad)
    if grad_saved is not None:
        grad_n, grad_scale = grad_n + grad_saved[0], grad_scale + grad_saved[1]
    # the scale's gradient arrives through n and, where it was saved, through that
    grad_scale = (grad_n * n).mean(-1, keepdim=True) + scale * grad_scale.mean(-1, keepdim=True)
    grad_hh = scale * (grad_n - grad_n.mean(-1, keepdim=True) - n * grad_scale)
    return (grad,), (grad_hh,), (torch.zeros_like(grad),), (grad * n,)


MORE_CELLS = {
    "norm": Cell(1, 2, 1, _norm_forward, _norm_backward, params=1, separate_gates_hh=True),
}
