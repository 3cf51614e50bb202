"""Keras layers on TensorFlow, inside tf.function."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers.base import PackagePeer, Prepared, all_cores, plain_layer

GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}  # Keras has i f c o and z r h


def transposed(values: np.ndarray, cell: str) -> np.ndarray:
    """[G*H, K] in torch's gate order to [K, G*H] in Keras'; its own inverse on [K, G*H].T. Vectors stay vectors."""
    blocks = np.split(values, len(GATES[cell]))
    return np.ascontiguousarray(np.concatenate([blocks[gate] for gate in GATES[cell]]).T)


class KerasPeer(PackagePeer):
    """Input is [B, T, I], Keras' own layout, made outside of the timed step. Threads are set once a process."""

    key, title = "keras", "Keras on TensorFlow"
    packages, imports = ("keras", "tensorflow-cpu"), ("keras", "tensorflow")

    def __init__(self) -> None:
        self._threads = 0

    def version(self) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return super().version()
        except PackageNotFoundError:  # the package with GPU kernels has another name
            return f"keras {version('keras')}, tensorflow {version('tensorflow')}"

    def supports(self, case: Case, mode: str) -> str | None:
        if self._threads not in (0, torch.get_num_threads()):
            return f"its pool was made with {self._threads} threads"
        return plain_layer(case, mode, training=True)

    def start(self) -> tuple[Any, Any]:
        if not self._threads:
            self._threads = torch.get_num_threads()
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            os.environ.setdefault("KERAS_BACKEND", "tensorflow")
            with all_cores():
                tensorflow = importlib.import_module("tensorflow")
                tensorflow.get_logger().setLevel("ERROR")  # every row traces a function of its own
                tensorflow.config.threading.set_intra_op_parallelism_threads(self._threads)
                tensorflow.config.threading.set_inter_op_parallelism_threads(1)
                tensorflow.linalg.matmul(tensorflow.ones([64, 64]), tensorflow.ones([64, 64]))  # its threads start here
        return importlib.import_module("tensorflow"), importlib.import_module("keras")

    def layer(self, keras: Any, case: Case, data: Data) -> Any:
        options: dict[str, Any] = {"return_sequences": True, "return_state": True}
        if case.cell == "GRU":
            options["reset_after"] = True
        if case.cell == "RNN" and case.nonlinearity == "relu":
            options["activation"] = "relu"
        kind = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "SimpleRNN"}[case.cell]
        layer = getattr(keras.layers, kind)(case.H, **options)
        layer.build((case.B, case.T, case.I))
        weights = {name: transposed(value.numpy(), case.cell) for name, value in data.weights.items()}
        biases = [weights["bias_ih_l0"], weights["bias_hh_l0"]]
        bias = np.stack(biases) if case.cell == "GRU" else biases[0] + biases[1]
        layer.set_weights([weights["weight_ih_l0"], weights["weight_hh_l0"], bias])
        return layer

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        tensorflow, keras = self.start()
        layer = self.layer(keras, case, data)
        input = tensorflow.constant(np.ascontiguousarray(data.input.numpy().swapaxes(0, 1)))  # [B, T, I]
        states = None if data.state is None else [tensorflow.constant(s[0].numpy()) for s in data.state]
        grad_output = tensorflow.constant(np.ascontiguousarray(data.grad_outputs[0].numpy().swapaxes(0, 1)))
        weights = layer.trainable_variables

        def forward(input: Any) -> Any:
            return layer(input, initial_state=states, training=mode == "train")

        def train(input: Any) -> Any:
            with tensorflow.GradientTape() as tape:
                tape.watch(input)
                result = forward(input)
            sources = [input, *(weight.value for weight in weights)]
            return result, tape.gradient(result[0], sources, output_gradients=grad_output)

        function = tensorflow.function(train if mode == "train" else forward)

        def results() -> dict[str, torch.Tensor]:
            made = function(input)
            (output, *finals), grads = made if mode == "train" else (made, None)
            arrays = {"output": output.numpy().swapaxes(0, 1)}
            arrays |= {n: s.numpy()[None] for n, s in zip(("h_n", "c_n"), finals, strict=False)}
            if grads is not None:
                grad_input, weight_ih, weight_hh, bias = (np.asarray(grad) for grad in grads)
                arrays["grad_input"] = grad_input.swapaxes(0, 1)
                pair = bias if case.cell == "GRU" else (bias, bias)  # of a sum, each bias has the same gradient
                torch_form = (weight_ih.T, weight_hh.T, *pair)
                names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
                arrays |= {f"grad_{n}": transposed(g, case.cell).T for n, g in zip(names, torch_form, strict=True)}
            return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

        with all_cores():
            function(input)
        kernel = f"tf.function of a Keras layer, {self._threads} threads"
        return Prepared(lambda: function(input), results, kernel=lambda: kernel)
