"""JAX: lax.scan under jit, weights as arguments of the compiled function."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers.base import PackagePeer, Prepared, all_cores, plain_layer


class JaxPeer(PackagePeer):
    """The input GEMM of all steps is hoisted; the scan holds the recurrent product and the cell.

    XLA's pool takes its size from NPROC when the CPU client is made, once a process: later rows cannot have another.
    """

    key, title = "jax", "JAX lax.scan"
    packages = imports = ("jax", "jaxlib")

    def __init__(self) -> None:
        self._threads = 0  # of the pool, once it is there

    def supports(self, case: Case, mode: str) -> str | None:
        if self._threads not in (0, torch.get_num_threads()):
            return f"its pool was made with {self._threads} threads"
        return plain_layer(case, mode, training=True)

    def start(self) -> Any:
        """The package, with a CPU client of as many threads as torch has."""
        if not self._threads:
            self._threads = torch.get_num_threads()
            before = {name: os.environ.get(name) for name in ("NPROC", "JAX_PLATFORMS")}
            os.environ |= {"NPROC": str(self._threads), "JAX_PLATFORMS": "cpu"}
            with all_cores():
                jax = importlib.import_module("jax")
                jax.devices()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        return importlib.import_module("jax")

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        jax = self.start()
        numpy, nn = jax.numpy, jax.nn
        relu = case.nonlinearity == "relu"

        def cell(states: Any, gates_ih: Any, gates_hh: Any) -> Any:
            if case.cell == "LSTM":
                i, f, g, o = numpy.split(gates_ih + gates_hh, 4, axis=1)
                c = nn.sigmoid(f) * states[1] + nn.sigmoid(i) * numpy.tanh(g)
                return nn.sigmoid(o) * numpy.tanh(c), c
            if case.cell == "GRU":
                (r_ih, z_ih, n_ih), (r_hh, z_hh, n_hh) = (
                    numpy.split(gates, 3, axis=1) for gates in (gates_ih, gates_hh)
                )
                z = nn.sigmoid(z_ih + z_hh)
                n = numpy.tanh(n_ih + nn.sigmoid(r_ih + r_hh) * n_hh)
                return (n + z * (states[0] - n),)
            total = gates_ih + gates_hh
            return (nn.relu(total) if relu else numpy.tanh(total),)

        def forward(weights: Any, input: Any, states: Any) -> Any:
            """weights transposed: [I, G*H], [H, G*H]; input [T, B, I] -> output [T, B, H] and final states."""

            def step(states: Any, gates_ih: Any) -> Any:
                states = cell(states, gates_ih, states[0] @ weights["weight_hh_l0"] + weights["bias_hh_l0"])
                return states, states[0]

            finals, output = jax.lax.scan(step, states, input @ weights["weight_ih_l0"] + weights["bias_ih_l0"])
            return output, finals

        def train(weights: Any, input: Any, states: Any, grad_output: Any) -> Any:
            def run(weights: Any, input: Any) -> Any:
                return forward(weights, input, states)

            output, backward, finals = jax.vjp(run, weights, input, has_aux=True)
            return output, finals, backward(grad_output)

        weights = {
            name: jax.numpy.asarray(np.ascontiguousarray(value.numpy().T)) for name, value in data.weights.items()
        }
        input = numpy.asarray(data.input.numpy())
        count = 2 if case.cell == "LSTM" else 1
        given = [s[0] for s in data.state] if data.state is not None else [torch.zeros(case.B, case.H)] * count
        states = tuple(numpy.asarray(s.numpy()) for s in given)
        arguments: tuple[Any, ...] = (weights, input, states)
        if mode == "train":
            arguments += (numpy.asarray(data.grad_outputs[0].numpy()),)
        compiled = jax.jit(train if mode == "train" else forward).lower(*arguments).compile()

        def timed() -> Any:
            return jax.block_until_ready(compiled(*arguments))

        def results() -> dict[str, torch.Tensor]:
            output, finals, *grads = timed()
            tensors = {"output": output, **{n: s[None] for n, s in zip(("h_n", "c_n"), finals, strict=False)}}
            if grads:
                grad_weights, tensors["grad_input"] = grads[0]
                tensors |= {f"grad_{name}": grad.T for name, grad in grad_weights.items()}
            return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}

        kernel = f"XLA, jit of lax.scan, {self._threads} threads"
        return Prepared(timed, results, kernel=lambda: kernel)
