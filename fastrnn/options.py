"""The arguments of LSTM, GRU, RNN and their like: what torch.nn lacks is checked here, and all of them are told here.

A class's docstring is composed of its own signature and one text an argument, so that ``help`` shows each argument with
its default and no fact stands twice.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

SWITCHES = (
    "learn_initial_state",
    "state_batch_first",
    "return_all_states",
    "token_input",
    "peephole",
    "layer_norm",
    "reset_after",
    "residual",
    "return_all_layers",
)
VALUES = (
    "num_heads",
    "grad_clip",
    "recompute",
    "weight_dropout",
    "locked_dropout",
    "init",
    "forget_bias",
    "recurrent_dropout",
    "zoneout",
)  # options that are no switches
# With these a call gives what torch.nn's module gives without them.
SAME_RESULTS = ("recompute", "init", "forget_bias")
# These act in training alone, as torch.nn's own dropout does.
OF_TRAINING = ("grad_clip", "weight_dropout", "locked_dropout", "recurrent_dropout")
CHANGE_RESULTS = tuple(name for name in (*SWITCHES, *VALUES) if name not in SAME_RESULTS)

_ARGUMENTS = """\
input_size: features I of each step's input; with ``token_input`` the size of the vocabulary.
hidden_size: units H.
num_layers: layers L, each on the output of the one below it.
nonlinearity: 'tanh' or 'relu'. The fourth argument by position, as in torch.nn.
bias: are there ``bias_ih`` and ``bias_hh``?
batch_first: input and output are [B, T, n] in place of [T, B, n]. States are not: see ``state_batch_first``.
dropout: probability that an output of any layer but the last is zeroed in training.
bidirectional: a second direction (D = 2) runs from the last step to the first; its outputs stand behind those of the
  first.
proj_size: where it is above 0, ``weight_hr`` projects h to this width R; else R is H.
device: of the parameters.
dtype: of the parameters.
learn_initial_state: parameters ``h_0_l0`` [R] and, of an LSTM, ``c_0_l0`` [H] (of an SLSTM ``m_0_l0`` besides;
  its n_0 is 1) for every layer and direction, named as the weights are and zero at first. They are the state where none
  is passed, and the ``reset_state``.
state_batch_first: states come and go as [B, L*D, n] (unbatched ones are [L*D, n] as ever).
return_all_states: a call returns a third result, the last layer's c after every step [T, B, D*H], laid out and padded
  like the output; of an SLSTM a tuple of c, n and m. A gradient that reaches it is part of the fused backward on a
  CPU; on CUDA it makes backward the composite of fastrnn/reference.py. Type checkers see the two results of the
  default.
token_input: integer input is tokens in [0, input_size): [T, B] ([B, T] with ``batch_first``, [T] unbatched, or
  packed) stands for the one-hot input, which is never made; dense input is taken as ever. Without it integer input
  raises as in torch.nn. Where the vocabulary is large, see :meth:`store_by_token`. May be set at any time, as an
  attribute.
peephole: parameters ``weight_ch_l0`` [3, H] for every layer and direction, named as the weights are, let the gates see
  c: ``i = sigmoid(.. + p_i c)`` and ``f = sigmoid(.. + p_f c)`` of the c before the step, ``o = sigmoid(.. + p_o c')``
  of the one after (Gers and Schmidhuber 2000). The rows are p_i, p_f, p_o.
layer_norm: layer normalization (Ba, Kiros and Hinton 2016) of ``W_ih x`` and of ``W_hh h`` before they meet, each gate
  of each by itself over the H units, and of an LSTM also of c inside ``h = o tanh(LN(c))``; c is handed on as it is. A
  GRU's reset gate multiplies what is normalised. ``LN(a) = gain (a - mean) / sqrt(variance + 1e-5) + bias``, in float32
  or wider. The parameters are ``weight_ln_l0``, [18, H] of an LSTM and [12, H] of a GRU, for every layer and direction:
  rows are the gains of ``W_ih x`` by gates in torch.nn's order, those of ``W_hh h``, their biases likewise, and of an
  LSTM c's gain and bias. Gains are 1 at first, biases 0. They stand in the place of ``bias_ih`` and ``bias_hh``, which
  there are none of. Not with ``peephole``, ``num_heads`` or what sets those biases.
reset_after: False is the GRU as it was published (Cho 2014), whose reset gate multiplies h before the product:
  ``n = tanh(W_in x + b_in + W_hn (r h) + b_hn)``. Keras has it under this name, ONNX as ``linear_before_reset=0``.
  Parameters are the same. Such a step is two products, one after the other.
residual: from the second layer on, what a layer is put on top of is added to what it gives:
  ``y_l = layer_l(dropped(y_(l-1))) + y_(l-1)``, both of them [T, B, D*R], where ``dropped`` is what ``dropout`` and
  ``locked_dropout`` make of it: the sum takes it as it was before (residual connections of stacked LSTMs, Wu et al.
  2016, section 3.1). h_n stays what recurs, without the sum; padding stays 0.
return_all_layers: the output of a call is a tuple of every layer's output (after ``residual``'s sum, before dropout),
  from the first to the last; of a PackedSequence a tuple of PackedSequences. Of :meth:`step`, too. Type checkers see
  the output of the default.
