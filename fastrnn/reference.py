"""The recurrence in plain PyTorch: a loop over time, any float dtype, any device, differentiable to any order.

This is the readable oracle that every kernel is tested against, and what derivatives run that no kernel has. It is
the one deliberate second copy of the formulas in ``csrc/cells``. Half types are computed in float32.

Letters: T steps, B batch, P groups, G gates, h hidden units of a group, R width of a group's state 0 (h, or the
projected size), S saved values, C states besides h, which a call has side by side as one tensor named c. Results that
do not apply have size 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """What happens to the units of a row in one step; ``csrc/cells`` has the same formulas for the kernels.

    All tensors are [B, P, h], but for parameters, [P, h]; sequences run over gates, states, saved values or parameters.
    """

    gates: int
    saved: int  # the cell's own values, without the states
    states: int
    # (gates_ih, gates_hh, states before, params) -> (states after, saved values)
    forward: Callable[[States, States, States, States], tuple[States, States]]
    # (saved, states before, states after, grad of states after, grad of saved or None, params)
    # -> (grad_gates_ih, grad_gates_hh, grad of states before without the recurrent product's part, grad of params: of
    # each row its own)
    backward: Callable[..., tuple[States, States, States, States]]
    params: int = 0  # vectors of one number per unit, beside the weights
    separate_gates_hh: bool = False  # grad_gates_hh differs from grad_gates_ih
    # (saved, states before) -> the last of the states, as forward made it: what zoneout leaves of it is another. None:
    # it is kept beside the saved values, unless backward does not read states after. More states than two: no zoneout.
    remake: Callable[[States, States], Tensor] | None = None
    reads_state: bool = True
    saves_hidden: bool = False  # the last saved value is what a projection multiplies, and not o of o tanh(c)
    # The recurrent product of so many of the last gates is not with h, but with a vector that the other gates make of
    # it, late_input(gates_ih, the other gates_hh, h), the first saved value times h. (What is h here is the masked h
    # under recurrent dropout, whose mask the vector's gradient has in it, too.) backward has one argument more
    # then: a function from the gradients of those gates to that of the vector.
    late: int = 0
    late_input: Callable[[States, States, Tensor], Tensor] | None = None


def _lstm_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    i, f, g, o = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * states[1] + i * g
    return (o * c.tanh(), c), (i, f, g, o)


def _lstm_remake(saved: States, states_prev: States) -> Tensor:
    i, f, g, _ = saved
    return f * states_prev[1] + i * g


def _lstm_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    i, f, g, o = saved
    tanh_c = states[1].tanh()
    grad_c = grads[1] + grads[0] * o * (1 - tanh_c * tanh_c)
    pulled = [grad_c * g, grad_c * states_prev[1], grad_c * i, grads[0] * tanh_c]
    if grad_saved is not None:
        pulled = [a + b for a, b in zip(pulled, grad_saved, strict=True)]
    gates = (
        pulled[0] * i * (1 - i),
        pulled[1] * f * (1 - f),
        pulled[2] * (1 - g * g),
        pulled[3] * o * (1 - o),
    )
    return gates, gates, (torch.zeros_like(grads[0]), grad_c * f), ()


def _lstm_peephole_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    i, f, g, o = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    i, f, g = (i + params[0] * states[1]).sigmoid(), (f + params[1] * states[1]).sigmoid(), g.tanh()
    c = f * states[1] + i * g
    o = (o + params[2] * c).sigmoid()
    return (o * c.tanh(), c), (i, f, g, o)


def _lstm_peephole_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    i, f, g, o = saved
    extra = grad_saved if grad_saved is not None else (0, 0, 0, 0)
    tanh_c = states[1].tanh()
    grad_o = (grads[0] * tanh_c + extra[3]) * o * (1 - o)
    grad_c = grads[1] + grads[0] * o * (1 - tanh_c * tanh_c) + grad_o * params[2]
    grad_i = (grad_c * g + extra[0]) * i * (1 - i)
    grad_f = (grad_c * states_prev[1] + extra[1]) * f * (1 - f)
    gates = grad_i, grad_f, (grad_c * i + extra[2]) * (1 - g * g), grad_o
    before = torch.zeros_like(grads[0]), grad_c * f + grad_i * params[0] + grad_f * params[1]
    return gates, gates, before, (grad_i * states_prev[1], grad_f * states_prev[1], grad_o * states[1])


def _gru_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    r = (gates_ih[0] + gates_hh[0]).sigmoid()
    z = (gates_ih[1] + gates_hh[1]).sigmoid()
    n = (gates_ih[2] + r * gates_hh[2]).tanh()
    return (n + z * (states[0] - n),), (r, z, n, gates_hh[2])


def _gru_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    r, z, n, n_hh = saved
    extra = grad_saved if grad_saved is not None else (0, 0, 0, 0)
    grad_n = (grads[0] * (1 - z) + extra[2]) * (1 - n * n)
    grad_r = (grad_n * n_hh + extra[0]) * r * (1 - r)
    grad_z = (grads[0] * (states_prev[0] - n) + extra[1]) * z * (1 - z)
    return (grad_r, grad_z, grad_n), (grad_r, grad_z, grad_n * r + extra[3]), (grads[0] * z,), ()


def _gru_reset_before_forward(
    gates_ih: States, gates_hh: States, states: States, params: States
) -> tuple[States, States]:
    r, z, n = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    r, z, n = r.sigmoid(), z.sigmoid(), n.tanh()
    return (n + z * (states[0] - n),), (r, z, n)


def _gru_reset_before_backward(
    saved: States,
    states_prev: States,
    states: States,
    grads: States,
    grad_saved: States | None,
    params: States,
    through_late: Callable[[States], Tensor],
) -> tuple[States, States, States, States]:
    r, z, n = saved
    extra = grad_saved if grad_saved is not None else (0, 0, 0)
    grad_n = (grads[0] * (1 - z) + extra[2]) * (1 - n * n)
    grad_rh = through_late((grad_n,))
    grad_r = (grad_rh * states_prev[0] + extra[0]) * r * (1 - r)
    grad_z = (grads[0] * (states_prev[0] - n) + extra[1]) * z * (1 - z)
    gates = grad_r, grad_z, grad_n
    return gates, gates, (grads[0] * z + grad_rh * r,), ()


def _ligru_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    z, n = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    z, n = z.sigmoid(), n.relu()
    return (n + z * (states[0] - n),), (z, n)


def _ligru_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    z, n = saved
    extra = grad_saved if grad_saved is not None else (0, 0)
    grad_z = (grads[0] * (states_prev[0] - n) + extra[0]) * z * (1 - z)
    grad_n = (grads[0] * (1 - z) + extra[1]) * (~(n <= 0)).to(n.dtype)
    return (grad_z, grad_n), (grad_z, grad_n), (grads[0] * z,), ()


def _mgu_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    f, n = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    f, n = f.sigmoid(), n.tanh()
    return (states[0] + f * (n - states[0]),), (f, n)


def _mgu_backward(
    saved: States,
    states_prev: States,
    states: States,
    grads: States,
    grad_saved: States | None,
    params: States,
    through_late: Callable[[States], Tensor],
) -> tuple[States, States, States, States]:
    (f, n), (h,) = saved, states_prev
    extra = grad_saved if grad_saved is not None else (0, 0)
    grad_n = (grads[0] * f + extra[1]) * (1 - n * n)
    grad_fh = through_late((grad_n,))
    grad_f = (grads[0] * (n - h) + grad_fh * h + extra[0]) * f * (1 - f)
    return (grad_f, grad_n), (grad_f, grad_n), (grads[0] * (1 - f) + grad_fh * f,), ()


def _first_gate_times_h(gates_ih: States, gates_hh: States, h: Tensor) -> Tensor:
    """``Cell.late_input`` of a cell whose first gate multiplies h before the product."""
    return (gates_ih[0] + gates_hh[0]).sigmoid() * h


def _slstm_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    i, f, z, o = (a + b for a, b in zip(gates_ih, gates_hh, strict=True))
    _, c, n, m = states
    z, o = z.tanh(), o.sigmoid()
    past = torch.nn.functional.logsigmoid(f) + m
    after_m = torch.where(n == 0, i, torch.maximum(past, i))
    of_past, of_new = (past - after_m).clamp(max=0).exp(), (i - after_m).exp()
    c, n = of_past * c + of_new * z, of_past * n + of_new
    return (o * (c / n), c, n, after_m), (past - i, (-f).sigmoid(), z, o)


def _slstm_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    distance, slope, z, o = saved
    (_, c, n, _), (_, after_c, after_n, _) = states_prev, states
    extra = grad_saved if grad_saved is not None else (0, 0, 0, 0)
    unseen, above = n == 0, distance > 0
    of_past, of_new = distance.clamp(max=0).exp(), torch.where(unseen, 0, -distance.clamp(min=0)).exp()
    divisor = torch.where(after_n == 0, 1, after_n)  # it is 0 behind a row's end, where all else is, too
    ratio, grad_ratio = after_c / divisor, grads[0] * o / divisor
    grad_c, grad_n = grads[1] + grad_ratio, grads[2] - grad_ratio * ratio
    grad_of_past = torch.where(unseen & above, 0, of_past * (grad_c * c + grad_n * n))
    grad_of_new = of_new * (grad_c * z + grad_n)
    part = torch.where(unseen, 0, (1 + distance.sign()) / 2)  # of m' that is the past's; at equality a half
    grad_past = (1 - part) * grad_of_past + part * (grads[3] - grad_of_new) + extra[0]
    grad_i = part * grad_of_new + (1 - part) * (grads[3] - grad_of_past) - extra[0]
    gates = (
        grad_i,
        grad_past * slope - extra[1] * slope * (1 - slope),
        (grad_c * of_new + extra[2]) * (1 - z * z),
        (grads[0] * ratio + extra[3]) * o * (1 - o),
    )
    return gates, gates, (torch.zeros_like(grads[0]), grad_c * of_past, grad_n * of_past, grad_past), ()


EPSILON = 1e-5  # of layer normalization, as of torch.nn.LayerNorm


def _centred(a: Tensor) -> Tensor:
    return a - a.mean(-1, keepdim=True)


def _scale(deviation: Tensor) -> Tensor:
    """What a vector's deviations from its mean are multiplied with: one number for every row."""
    return ((deviation * deviation).mean(-1, keepdim=True) + EPSILON).rsqrt()


