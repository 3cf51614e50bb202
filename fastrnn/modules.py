"""Drop-in modules: torch.nn's constructors, parameters, state_dict, messages and results, on fastrnn's kernels.

They derive from ``torch.nn.RNNBase``, which supplies names, checks, repr and pickling, and not from ``torch.nn.LSTM``
and its siblings, which torch.compile refuses by name.

Their own options are keyword-only arguments of the constructors, and told with all others in the classes' docstrings,
which ``options.py`` composes. ``forward`` takes three keyword arguments more than torch's: ``lengths``, ``resets`` and
``reset_state``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, overload

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import _C, checks, fallback, per_sample
from .cells import GRUCell, LSTMCell, RNNCell
from .initial_values import Init, check_init, initialize
from .layer import road
from .masks import Noise
from .module_base import QCONFIG, is_for_torch, leaf, typed_as
from .module_checks import ChecksCalls, check_none
from .nested import is_jagged, jagged
from .network import network, of_layers, own
from .ops import CELLS
from .options import CHANGE_RESULTS, SWITCHES, VALUES, checked, documented, without_lstm_only
from .packing import check_batch_sizes, check_indices, layout_of_packed, pack, pad, permute
from .records import PARAMS, LayerWeights, Masks, States, name_of, rows_of
from .regularizers import with_weight_dropout
from .transforms import in_autocast_dtype, is_plain_call

# Cells, too: where older pickles look for them.
__all__ = ["GRU", "LSTM", "MGU", "RNN", "GRUCell", "LSTMCell", "LiGRU", "RNNCell"]

# What _C.module_forward knows nothing of, in eval mode and in training.
_UNKNOWN_TO_C = (
    "learn_initial_state", "state_batch_first", "return_all_states", "residual", "return_all_layers", "_opacus",
)  # fmt: skip
_UNKNOWN_IN_TRAINING = (*_UNKNOWN_TO_C, "weight_dropout", "locked_dropout")
_NOISE = ("recurrent_dropout", "zoneout")
_FIELDS = {field: field for field in LayerWeights._fields} | dict.fromkeys(PARAMS.values(), "params")


class _Recurrent(per_sample.Hooked, ChecksCalls):
    """What all layers share. States are tuples here: (h,), (h, c) or (h, c, n, m)."""

    # Options of the constructors. An instance has only those that differ from these, so a plain one holds what torch's
    # holds.
    learn_initial_state: bool = False
    state_batch_first: bool = False
    return_all_states: bool = False
    token_input: bool = False
    peephole: bool = False
    layer_norm: bool = False
    reset_after: bool = True
    residual: bool = False
    return_all_layers: bool = False
    num_heads: int = 1
    grad_clip: float | None = None
    recompute: int = 0
    weight_dropout: float = 0.0
    locked_dropout: float = 0.0
    init: Init = "torch"
    forget_bias: float | None = None
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0

    qconfig = QCONFIG
    __prepare_scriptable__ = fallback.refuse_script

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, *args: Any, **kwargs: Any
    ) -> None:
        given = {name: kwargs.pop(name) for name in (*SWITCHES, *VALUES) if name in kwargs}
        options = checked(given, mode, bias)
        norm = options.get("layer_norm", False)
        has_twin = hasattr(rnn, mode.partition("_")[0])
        super().__init__(
            mode if has_twin else "RNN_TANH",
            input_size,
            hidden_size,
            num_layers,
            False if norm else bias,
            *args,
            **kwargs,
        )
        if not has_twin:  # torch.nn's base made the parameters of an Elman unit, which has one gate
            self.mode = mode
            for name in self._flat_weights_names:
                gate = getattr(self, name)
                gates = gate.new_empty(CELLS[self._cell].gates * len(gate), *gate.shape[1:])
                setattr(self, name, nn.Parameter(self._drawn(gates)))
        if norm:
            self.bias = True  # there are biases: those of the normalizations
        if "init" in options:
            options["init"] = check_init(mode, self.bias, options["init"], options.get("forget_bias"))
        for name, value in options.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)
        if self.locked_dropout and self.num_layers == 1:
            warnings.warn(
                "locked_dropout option adds dropout after all but last recurrent layer, so non-zero locked_dropout "
                f"expects num_layers greater than 1, but got locked_dropout={self.locked_dropout} and num_layers=1",
                stacklevel=3,
            )
        weight = getattr(self, self._all_weights[0][0])
        if self.num_heads > 1:
            N, H = self.num_heads, self.hidden_size
            if self.proj_size:
                raise ValueError(f"num_heads should be 1 with proj_size, got {N}")
            if H % N:
                raise ValueError(f"num_heads should divide hidden_size, got {N} for {H}")
            blocks = (N, CELLS[self._cell].gates * (H // N), H // N)
            for names in self._all_weights:
                setattr(self, names[1], nn.Parameter(self._drawn(weight.new_empty(blocks))))
        if self._cell in PARAMS:
            for names in self._all_weights:
                name = names[0].replace("weight_ih", PARAMS[self._cell])
                params = weight.new_empty(CELLS[self._cell].params, self.hidden_size)
                self.register_parameter(name, nn.Parameter(params))
                names.append(name)
            self._flat_weights_names = [name for names in self._all_weights for name in names]
            self._init_flat_weights()
            self._reset_params()
        if self.learn_initial_state:
            h, *rest = self._initial_names()
            for names, width in ((h, self.proj_size or self.hidden_size), *((each, self.hidden_size) for each in rest)):
                for name in names:
                    self.register_parameter(name, nn.Parameter(weight.new_zeros(width)))
        initialize(self, CELLS[self._cell].gates, self.init, self.forget_bias)

    @property
    def _cell(self) -> str:
        """The name of its cell, as the ops know it."""
        mode = self.mode.lower()
        if self.peephole or self.layer_norm:
            return f"{mode}_peephole" if self.peephole else f"{mode}_norm"
        return mode if self.reset_after else f"{mode}_reset_before"

    @torch.no_grad()
    def _drawn(self, weight: Tensor) -> Tensor:
        """A weight filled as torch.nn fills its."""
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        return weight.uniform_(-bound, bound)

    def _reset_params(self) -> None:
        """Peepholes as torch.nn has its weights; gains are 1, biases 0."""
        for names in self._all_weights:
            params = getattr(self, names[-1])
            if self.peephole:
                self._drawn(params)
            else:  # gains of W_ih x and W_hh h, their biases, and of an LSTM gain and bias of c
                gates = CELLS[self._cell].gates
                with torch.no_grad():
                    params.zero_()
                    params[: 2 * gates] = 1
                    params[4 * gates : 4 * gates + 1] = 1

    @property
    def _noise(self) -> Noise:
        zoneout = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        return Noise(self.recurrent_dropout, zoneout, self.training)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.layer_norm:
            self._reset_params()
        if self.learn_initial_state:
            for names in self._initial_names():
                for name in names:
                    nn.init.zeros_(getattr(self, name))
        initialize(self, CELLS[self._cell].gates, self.init, self.forget_bias)

    def extra_repr(self) -> str:
        options = ((name, getattr(self, name)) for name in (*SWITCHES, *VALUES))
        told = (f"{name}={value!r}" for name, value in options if value != getattr(type(self), name))
        return ", ".join([super().extra_repr(), *told])

    def _state_widths(self) -> tuple[int, ...]:
        """Of h and of the states besides."""
        return (self.proj_size or self.hidden_size, *[self.hidden_size] * CELLS[self._cell].in_c)

    def _initial_names(self) -> list[list[str]]:
        """Parameters of the initial state: of every layer and direction for h, then for c, .. See ``_with_fixed``."""
        suffixes = [names[0].removeprefix("weight_ih") for names in self._all_weights]
        return [
            [f"{state}_0{suffix}" for suffix in suffixes]
            for state, _ in zip("hcnm", self._state_widths(), strict=False)
        ]

    def _with_fixed(self, learned: States) -> States:
        """The whole initial state: of a cell that does not learn all of it, with the rest."""
        return learned

    def _initial_states(self, batch: int) -> States:
        rows = [[self._marked(getattr(self, name)) for name in names] for names in self._initial_names()]
        if per_sample.asked_for(rows):
            return self._with_fixed(tuple(per_sample.initial_states(each, batch) for each in rows))
        return self._with_fixed(
            tuple(torch.stack(list(map(in_autocast_dtype, each))).unsqueeze(1).expand(-1, batch, -1) for each in rows)
        )

    def store_by_token(self) -> Self:
        """Lays ``weight_ih_l0`` (and its reverse) out in memory by token, as [I, G*H] transposed; returns self.

        For a module with ``token_input=True``, which this does not switch on: what an input means is said in one place.
        The look-up of tokens in a large vocabulary, and its gradient, then read and write whole rows, as those of an
        embedding do, and not one number in every row. Shapes, values and the state_dict's names stay, and deepcopy,
        pickle, ``to`` and ``load_state_dict`` (but with ``assign=True``, which takes other tensors) keep the layout.
        Call it before the parameters are handed on. Dense input is slower with it, and what asks for contiguous
        parameters (FSDP2, safetensors) refuses it.

        Raises:
            RuntimeError: the weight is no parameter: it is parametrized, or quantized.
        """
        with torch.no_grad():
            for names in self._all_weights[: 2 if self.bidirectional else 1]:
                weight = self._parameters.get(names[0])
                if weight is None:
                    raise RuntimeError(f"{names[0]}: expected a parameter of the module, got none of this name")
                weight.data = weight.data.t().contiguous().t()
        return self

    def step(
        self, x: Tensor, state: Any = None, *, resets: Tensor | None = None, reset_state: Any = None
    ) -> tuple[Tensor, Any]:
        """One time step, for sampling, acting and streaming: ``forward`` with T = 1.

        Args:
            x: [B, I], or unbatched [I]; with ``token_input`` tokens [B] or a scalar one.
            state: as ``forward`` takes and returns it.
            resets: bool [B], or a scalar for unbatched x: where the state is replaced before the step.
            reset_state: what it is replaced by.

        Returns:
            output [B, D*R] (unbatched [D*R]) and the state after the step.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        dims = x.dim() + (self.token_input and checks.are_tokens(x))
        if dims not in (1, 2):
            rows = "[batch, input_size]" + (
                ", tokens [batch] or one row of either" if self.token_input else " or [input_size]"
            )
            raise ValueError(f"x: expected {rows}, got {list(x.shape)}")
        time = 1 if self.batch_first and dims == 2 else 0
        checks.check_resets(resets, reset_state, x.shape[: dims - 1], x.device)
        options = {} if resets is None else {"resets": resets.unsqueeze(time), "reset_state": reset_state}
        if torch.compiler.is_compiling():
            output, after, *_ = self(x.unsqueeze(time), state, **options)
        else:
            try:
                output, after, *_ = self(x.unsqueeze(time), state, **options)
            except Exception:  # it speaks of a sequence
                self._check_step(x, dims, state, reset_state)
                raise
        return of_layers(lambda x: own(x.squeeze(time)), output), after

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat weight buffer; parameters are read by name at each forward."""

    def _weights(self) -> list[list[LayerWeights]]:
        """``[layer][direction]``, read by name, so that parametrizations and swapped parameters are seen."""
        written = self._named_weights()

        def weight(name: str) -> Any:
            found = getattr(self, name) if written is None else written[name]
            return found if self._opacus is None else self._marked(found)

        def by_field(names: list[str]) -> LayerWeights:
            stems = [name.rsplit("_l", 1)[0] for name in names]
            return LayerWeights(**{_FIELDS[s]: weight(name) for s, name in zip(stems, names, strict=True)})

        one_direction = list(map(by_field, self._all_weights))
        directions = 2 if self.bidirectional else 1
        return [one_direction[i : i + directions] for i in range(0, len(one_direction), directions)]

    def _layers(
        self,
        input: Tensor,
        states: States | None,
        lengths: Tensor | None,
        resets: Tensor | None = None,
        reset_states: States | None = None,
        batch_sizes: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[Any, States, Tensor | None]:
        """input [T, B, I] or [T, B], states as the user's -> output, final states as the user's, every c or None.

        With batch_sizes or offsets (records.LayerCall): input [N, I], output [N, D*R]. With ``return_all_layers`` a
        tuple of such.
        """
        batch = rows_of(input, batch_sizes, offsets)
        if self.state_batch_first:
            states, reset_states = (
                None if s is None else tuple(x.transpose(0, 1) for x in s) for s in (states, reset_states)
            )
        if self.learn_initial_state:
            if states is None:
                states = self._initial_states(batch)
            if resets is not None and reset_states is None:
                reset_states = self._initial_states(batch)
        sequence = dict(
            lengths=lengths, resets=resets, reset_states=reset_states, batch_sizes=batch_sizes, offsets=offsets
        )
        output, finals, cells = self._network(input, states, **sequence)
        if self.state_batch_first:
            finals = tuple(x.transpose(0, 1).contiguous() for x in finals)
        return output, finals, cells

    def _network(self, input: Tensor, states: States | None, **sequence: Any) -> tuple[Any, States, Tensor | None]:
        """input [T, B, I] or [T, B] -> output [T, B, D*R], final states [L*D, B, n], every c [T, B, D*H] or None."""
        cell, weights = self._cell, self._weights()
        if self.weight_dropout and self.training:
            weights = [[with_weight_dropout(w, self.weight_dropout) for w in layer] for layer in weights]
        options: dict[str, Any] = dict(
            dropout=self.dropout,
            locked_dropout=self.locked_dropout,
            training=self.training,
            residual=self.residual,
            all_states=self.return_all_states,
            all_layers=self.return_all_layers,
            grad_clip=self.grad_clip or 0.0,
            recompute=self.recompute,
            num_heads=self.num_heads if self.num_heads > 1 else 0,
            noise=self._noise,
        )
        if torch.compiler.is_compiling():
            return network(cell, input, weights, states, **sequence, **options)
        try:
            return network(cell, input, weights, states, **sequence, **options)
        except Exception:
            checks.explain(cell, input, weights, self._name_of, self.num_heads > 1)
            raise

    def _name_of(self, layer: int, direction: int, field: str) -> str:
        return f"{name_of(field, self._cell)}_l{layer}{'_reverse' if direction else ''}"

    def _takes_packed(self, data: Tensor, states: States | None) -> bool:
        """Do the kernels read packed and nested sequences as they are? Else they are padded once for all layers."""
        if self._opacus is not None or not (data.is_cpu and data.is_floating_point()):
            return False
        weights = [x for directions in self._weights() for w in directions for x in w]
        if per_sample.asked_for([weights]) or any(x is not None and x.dtype is not data.dtype for x in weights):
            return False
        read = data, *(states or ()), *weights
        return is_plain_call(*read) and road(fallback.has_kernels(data, *weights), *read) == "fused"

    def _plain(self, input: Any, hx: Any, resets: Any) -> tuple[Any, ...] | None:
        """(output, h_n[, c_n]) of a call that asks for nothing special, by C++ alone; None where it does."""
        if (self.dropout and self.training) or torch.compiler.is_compiling():
            return None
        given = self.__dict__.keys()
        if not given.isdisjoint(_UNKNOWN_IN_TRAINING) and (self.training or not given.isdisjoint(_UNKNOWN_TO_C)):
            return None
        return _C.module_forward(
            *self._weights_by_name(), self._cell, 2 if self.bidirectional else 1, self.num_heads, self.batch_first,
            input, hx, resets, self.grad_clip, self.recompute,
            None if given.isdisjoint(_NOISE) or not self._noise.is_on() else self._masks,
        )  # fmt: skip

    def _masks(self, steps: int, batch: int) -> Masks:
        """Of a layer of a plain call."""
        directions = 2 if self.bidirectional else 1
        return self._noise.masks(self._first_weight(), directions, (steps, batch), batch, self._state_widths())

    def _weights_by_name(self) -> tuple[dict[str, Any], list[Any]]:
        """A dict of tensors, and by layer its keys; see csrc/torch/module_call.cpp."""
        written = None if self._written is None else self._named_weights()
        return self._parameters if written is None else written, self._all_weights

    def _is_for_torch(self, input: Any, hx: Any) -> bool:
        """Of a call without masks: see the function of this name."""
        if not hasattr(rnn, self._kind()) or any(option in self.__dict__ for option in CHANGE_RESULTS):
            return False
        written = self._named_weights()
        weights = (self._parameters if written is None else written).values()
        return is_for_torch(self._first_weight(), weights, input, hx)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: Any,
    ) -> tuple[Any, States, Any]:
        if is_jagged(input):
            check_none("a nested input", lengths=lengths, resets=resets, reset_state=reset_state)
            return self._run_nested(input, hx)  # type: ignore[arg-type]
        if lengths is None and resets is None and reset_state is None and self._is_for_torch(input, hx):
            output, after = getattr(rnn, self._kind()).forward(self, input, hx)
            return output, after if isinstance(after, tuple) else (after,), None
        states, reset_states = (
            None if state is None else checks.given_states(self._cell, name, state)
            for name, state in (("hx", hx), ("reset_state", reset_state))
        )
        if isinstance(input, PackedSequence):
            check_none("a PackedSequence", lengths=lengths, resets=resets, reset_state=reset_state)
            return self._run_packed(input, states)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor or a PackedSequence, got {type(input).__name__}")
        tokens = self.token_input and checks.are_tokens(input)
        dims = input.dim() + tokens
        if dims not in (2, 3):
            tensor = " tensor" if self.mode.startswith("RNN") else ""
            expected = "tokens to be 1D or 2D" if tokens else "input to be 2D or 3D"
            raise ValueError(f"{self._kind()}: Expected {expected}, got {input.dim()}D{tensor} instead")
        batched = dims == 3
        self._check_ranks("hx", states, batched)
        self._check_ranks("reset_state", reset_states, batched)
        checks.check_resets(resets, reset_state, input.shape[: dims - 1], input.device)
        batch_dim, state_dim = 0 if self.batch_first else 1, 0 if self.state_batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            states, reset_states = (
                None if s is None else tuple(x.unsqueeze(state_dim) for x in s) for s in (states, reset_states)
            )
            if resets is not None:
                resets = resets.unsqueeze(batch_dim)
            if lengths is not None:
                raise ValueError(f"lengths: expected None with unbatched input, got {type(lengths).__name__}")
        self.check_input(input, None)
        for name, each in (("hx", states), ("reset_state", reset_states)):
            if each is not None:
                self._check_states(name, input, each, None)
        if self.batch_first:
            input = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        if lengths is not None:
            lengths = checks.given_lengths(lengths, input)
        output, finals, cells = self._layers(input, states, lengths, resets, reset_states)
        if self.batch_first:
            output = of_layers(lambda x: x.transpose(0, 1), output)
            cells = of_layers(lambda x: x.transpose(0, 1), cells)
        if not batched:
            output = of_layers(lambda x: x.squeeze(batch_dim), output)
            cells = of_layers(lambda x: x.squeeze(batch_dim), cells)
            finals = tuple(x.squeeze(state_dim) for x in finals)
        return of_layers(own, output), tuple(map(own, finals)), of_layers(own, cells)

    def _run_packed(self, input: PackedSequence, states: States | None) -> tuple[Any, States, PackedSequence | None]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        data = in_autocast_dtype(data)
        state_dim = 0 if self.state_batch_first else 1
        if not checks.is_tensor_like(data):
            raise TypeError(f"data: expected a tensor, got {type(data).__name__}")
        self.check_input(data, batch_sizes)
        check_batch_sizes(batch_sizes, data.shape[0])
        for name, indices in (("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)):
            if indices is not None:
                check_indices(name, indices, int(batch_sizes[0]), data.device)
        if states is not None:
            self._check_states("hx", data, states, batch_sizes)
            states = tuple(permute(x, sorted_indices, state_dim) for x in states)
        if fallback.is_traced() or fallback.is_exported_to_onnx():
            raise RuntimeError(
                "input: expected a padded tensor and lengths where the call is traced or exported to ONNX, "
                "got a PackedSequence"
            )
        if self._takes_packed(data, states):
            output, finals, cells = self._layers(data, states, None, batch_sizes=batch_sizes)
        elif self._opacus is not None or per_sample.asked_for([self._parameters.values()]):
            # A sample's gradient is expected where the caller has the sample.
            padded, lengths = pad(data, batch_sizes)
            output, finals, cells = self._layers(
                permute(padded, unsorted_indices),
                None if states is None else tuple(permute(x, unsorted_indices, state_dim) for x in states),
                permute(lengths, unsorted_indices, 0),
            )
            finals = tuple(permute(x, sorted_indices, state_dim) for x in finals)
            output = of_layers(lambda x: pack(permute(x, sorted_indices), lengths), output)
            cells = of_layers(lambda x: pack(permute(x, sorted_indices), lengths), cells)
        else:
            layout = layout_of_packed(batch_sizes, data.device)
            output, finals, cells = self._layers(layout.pad(data), states, layout.lengths)
            output, cells = (of_layers(layout.pack, each) for each in (output, cells))

        def packed(x: Tensor) -> PackedSequence:
            return PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices)

        finals = tuple(own(permute(x, unsorted_indices, state_dim)) for x in finals)
        return of_layers(packed, output), finals, of_layers(packed, cells)

    def _run_nested(self, input: Tensor, hx: Any) -> tuple[Any, States, Any]:
        states = None if hx is None else checks.given_states(self._cell, "hx", hx)
        rows = jagged(input)
        if input.dim() != 3 - (self.token_input and not rows.values.is_floating_point()):
            expected = f"nested input to be [B, j, {self.input_size}]"
            raise ValueError(f"{self._kind()}: Expected {expected}, got {list(input.shape)}")
        self.check_input(rows.values, rows.offsets)
        self._check_ranks("hx", states, batched=True)
        checks.check_steps(rows.values)
        output: Any
        cells: Any
        if states is not None:
            self._check_states("hx", rows.values, states, rows.batch)
        back: Callable[[Any], Tensor]
        if self._takes_packed(rows.values, states) and not self.recompute:
            back = rows.nested
            output, finals, cells = self._layers(rows.values, states, None, offsets=rows.offsets)
        else:
            back = rows.of_padded
            output, finals, cells = self._layers(rows.padded(), states, rows.lengths)
        return of_layers(back, output), tuple(map(own, finals)), of_layers(back, cells)


class _SingleState(_Recurrent):
    @overload  # type: ignore[override]
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, packed or nested), hx [L*D, B, H] or None.

        Returns output [T, B, D*H], laid out like the input, and h_n [L*D, B, H].
        """
        if lengths is None and reset_state is None:
            plain = self._plain(input, hx, resets)
            if plain is not None:
                return plain[0], plain[1]
        if isinstance(input, torch.fx.Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets, reset_state=reset_state)
        output, finals, _ = self._run(input, hx, lengths, resets, reset_state)
        return output, finals[0]

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...