num_heads: N heads of H/N units whose recurrences do not see each other (block-diagonal W_hh, as in xLSTM, Beck et al.
  2024): ``weight_hh_l0`` is [N, G*H/N, H/N], a block a head; all else has the shapes and the order of the plain layer.
  It must divide ``hidden_size``, and does not go with ``proj_size``.
grad_clip: a number above 0: in backward, the gradient of h and of c (n, m) is clamped to [-grad_clip, grad_clip]
  wherever a step hands it to the step before, or to the state that it started from; what the output's own gradient
  brings is added after. NaN stays NaN. Forward-mode AD has nothing to clamp. Double backward differentiates the
  clamps, and clamps again what it takes back through the forward pass.
recompute: a number of steps (0: off): training keeps the states at every ``recompute``-th step alone, and backward
  makes the rest again from there, so many steps at a time. The square root of T takes about the least memory. Results
  are equal up to rounding, and in every bit from run to run. Double backward needs the memory of the default, and so
  does a last layer with ``return_all_states``. Nothing is recomputed under torch.compile, torch.func and forward-mode
  AD, where the gradient of every sample is asked for (Opacus), and on devices without kernels of ours.
weight_dropout: probability that an element of ``weight_hh``, of each layer and direction, is zeroed in training; what
  is left is scaled by 1 / (1 - weight_dropout). One mask a call, for all steps and rows, from torch's generator:
  W = mask * weight_hh / (1 - weight_dropout) stands in the equations (DropConnect on the recurrent weights of the
  AWD-LSTM, Merity et al. 2017). A :meth:`step` is a call, and so is each chunk of a stream: in training they have a
  mask of their own. The parameters stay what they are, parametrized ones included.
locked_dropout: as ``dropout``, probability that an output of any layer but the last is zeroed in training, but with one
  mask for all steps of a row: [B, D*R], drawn between each two layers by every call, in the order in which a
  PackedSequence has sorted its rows (Gal and Ghahramani 2016; the AWD-LSTM, Merity et al. 2017). May stand beside
  ``dropout``, which draws for every step. A :meth:`step` is a call.
