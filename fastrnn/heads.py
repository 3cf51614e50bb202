"""Heads: a recurrence in N parts that do not see each other, as in xLSTM (Beck et al. 2024, section 2.2).

``weight_hh`` is block-diagonal and held as its blocks, [N, G*h, h] with h = H / N units a head. To the kernels each
head is a group of its own, as a direction is. All else keeps the shapes and the order of the dense layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import LayerCall, LayerResults, LayerWeights


def count(weights: LayerWeights) -> int:
    """How many heads has a layer of these weights? 0: it is a dense one."""
    return weights.weight_hh.shape[0] if weights.weight_hh.dim() == 3 else 0


def by_head(weights: LayerWeights) -> list[LayerWeights]:
    """Each head's own rows of a layer's weights: of every gate those of its h units."""
    N, _, h = weights.weight_hh.shape
    params = weights.params

    def rows(x: Tensor | None) -> list[Tensor | None]:
        if x is None:
            return [None] * N
        features = x.shape[1:]
        return list(x.reshape(-1, N, h, *features).transpose(0, 1).reshape(N, -1, *features).unbind())

    parts = {name: rows(getattr(weights, name)) for name in ("weight_ih", "bias_ih", "bias_hh")}
    parts["weight_hh"] = list(weights.weight_hh.unbind())
    parts["params"] = [None] * N if params is None else list(params.reshape(-1, N, h).unbind(1))
    return [LayerWeights(**{name: x[n] for name, x in parts.items()}) for n in range(N)]  # type: ignore[arg-type]


def dense(weights: LayerWeights) -> LayerWeights:
    """The same layer with weight_hh [G*H, H], zeros between the heads."""
    N, Gh, h = weights.weight_hh.shape
    blocks = weights.weight_hh.reshape(N, Gh // h, h, 1, h)
    head = torch.arange(N, device=blocks.device)
    own = (head[:, None] == head).reshape(N, 1, 1, N, 1)  # torch.eye of bool is an EyeLike, which ONNX Runtime lacks
    return weights._replace(weight_hh=torch.where(own, blocks, 0).transpose(0, 1).reshape(N * Gh, N * h))


def grouped(call: LayerCall) -> LayerCall:
    """The call of the directions' heads, [D*N, B, h] in states; results go back through :func:`joined`."""
    N, D, (_, H) = count(call.weights[0]), len(call.weights), call.weights[0].widths

    def split(state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        B, n = state.shape[1:]  # n: H, or of c that for every state in it
        return state.reshape(D, B, n // H, N, H // N).permute(0, 3, 1, 2, 4).reshape(D * N, B, n // N)

    given = call.states
    states = {name: split(getattr(given, name)) for name in ("h_0", "c_0", "reset_h", "reset_c", "mask_h")}
    return call._replace(
        weights=[head for w in call.weights for head in by_head(w)],
        states=given._replace(**states),
        reverse=tuple(reverse for reverse in call.directions for _ in range(N)),
    )


def joined(results: LayerResults, heads: int) -> LayerResults:
    """What a call of :func:`grouped` gave, as the layer's: the final states [D, B, n], and c [T, B, D*n] of every
    step."""
    P, B, h = results.h_n.shape
    D = P // heads

    def join(state: Tensor) -> Tensor:
        if state.dim() != 3:  # there is none
            return state
        n = state.shape[2]
        return state.reshape(D, heads, B, n // h, h).permute(0, 2, 3, 1, 4).reshape(D, B, heads * n)

    cells = results.cells
    if cells.dim() > 1 and cells.shape[-1] > P * h:  # of more states than one
        *steps, n = cells.shape
        cells = cells.reshape(*steps, D, heads, n // (P * h), h).transpose(-3, -2).reshape(*steps, n)
    return results._replace(h_n=join(results.h_n), c_n=join(results.c_n), cells=cells)