@documented
class LSTM(_Recurrent):
    """``torch.nn.LSTM``: same arguments, parameters and results; ``output, (h_n, c_n) = lstm(input, hx)``."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        state_batch_first: bool = False,
        return_all_states: bool = False,
        token_input: bool = False,
        peephole: bool = False,
        layer_norm: bool = False,
        residual: bool = False,
        return_all_layers: bool = False,
        num_heads: int = 1,
        grad_clip: float | None = None,
        recompute: int = 0,
        weight_dropout: float = 0.0,
        locked_dropout: float = 0.0,
        init: Init = "torch",
        forget_bias: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            learn_initial_state=learn_initial_state,
            state_batch_first=state_batch_first,
            return_all_states=return_all_states,
            token_input=token_input,
            peephole=peephole,
            layer_norm=layer_norm,
            residual=residual,
            return_all_layers=return_all_layers,
            num_heads=num_heads,
            grad_clip=grad_clip,
            recompute=recompute,
            weight_dropout=weight_dropout,
            locked_dropout=locked_dropout,
            init=init,
            forget_bias=forget_bias,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        first, second, _ = self.get_expected_hidden_size(input, batch_sizes)
        return first, second, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        expected = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for i in range(2):
            self.check_hidden_size(hidden[i], expected[i], f"Expected hidden[{i}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return permute(hx[0], permutation), permute(hx[1], permutation)

    def _user_state(self, states: States) -> Any:
        return states

    @overload  # type: ignore[override]
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, packed or nested); hx ``(h_0, c_0)``,
        [L*D, B, R] and [L*D, B, H], or None.

        Returns output [T, B, D*R], laid out like the input, and ``(h_n, c_n)``; with ``return_all_states`` also the
        last layer's c after every step, [T, B, D*H].
        """
        if lengths is None and reset_state is None:
            plain = self._plain(input, hx, resets)
            if plain is not None:
                return plain[0], (plain[1], plain[2])
        if isinstance(input, torch.fx.Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets, reset_state=reset_state)
        output, finals, cells = self._run(input, hx, lengths, resets, reset_state)
        state = (finals[0], finals[1])
        return (output, state) if cells is None else (output, state, cells)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any) -> Any: ...