def _normalised(deviations: Sequence[Tensor], params: States) -> list[Tensor]:
    """Layer normalization (Ba, Kiros & Hinton 2016), each vector by itself; its gains stand before all biases."""
    gains, biases = params[: len(deviations)], params[len(deviations) :]
    return [d * _scale(d) * gain + bias for d, gain, bias in zip(deviations, gains, biases, strict=False)]


def _through_norm(grad: Tensor, deviation: Tensor, gain: Tensor, extra: Tensor | int) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and, of each row, of the gain; from that of the result, and ``extra`` of the
    deviation itself."""
    scale = _scale(deviation)
    n, grad_n = deviation * scale, grad * gain
    return _centred(scale * (grad_n - n * (grad_n * n).mean(-1, keepdim=True)) + extra), grad * n


def _gates_through_norm(
    grads: Sequence[Tensor], deviations: States, params: States, extra: Sequence[Tensor | int]
) -> tuple[States, States, States]:
    """The gradients of gates_ih and gates_hh, and of gains and biases, from those of all the normalised."""
    count = len(grads)
    of_vectors = zip(grads, deviations, params[:count], extra, strict=True)
    gates, gains = zip(*(_through_norm(*x) for x in of_vectors), strict=True)
    return gates[: count // 2], gates[count // 2 :], (*gains, *grads)


def _lstm_norm_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    deviations = [_centred(a) for a in (*gates_ih, *gates_hh)]
    y = _normalised(deviations, params[:16])
    i, f, g, o = (a + b for a, b in zip(y[:4], y[4:], strict=True))
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * _normalised([_centred(c)], params[16:])[0].tanh()
    return (h, c), (*deviations, h)


def _lstm_norm_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    extra = grad_saved if grad_saved is not None else (0,) * 9
    y = _normalised(saved[:8], params[:16])
    i, f, g, o = (a + b for a, b in zip(y[:4], y[4:], strict=True))
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    of_c, grad_h = _centred(states[1]), grads[0] + extra[8]
    tanh_c = _normalised([of_c], params[16:])[0].tanh()
    grad_y = grad_h * o * (1 - tanh_c * tanh_c)
    through, grad_gain = _through_norm(grad_y, of_c, params[16], 0)
    grad_c = grads[1] + through
    of_gates = (
        grad_c * g * i * (1 - i),
        grad_c * states_prev[1] * f * (1 - f),
        grad_c * i * (1 - g * g),
        grad_h * tanh_c * o * (1 - o),
    )
    gates_ih, gates_hh, of_params = _gates_through_norm(of_gates * 2, saved[:8], params, extra[:8])
    return gates_ih, gates_hh, (torch.zeros_like(grads[0]), grad_c * f), (*of_params, grad_gain, grad_y)


def _gru_norm_forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
    deviations = tuple(_centred(a) for a in (*gates_ih, *gates_hh))
    y = _normalised(deviations, params)
    r, z = (y[0] + y[3]).sigmoid(), (y[1] + y[4]).sigmoid()
    n = (y[2] + r * y[5]).tanh()
    return (n + z * (states[0] - n),), deviations


def _gru_norm_backward(
    saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
) -> tuple[States, States, States, States]:
    y = _normalised(saved, params)
    r, z = (y[0] + y[3]).sigmoid(), (y[1] + y[4]).sigmoid()
    n = (y[2] + r * y[5]).tanh()
    grad_n = grads[0] * (1 - z) * (1 - n * n)
    grad_r = grad_n * y[5] * r * (1 - r)
    grad_z = grads[0] * (states_prev[0] - n) * z * (1 - z)
    of_gates = (grad_r, grad_z, grad_n, grad_r, grad_z, grad_n * r)
    extra = grad_saved if grad_saved is not None else (0,) * 6
    gates_ih, gates_hh, of_params = _gates_through_norm(of_gates, saved, params, extra)
    return gates_ih, gates_hh, (grads[0] * z,), of_params


def _elman(activation: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Cell:
    def forward(gates_ih: States, gates_hh: States, states: States, params: States) -> tuple[States, States]:
        return (activation(gates_ih[0] + gates_hh[0]),), ()

    def backward(
        saved: States, states_prev: States, states: States, grads: States, grad_saved: States | None, params: States
    ) -> tuple[States, States, States, States]:
        gates = (grads[0] * slope(states[0]),)
        return gates, gates, (torch.zeros_like(grads[0]),), ()

    return Cell(1, 0, 1, forward, backward)


CELLS = {
    "lstm": Cell(4, 4, 2, _lstm_forward, _lstm_backward, remake=_lstm_remake),
    "gru": Cell(3, 4, 1, _gru_forward, _gru_backward, separate_gates_hh=True, reads_state=False),
    "rnn_tanh": _elman(torch.tanh, lambda y: 1 - y * y),
    "rnn_relu": _elman(torch.relu, lambda y: (~(y <= 0)).to(y.dtype)),
    "lstm_peephole": Cell(4, 4, 2, _lstm_peephole_forward, _lstm_peephole_backward, params=3, remake=_lstm_remake),
    "lstm_norm": Cell(
        4, 9, 2, _lstm_norm_forward, _lstm_norm_backward, params=18, separate_gates_hh=True, saves_hidden=True
    ),
    "gru_reset_before": Cell(
        3,
        3,
        1,
        _gru_reset_before_forward,
        _gru_reset_before_backward,
        reads_state=False,
        late=1,
        late_input=_first_gate_times_h,
    ),
    "ligru": Cell(2, 2, 1, _ligru_forward, _ligru_backward, reads_state=False),
    "mgu": Cell(2, 2, 1, _mgu_forward, _mgu_backward, reads_state=False, late=1, late_input=_first_gate_times_h),
    "slstm": Cell(4, 4, 4, _slstm_forward, _slstm_backward),
    "gru_norm": Cell(
        3, 6, 1, _gru_norm_forward, _gru_norm_backward, params=12, separate_gates_hh=True, reads_state=False
    ),
}


class _Walk:
    """What both passes share: the order in which each row of each group meets its steps.

    Step k of the walk is time ``index[k]``: k itself, or length - 1 - k for groups that run in reverse. In the walk's
    order every group runs forward, so the loops know no direction.
    """

    def __init__(
        self,
        T: int,
        B: int,
        P: int,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: Sequence[bool],
        device: torch.device,
    ) -> None:
        self.groups = P
        steps = torch.arange(T, device=device)[:, None, None]
        self.valid: Tensor | None = None  # [T, B, P]
        self.index: Tensor | None = None  # [T, B, P], where some group is reversed
        self.resets: Tensor | None = None  # [T, B, P]: a reset on entering step k of the walk
        ends: Tensor | int = T
        if lengths is not None:
            ends = (lengths if lengths.dim() == 2 else lengths[:, None]).to(device, non_blocking=lengths.is_cpu)
            self.valid = (steps < ends).expand(T, B, P)

        def of_groups(forwards: Tensor, backwards: Tensor) -> Tensor:
            """Each group's part of one of the two. Nothing tells the device which: a copy from the host waits."""
            both = backwards.expand(T, B, P), forwards.expand(T, B, P)
            return torch.cat([both[not back].narrow(2, p, 1) for p, back in enumerate(reverse)], 2)

        if any(reverse):
            self.index = of_groups(steps, torch.where(steps < ends, ends - 1 - steps, steps))
        if resets is not None:
            resets = (resets if resets.dim() == 3 else resets[..., None]).expand(T, B, P)
            if self.index is not None:
                # Entering time t from t + 1 crosses the boundary that resets[t + 1] stands for.
                shifted = torch.cat([resets[1:], torch.zeros_like(resets[:1])])
                entered = shifted.gather(0, self.index) & (steps > 0)
                resets = of_groups(resets, entered)
            self.resets = resets if self.valid is None else resets & self.valid

    def __call__(self, x: Tensor) -> Tensor:
        """[T, B, P, n] from time's order into the walk's, or back: the order is its own inverse."""
        if self.index is None:
            return x
        return x.gather(0, self.index[..., None].expand(x.shape))

    def restart(self, k: int, states: States, fresh: States) -> States:
        if self.resets is None:
            return states
        at = self.resets[k][..., None]
        return tuple(torch.where(at, b, a) for a, b in zip(states, fresh, strict=True))

    def previous(self, sequence: Tensor, start: Tensor, fresh: Tensor) -> Tensor:
        """The state before each step of the walk: sequence [T, B, P, n] holds those after, start [B, P, n]."""
        before = torch.cat([start[None], sequence[:-1]])
        return before if self.resets is None else torch.where(self.resets[..., None], fresh, before)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight in every group: [B, P, n] from [B, P, m] and [P, m, n]."""
    # bmm and not einsum, which legacy vmap (autograd.functional's vectorize=True) has no rule for
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def _stack(steps: list[Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack(steps) if steps else like.new_zeros(0, *shape)


def _keeps_made(rule: Cell, keep_h: Tensor | None, keep_c: Tensor | None) -> bool:
    """Is the last state, as the cell made it, one more saved value?"""
    return (keep_c if rule.states > 1 else keep_h) is not None and rule.reads_state and rule.remake is None


def _absent(x: Tensor) -> Tensor:
    return x.new_zeros(0)


def _states(rule: Cell, dtype: torch.dtype, P: int, h: Tensor, c: Tensor | None) -> States:
    """[B, P, n] each, of h [B, P*R] and c [B, P*C*h]."""
    split = [x.to(dtype).reshape(x.shape[0], P, x.shape[1] // P) for x in (h, c) if x is not None]
    return (split[0], *split[1].chunk(rule.states - 1, -1)) if rule.states > 2 else tuple(split)


def _joined(states: Sequence[Tensor]) -> Tensor:
    """c [.., P, C*h], of states [.., P, h]."""
    return states[0] if len(states) == 1 else torch.cat(list(states), -1)


def _params(params: Tensor | None, dtype: torch.dtype) -> States:
    return () if params is None else params.to(dtype).unbind(1)


def _keeps(
    rule: Cell, walk: _Walk, dtype: torch.dtype, keep_h: Tensor | None, keep_c: Tensor | None
) -> list[Tensor | None]:
    """[T, B, P, n] in the walk's order, of each state."""
    found: list[Tensor | None] = []
    for x in (keep_h, keep_c, *(None,) * rule.states)[: rule.states]:
        if x is not None:
            T, B, n = x.shape
            x = x.to(dtype).reshape(T, B, walk.groups, n // walk.groups)
            x = walk(x if walk.valid is None else torch.where(walk.valid[..., None], x, 0))
        found.append(x)
    return found


def _mask(mask_h: Tensor | None, P: int, dtype: torch.dtype) -> Tensor | None:
    return None if mask_h is None else mask_h.to(dtype).reshape(mask_h.shape[0], P, mask_h.shape[1] // P)


def _zoned_out(keep: Tensor | None, k: int, before: Tensor, made: Tensor) -> Tensor:
    return made if keep is None else keep[k] * before + (1 - keep[k]) * made


def _or_zeros(rule: Cell, states: States, h: Tensor | None, c: Tensor | None) -> States:
    """Others of the states' shapes, of h [B, P*R] and c [B, P*C*h], each of which may be absent for zeros."""
    like_h, like_c = states[0], states[1:]
    of_h = torch.zeros_like(like_h) if h is None else h.to(like_h.dtype).reshape(like_h.shape)
    if c is None or not like_c:
        return (of_h, *map(torch.zeros_like, like_c))
    B, P = like_h.shape[:2]
    return of_h, *c.to(like_h.dtype).reshape(B, P, c.shape[1] // P).chunk(rule.states - 1, -1)


def forward(
    cell: str,
    gates_ih: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    params: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    mask_h: Tensor | None,
    keep_h: Tensor | None,
    keep_c: Tensor | None,
    reverse: Sequence[bool],
    grad_clip: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``recurrent_forward`` without its ``save``.

    gates_ih [T, B, P*G*h]; weight_hh [P, G*h, R]; bias_hh [P, G*h]; weight_hr [P, R, h]; params [P, K, h], of a cell
    with parameters; h_0, reset_h and mask_h [B, P*R]; c_0 and reset_c [B, P*C*h]; lengths [B] or [B, P]; resets [T, B]
    or [T, B, P]; keep_h [T, B, P*R] and keep_c [T, B, P*h]; reverse: P flags.
    Returns output [T, B, P*R], h_n [B, P*R], c_n [B, P*C*h], saved [T, B, P*S*h].
    """
    dtype, wide = gates_ih.dtype, torch.promote_types(gates_ih.dtype, torch.float32)
    T, B, _ = gates_ih.shape
    P, Gh, _ = weight_hh.shape
    rule = CELLS[cell]
    walk = _Walk(T, B, P, lengths, resets, reverse, gates_ih.device)
    gates = gates_ih.to(wide).reshape(T, B, P, Gh)
    if walk.valid is not None:  # what stands in the padding must not reach a derivative either
        gates = torch.where(walk.valid[..., None], gates, 0)
    gates = walk(gates)
    weight = weight_hh.to(wide)
    states = _states(rule, wide, P, h_0, c_0)
    fresh = _or_zeros(rule, states, reset_h, reset_c)
    units = _params(params, wide)
    keeps, mask = _keeps(rule, walk, wide, keep_h, keep_c), _mask(mask_h, P, wide)
    early, h = rule.gates - rule.late, Gh // rule.gates
    keeps_made = _keeps_made(rule, keep_h, keep_c)

    def recurrent(x: Tensor, first: int, count: int) -> States:
        """The product of some gates with x, and their bias."""
        found = _product(x, weight.narrow(1, first * h, count * h).transpose(1, 2))
        if bias_hh is not None:
            found = found + bias_hh.to(wide).narrow(1, first * h, count * h)
        return found.chunk(count, -1)

    outputs: list[Tensor] = []
    kept: list[Tensor] = []
    for k in range(T):
        states = walk.restart(k, states, fresh)
        held = states  # a row without this step hands its state's gradient on untouched
        if grad_clip:
            states = tuple(torch.ops.fastrnn.clamp_gradient(s, grad_clip) for s in states)
        here = gates[k].chunk(rule.gates, -1)
        multiplied = states[0] if mask is None else states[0] * mask
        gates_hh = recurrent(multiplied, 0, early)
        if rule.late_input is not None:
            gates_hh += recurrent(rule.late_input(here, gates_hh, multiplied), early, rule.late)
        after, values = rule.forward(here, gates_hh, states, units)
        if weight_hr is not None:
            after = (_product(after[0], weight_hr.to(wide).transpose(1, 2)), *after[1:])
        made = after[-1:] if keeps_made else ()
        after = tuple(_zoned_out(x, k, *pair) for x, *pair in zip(keeps, states, after, strict=True))
        record = torch.cat([*values, *made, *after[1:], after[0][..., :0]], -1)  # of a cell that saves nothing, nothing
        output = after[0]
        if walk.valid is not None:
            valid = walk.valid[k][..., None]
            output, record = torch.where(valid, output, 0), torch.where(valid, record, 0)
            after = tuple(torch.where(valid, a, b) for a, b in zip(after, held, strict=True))
        states = after
        outputs.append(output)
        kept.append(record)
    R, width = weight_hh.shape[2], (rule.saved + keeps_made + rule.states - 1) * h
    output = walk(_stack(outputs, gates, (B, P, R))).reshape(T, B, P * R)
    saved = walk(_stack(kept, gates, (B, P, width))).reshape(T, B, P * width)
    c_n = _joined(states[1:]).flatten(1) if len(states) > 1 else _absent(gates)
    return output.to(dtype), states[0].flatten(1).to(dtype), c_n.to(dtype), saved.to(dtype)


def backward(
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    params: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    mask_h: Tensor | None,
    keep_h: Tensor | None,
    keep_c: Tensor | None,
    reverse: Sequence[bool],
    output: Tensor,
    saved: Tensor,
    initial: bool = True,
    grad_clip: float = 0.0,
    grad_saved: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``recurrent_backward``, from forward's output and saved, and differentiable in its turn.

    ``grad_saved`` [T, B, P*S*h] is the gradient of ``saved``, which only arises when a backward pass is differentiated.
    Returns the gradients of gates_ih [T, B, P*G*h], gates_hh (same shape; absent where equal), of the projection's
    result [T, B, P*R] (absent without weight_hr), h_0, c_0 (absent unless ``initial``), reset_h, reset_c and params:
    [B, P*K*h], a part for every row, in float32 where the dtype is a half type.
    """
    dtype, wide = output.dtype, torch.promote_types(output.dtype, torch.float32)
    T, B, _ = output.shape
    P, Gh, R = weight_hh.shape
    rule = CELLS[cell]
    h = Gh // rule.gates
    walk = _Walk(T, B, P, lengths, resets, reverse, output.device)
    weight = weight_hh.to(wide)
    start = _states(rule, wide, P, h_0, c_0)
    fresh = _or_zeros(rule, start, reset_h, reset_c)

    def sequence(x: Tensor) -> Tensor:
        return walk(x.to(wide).reshape(T, B, P, x.shape[-1] // P))

    def split(x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The cell's own values, the last state as the cell made it, where that is kept, and the states but h: each
        [T, B, P, h], out of [T, B, P*S*h]."""
        kept = rule.saved + _keeps_made(rule, keep_h, keep_c)
        pieces = [x.narrow(-1, k * h, h) for k in range(kept + rule.states - 1)]
        return pieces[: rule.saved], pieces[rule.saved : kept], pieces[kept:]

    values, made, states = split(sequence(saved))
    after = [sequence(output), *states]
    grad_values: list[Tensor] | None = None
    grad_states: list[Tensor] = []
    grad_made: list[Tensor] = []
    if grad_saved is not None:
        grad_saved = sequence(grad_saved)
        if walk.valid is not None:
            grad_saved = torch.where(walk.valid[..., None], grad_saved, 0)
        grad_values, grad_made, grad_states = split(grad_saved)
    before = [walk.previous(*x) for x in zip(after, start, fresh, strict=True)]
    keeps, mask = _keeps(rule, walk, wide, keep_h, keep_c), _mask(mask_h, P, wide)
    if made:  # the cell's backward asks for what it made
        after[-1] = made[0]
    elif rule.remake is not None and keeps[rule.states - 1] is not None:
        after[-1] = rule.remake(tuple(values), tuple(before))
    grad_outputs = None if grad_output is None else sequence(grad_output)

    grads = _or_zeros(rule, start, grad_h_n, grad_c_n)
    grad_fresh = tuple(torch.zeros_like(s) for s in start)
    units = _params(params, wide)
    grad_units = tuple(weight.new_zeros(B, P, h) for _ in units)
    gates_ih: list[Tensor] = []
    gates_hh: list[Tensor] = []
    projected: list[Tensor] = []
    early = (rule.gates - rule.late) * h

    def unmasked(grad: Tensor) -> Tensor:
        """The gradient of h, from that of what a product read."""
        return grad if mask is None else grad * mask

    def of_late_input(grads: States) -> Tensor:
        return unmasked(_product(torch.cat(grads, -1), weight.narrow(1, early, Gh - early)))

    through_late = [of_late_input] * bool(rule.late)
    for k in reversed(range(T)):
        held = None
        here = grads if grad_outputs is None else (grads[0] + grad_outputs[k], *grads[1:])
        if walk.valid is not None:  # padded steps hand the state's gradient on untouched
            valid = walk.valid[k][..., None]
            held = tuple(torch.where(valid, 0, g) for g in grads)
            here = tuple(torch.where(valid, g, 0) for g in here)
        if grad_states:
            here = (here[0], *(g + e[k] for g, e in zip(here[1:], grad_states, strict=True)))
        kept = tuple(None if x is None else x[k] * g for x, g in zip(keeps, here, strict=True))
        here = tuple(g if x is None else (1 - x[k]) * g for x, g in zip(keeps, here, strict=True))
        if grad_made:
            here = (*here[:-1], here[-1] + grad_made[0][k])
        if weight_hr is not None:
            projected.append(here[0])
            here = (_product(here[0], weight_hr.to(wide)), *here[1:])
        grad_ih, grad_hh, grads, here_units = rule.backward(
            tuple(v[k] for v in values),
            tuple(v[k] for v in before),
            tuple(v[k] for v in after),
            here,
            None if grad_values is None else tuple(v[k] for v in grad_values),
            units,
            *through_late,
        )
        grad_units = tuple(a + b for a, b in zip(grad_units, here_units, strict=True))
        gates_ih.append(torch.cat(grad_ih, -1))
        gates_hh.append(torch.cat(grad_hh, -1))
        recurrent = unmasked(_product(gates_hh[-1].narrow(2, 0, early), weight.narrow(1, 0, early)))
        # The projection's input is pointwise in c alone: what the cell passes to h belongs to the unprojected case.
        grads = (recurrent if weight_hr is not None else grads[0] + recurrent, *grads[1:])
        grads = tuple(g if x is None else g + x for g, x in zip(grads, kept, strict=True))
        if grad_clip:
            grads = tuple(g.clamp(-grad_clip, grad_clip) for g in grads)
        if held is not None:
            grads = tuple(a + b for a, b in zip(grads, held, strict=True))
        if walk.resets is not None:
            at = walk.resets[k][..., None]
            grad_fresh = tuple(f + torch.where(at, g, 0) for f, g in zip(grad_fresh, grads, strict=True))
            grads = tuple(torch.where(at, 0, g) for g in grads)

    def collect(steps: list[Tensor], width: int) -> Tensor:
        return walk(_stack(steps[::-1], after[0], (B, P, width))).reshape(T, B, P * width).to(dtype)

    def state(grads: States, wanted: bool = True) -> Tensor:
        if not wanted or not grads:
            return _absent(output)
        x = _joined(grads)  # reshape, for legacy vmap (is_grads_batched=True) has no rule for flatten
        return x.reshape(B, P * x.shape[2]).to(dtype)

    return (
        collect(gates_ih, Gh),
        collect(gates_hh, Gh) if rule.separate_gates_hh else _absent(output),
        collect(projected, R) if weight_hr is not None else _absent(output),
        state(grads[:1], initial),
        state(grads[1:], initial),
        state(grad_fresh[:1], reset_h is not None),
        state(grad_fresh[1:], reset_c is not None),
        torch.stack(grad_units, 2).reshape(B, P * len(units) * h) if units else _absent(output),
    )


def lstm_hidden(
    cell: str,
    saved: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_c: Tensor | None,
    keep_c: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """What an LSTM's projection multiplies, o tanh(c) of the c that the cell made: [T, B, P, h] from saved
    [T, B, P*S*h]."""
    (T, B, n), P, rule = saved.shape, len(reverse), CELLS[cell]
    S = rule.saved + _keeps_made(rule, None, keep_c) + 1
    values = saved.reshape(T, B, P, S, n // P // S).unbind(3)
    o, c = values[rule.saved - 1], values[-1]
    if rule.saves_hidden:
        return o
    if keep_c is not None:
        i, f, g = values[:3]
        c = f * _previous(c.reshape(T, B, n // S), c_0, lengths, resets, reset_c, reverse) + i * g
    return o * c.tanh()


def early_and_late(cell: str, gates: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gates [T, B, P*G*h] whose product is with h, and the late ones: both likewise."""
    (T, B, n), rule = gates.shape, CELLS[cell]
    late = n // groups // rule.gates * rule.late
    early = n // groups - late
    parts = gates.reshape(T, B, groups, n // groups).split([early, late], 3)
    return parts[0].reshape(T, B, groups * early), parts[1].reshape(T, B, groups * late)


def late_input(cell: str, saved: Tensor, h: Tensor) -> Tensor:
    """What the product of a cell's late gates was with, [T, B, P, h]: from saved [T, B, P*S*h] and the h before."""
    T, B, P, n = h.shape
    return saved.reshape(T, B, P, saved.shape[2] // (P * n), n)[:, :, :, 0] * h


def multiplied_h(
    output: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_h: Tensor | None,
    mask_h: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """State 0 before each step as the product reads it, in time's order [T, B, P, R]: what grad_gates_hh is multiplied
    with for weight_hh."""
    before = _previous(output, h_0, lengths, resets, reset_h, reverse)
    mask = _mask(mask_h, len(reverse), before.dtype)
    return before if mask is None else before * mask


def _previous(
    after: Tensor,
    start: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    fresh: Tensor | None,
    reverse: Sequence[bool],
) -> Tensor:
    """A state before each step, in time's order [T, B, P, n], from those after [T, B, P*n]; start, fresh [B, P*n]."""
    T, B, _ = after.shape
    P = len(reverse)
    if T == 0:
        return after.reshape(T, B, P, start.shape[1] // P)
    walk = _Walk(T, B, P, lengths, resets, reverse, after.device)
    start = start.reshape(B, P, start.shape[1] // P)
    fresh = torch.zeros_like(start) if fresh is None else fresh.reshape(start.shape)
    return walk(walk.previous(walk(after.reshape(T, B, P, start.shape[-1])), start, fresh))
