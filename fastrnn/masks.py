"""Recurrent dropout and zoneout of a network: what its layers' calls are given as ``mask_h``, ``keep_h`` and ``keep_c``
(LayerStates in records.py says what those mean).

In training they are drawn from torch's generator of the device, layer by layer, and of a layer in this order: of what
the network does not ask for nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fallback
from .layer import road
from .ops import bernoulli
from .records import Masks


def draw(
    shape: Sequence[int], probability: float, dtype: torch.dtype, device: torch.device, narrow: bool = False
) -> Tensor:
    """Ones with this probability, else zeros. narrow: bool and not dtype, where it is a kernel of ours that draws."""
    an_empty = torch.empty(0, dtype=dtype, device=device)
    if device.type != "cpu" or road(fallback.has_kernels(an_empty)) == "reference":
        # torch.empty and not a tensor made like another, which under vmap would have that one's batch dimension
        return torch.bernoulli(torch.empty(*shape, dtype=dtype, device=device), probability)
    # The generator draws one number, of which a kernel makes the elements. Each would take it 6 ns, and all of
    # zoneout's 10 to 20% of a training step.
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return bernoulli(seed, shape, probability, torch.bool if narrow else dtype)


class Noise(NamedTuple):
    """What is asked for."""

    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and of c
    training: bool = False

    def is_on(self) -> bool:
        return any(self.zoneout) or (self.training and self.recurrent_dropout > 0)

    def masks(self, like: Tensor, directions: int, steps: Sequence[int], batch: int, widths: Sequence[int]) -> Masks:
        """Of one layer, with dtype (keep_h and keep_c perhaps bool) and device of `like`. steps: (T, B), or (N,);
        widths: (R,), or of an LSTM (R, H)."""
        if not self.is_on():
            return Masks()
        # torch.ones and not like.new_ones: under vmap what is drawn must not have `like`'s batch dimension.
        options: dict[str, Any] = dict(dtype=like.dtype, device=like.device)
        mask_h = None
        if self.training and self.recurrent_dropout:
            ones = torch.ones(directions, batch, widths[0], **options)
            mask_h = F.dropout(ones, self.recurrent_dropout, training=True)

        def keep(probability: float, width: int) -> Tensor | None:
            if not probability:
                return None
            if not self.training:  # the expectation: one row for all
                return torch.full((width,), probability, **options).expand(*steps, width)
            return draw((*steps, width), probability, **options, narrow=True)

        return Masks(mask_h, *(keep(p, directions * width) for p, width in zip(self.zoneout, widths, strict=False)))


NO_NOISE = Noise()