@documented
class GRU(_SingleState):
    """``torch.nn.GRU``: same arguments, parameters and results; ``output, h_n = gru(input, hx)``."""

    @without_lstm_only
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        state_batch_first: bool = False,
        token_input: bool = False,
        layer_norm: bool = False,
        reset_after: bool = True,
        residual: bool = False,
        return_all_layers: bool = False,
        num_heads: int = 1,
        grad_clip: float | None = None,
        recompute: int = 0,
        weight_dropout: float = 0.0,
        locked_dropout: float = 0.0,
        init: Init = "torch",
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            learn_initial_state=learn_initial_state,
            state_batch_first=state_batch_first,
            token_input=token_input,
            layer_norm=layer_norm,
            reset_after=reset_after,
            residual=residual,
            return_all_layers=return_all_layers,
            num_heads=num_heads,
            grad_clip=grad_clip,
            recompute=recompute,
            weight_dropout=weight_dropout,
            locked_dropout=locked_dropout,
            init=init,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )


class _LightUnit(_SingleState):
    """What units that torch.nn lacks have in common, a GRU's arguments. A class of them names its cell (``mode``)."""

    @without_lstm_only
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        state_batch_first: bool = False,
        token_input: bool = False,
        residual: bool = False,
        return_all_layers: bool = False,
        num_heads: int = 1,
        grad_clip: float | None = None,
        recompute: int = 0,
        weight_dropout: float = 0.0,
        locked_dropout: float = 0.0,
        init: Init = "torch",
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(
            self.mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            learn_initial_state=learn_initial_state,
            state_batch_first=state_batch_first,
            token_input=token_input,
            residual=residual,
            return_all_layers=return_all_layers,
            num_heads=num_heads,
            grad_clip=grad_clip,
            recompute=recompute,
            weight_dropout=weight_dropout,
            locked_dropout=locked_dropout,
            init=init,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )


@documented
class LiGRU(_LightUnit):
    """Light gated recurrent unit (Ravanelli et al. 2018), which torch.nn lacks; ``output, h_n = ligru(input, hx)``.

    A GRU without a reset gate, with relu: ``z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)``,
    ``n = relu(W_in x + b_in + W_hn h + b_hn)``, ``h' = z h + (1 - z) n``. The batch normalization of the paper's
    ``W x`` is not in it. Parameters are named as a GRU's and have 2*H rows: z's, then n's.
    """

    mode = "LiGRU"


@documented
class MGU(_LightUnit):
    """Minimal gated unit (Zhou et al. 2016), which torch.nn lacks; ``output, h_n = mgu(input, hx)``.

    A GRU whose one gate both resets and updates: ``f = sigmoid(W_if x + b_if + W_hf h + b_hf)``,
    ``n = tanh(W_in x + b_in + W_hn (f h) + b_hn)``, ``h' = (1 - f) h + f n``. Such a step is two products, one after
    the other. Parameters are named as a GRU's and have 2*H rows: f's, then n's.
    """

    mode = "MGU"


@documented
class RNN(_SingleState):
    """``torch.nn.RNN``: same arguments, parameters and results; ``output, h_n = rnn(input, hx)``."""

    @without_lstm_only
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        learn_initial_state: bool = False,
        state_batch_first: bool = False,
        token_input: bool = False,
        residual: bool = False,
        return_all_layers: bool = False,
        num_heads: int = 1,
        grad_clip: float | None = None,
        recompute: int = 0,
        weight_dropout: float = 0.0,
        locked_dropout: float = 0.0,
        init: Init = "torch",
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            learn_initial_state=learn_initial_state,
            state_batch_first=state_batch_first,
            token_input=token_input,
            residual=residual,
            return_all_layers=return_all_layers,
            num_heads=num_heads,
            grad_clip=grad_clip,
            recompute=recompute,
            weight_dropout=weight_dropout,
            locked_dropout=locked_dropout,
            init=init,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
        )
        self.nonlinearity = nonlinearity  # not before: a module that is made in a compiled function must exist first