init: what parameters are filled with, by the constructor and by ``reset_parameters()``. 'torch': all of them uniform in
  [-1 / sqrt(H), 1 / sqrt(H)], and what the others do not name stays so. 'orthogonal': in ``weight_hh`` the block of
  each gate is an orthogonal matrix of its own (Saxe et al. 2014), and so is ``weight_hr``; in ``weight_ih`` each gate's
  block [H, I] is uniform in [-a, a], a = sqrt(6 / (I + H)) (Glorot and Bengio 2010); biases are 0. As Keras' default,
  but gate by gate. 'identity', for an RNN with relu: ``weight_hh`` is the identity, biases are 0 (IRNN, Le et al. 2015,
  whose ``weight_ih`` is drawn from N(0, 0.001^2): here it is torch's). ``('chrono', T_max)``, for dependencies over
  1 to T_max steps: of an LSTM ``b_f = log(u)`` and ``b_i = -b_f``, u uniform in [1, T_max - 1] for each unit (Tallec
  and Ollivier 2018); of a GRU and a LiGRU ``b_z = log(u)``, for there z keeps h; of an MGU ``b_f = -log(u)``, for its f
  lets h go. They are in ``bias_ih``; those gates' part of ``bias_hh`` is 0. T_max is 2 or more.
forget_bias: a number that the forget gate of an LSTM or SLSTM has for its bias at first and after
  ``reset_parameters()``: it is in ``bias_ih``, and that gate's part of ``bias_hh`` is 0, so that the sum of both is it
  (1: Gers et al. 2000, Jozefowicz et al. 2015). Beside init='torch' and 'orthogonal'.
recurrent_dropout: in training, the h that a step multiplies with ``weight_hh`` is m * h, where m is 0 with this
  probability and 1/(1-p) else, and the same in every step of a call: drawn for every call, row, unit, layer and
  direction (Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks").
  The state itself is not masked: it is the output, what ``reset_state`` replaces, and what a GRU's ``z * h`` takes. A
  call of :meth:`step` is a call: in training it draws a mask of its own. Where a gate multiplies h before a second
  product (``reset_after=False``, an MGU), that product, too, reads the masked h: ``W_hn (r (m * h))``.
zoneout: probability p that a unit keeps its state in a step of training, h and (of an LSTM) c with draws of their own
  for every step, row, unit, layer and direction; else the state is the one that the cell makes. In eval mode it is the
  expectation, ``p * h + (1 - p) * h'`` (Krueger et al. 2016, "Zoneout: Regularizing RNNs by Randomly Preserving Hidden
  Activations"). An LSTM takes a pair (of h, of c), too; its h' is made of the c' before zoneout, and projected where
  there is a ``proj_size``. Past a reset the state that may be kept is the ``reset_state``.
"""

_CALLS = """\
input: [T, B, I], or as ``batch_first`` and ``token_input`` say; [T, I] unbatched; a PackedSequence; or a nested tensor
  [B, j, I] of layout torch.jagged, tokens [B, j], whatever ``batch_first`` says. What comes laid out like the input is
  nested then, with its offsets (of an input with holes, those without); states are as of any batch.
hx (default None): the initial state, {state}; None for zeros.
lengths (by keyword, default None): integer [B]: row b has the steps 0 .. lengths[b] - 1. The output is 0 behind them,
  and the final state is the one after the last of them.
resets (by keyword, default None): bool [T, B], laid out like the input: where True at t, nothing is carried between
  steps t-1 and t, in either direction; the state is ``reset_state`` instead.
reset_state (by keyword, default None): like hx; None for zeros. Needs ``resets``.
"""

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., None])


def checked(options: dict[str, Any], mode: str, with_bias: bool) -> dict[str, Any]:
    """Those of SWITCHES and VALUES that were given to a module of this mode, beside the argument ``bias``; what is kept
    of them."""
    for name in SWITCHES:
        if not isinstance(options.get(name, False), bool):  # of what is not given, False as good as any
            raise TypeError(f"{name} should be of type bool, got: {type(options[name]).__name__}")
    if options.get("layer_norm"):
        _check_layer_norm(options, with_bias)
    clip = options.get("grad_clip")
    if clip is not None:
        if isinstance(clip, bool) or not isinstance(clip, (int, float)):
            raise TypeError(f"grad_clip should be of type float or None, got: {type(clip).__name__}")
        if not clip > 0:
            raise ValueError(f"grad_clip should be above 0, got {clip}")
        options["grad_clip"] = float(clip)
    heads = options.get("num_heads", 1)
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"num_heads should be of type int, got: {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"num_heads should be at least 1, got {heads}")
    steps = options.get("recompute", 0)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"recompute should be of type int, got: {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"recompute should be 0 (off) or a number of steps, got {steps}")
    for name in ("weight_dropout", "locked_dropout"):
        _check_probability(name, options.get(name, 0.0))
    bias = options.get("forget_bias")
    if bias is not None:
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise TypeError(f"forget_bias should be of type float or None, got: {type(bias).__name__}")
        if not math.isfinite(bias):
            raise ValueError(f"forget_bias should be a finite number, got {bias}")
        options["forget_bias"] = float(bias)
    if "recurrent_dropout" in options:
        _check_probability("recurrent_dropout", options["recurrent_dropout"])
    zoneout = options.get("zoneout", 0.0)
    if isinstance(zoneout, (tuple, list)):
        if mode != "LSTM":
            raise TypeError("zoneout should be a number: a pair (of h, of c) is only supported for LSTM")
        if len(zoneout) != 2:
            raise ValueError(f"zoneout should be a number or a pair (of h, of c), got {len(zoneout)} values")
        for i, p in enumerate(zoneout):
            _check_probability(f"zoneout[{i}]", p, "a unit keeping its state")
        options["zoneout"] = tuple(map(float, zoneout)) if any(zoneout) else 0.0
    else:
        _check_probability("zoneout", zoneout, "a unit keeping its state")
    return options


def _check_layer_norm(options: dict[str, Any], with_bias: bool) -> None:
    """What does not go with it."""
    if not with_bias:
        raise ValueError("bias: expected True with layer_norm, which has biases among its parameters, got False")
    for name, plain in (("peephole", False), ("reset_after", True)):
        if options.get(name, plain) != plain:
            raise ValueError(f"{name}: expected {plain} with layer_norm, got {not plain}: there is no cell with both")
    if options.get("num_heads", 1) != 1:
        raise ValueError(f"num_heads should be 1 with layer_norm, got {options['num_heads']}")
    for name in ("forget_bias", "init"):
        if not isinstance(options.get(name) or "", str):
            raise ValueError(f"{name} sets bias_ih, which there is none of with layer_norm, got {options[name]}")


def _check_probability(name: str, value: Any, of: str = "an element being zeroed") -> None:
    """As torch.nn checks ``dropout``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of {of}, got {value!r}"
        )


_LSTM_ONLY = {
    "peephole": "LSTM: no other has a c that gates could see",
    "forget_bias": "LSTM and SLSTM: no other has a gate that keeps c",
    "return_all_states": "LSTM and SLSTM: the output of any other holds every state",
}


def without_lstm_only(init: F) -> F:
    """For ``__init__`` of all but LSTM: says in words which arguments are an LSTM's alone, and what else is lacking.

    torch.nn's take proj_size behind bidirectional where all is given by position, before device: so it is taken, as 0.
    """
    names = [*inspect.signature(init).parameters]
    place = names.index("device") - 1

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs or (len(args) > place and args[place] != 0):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        for name, which in _LSTM_ONLY.items():
            given = kwargs.pop(name, None)
            if given is not None and given is not False:
                raise ValueError(f"{name} argument is only supported for {which}")
        if "layer_norm" not in names and kwargs.pop("layer_norm", False):
            raise ValueError("layer_norm argument is only supported for LSTM and GRU")
        for name in kwargs.keys() - set(names):  # an __init__ that classes share would speak in its own name
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        init(self, *args[:place], *args[place + 1 :], **kwargs)

    return checked_init  # type: ignore[return-value]


def documented(cls: C) -> C:
    """Adds to a class's docstring what its arguments and its call's are."""
    texts, calls = _by_name(_ARGUMENTS), _by_name(_CALLS)
    by_position: list[str] = []
    ours: list[str] = []
    for p in inspect.signature(cls).parameters.values():
        default = "" if p.default is p.empty else f" (default {p.default!r})"
        (ours if p.kind is p.KEYWORD_ONLY else by_position).append(_item(p.name + default, texts[p.name]))
    lstm = "proj_size" in inspect.signature(cls).parameters
    state = "``(h_0, c_0)`` of [L*D, B, R] and [L*D, B, H]" if lstm else getattr(cls, "_STATE", "[L*D, B, H]")
    parts = {
        "Args:": by_position,
        "Keyword arguments that torch lacks:": ours,
        "Arguments of a call:": [_item(name, text.format(state=state)) for name, text in calls.items()],
    }
    told = ["\n".join([title, *items]) for title, items in parts.items()]
    cls.__doc__ = "\n\n".join([inspect.cleandoc(cls.__doc__ or ""), *told]) + "\n"
    return cls


def _by_name(texts: str) -> dict[str, str]:
    return dict(" ".join(text.split()).split(": ", 1) for text in re.split(r"\n(?=\w)", texts))  # type: ignore[misc]


def _item(name: str, text: str) -> str:
    """Broken at spaces alone: what is joined again elsewhere has no spaces behind its hyphens."""
    return textwrap.fill(
        f"{name}: {text}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
    )
