"""ONNX Runtime and OpenVINO, on the same ONNX model. Inference only."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers import onnx_model
from benchmarks.peers.base import PackagePeer, Prepared, all_cores, plain_layer


def named(outputs: Any) -> dict[str, torch.Tensor]:
    """Y [T, 1, B, H], Y_h, Y_c under torch.nn's names."""
    arrays = [torch.from_numpy(np.array(array)) for array in outputs]
    return {"output": arrays[0].squeeze(1), **dict(zip(("h_n", "c_n"), arrays[1:], strict=False))}


class OnnxRuntimePeer(PackagePeer):
    """Threads of its own, which spin while they wait inside a run, but are stopped at its end.

    Left alone they go on spinning after a run and take the core from whoever is timed next; with spinning forbidden
    altogether ONNX Runtime is slower than its users know it.
    """

    key, title = "onnxruntime", "ONNX Runtime"
    packages = imports = ("onnxruntime", "onnx")

    def supports(self, case: Case, mode: str) -> str | None:
        return plain_layer(case, mode, training=False)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = onnx_model.build(case, data).SerializeToString()
        with all_cores():
            session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = onnx_model.inputs(case, data)

        def step() -> Any:
            return session.run(None, inputs)

        kernel = f"CPUExecutionProvider, {case.cell} node, {options.intra_op_num_threads} threads"
        return Prepared(step, lambda: named(step()), kernel=lambda: kernel)


class OpenVinoPeer(PackagePeer):
    """float32 is asked for by name: left alone, OpenVINO takes bfloat16 on processors that have it."""

    key, title = "openvino", "OpenVINO"
    packages, imports = ("openvino", "onnx"), ("openvino", "onnx")

    def supports(self, case: Case, mode: str) -> str | None:
        return plain_layer(case, mode, training=False)

    def prepare(self, case: Case, mode: str, data: Data) -> Prepared:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        model = core.read_model(onnx_model.build(case, data).SerializeToString())
        with all_cores():
            compiled = core.compile_model(model, "CPU", options)
            request = compiled.create_infer_request()
            for name, array in onnx_model.inputs(case, data).items():
                request.set_tensor(name, openvino.Tensor(array))
            request.infer()  # its threads start here

        def results() -> dict[str, torch.Tensor]:
            request.infer()
            return named([request.get_output_tensor(index).data for index in range(len(compiled.outputs))])

        def kernel() -> str:
            nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
            types = [(str(node["layerType"].value), str(node["primitiveType"].value)) for node in nodes]
            found = sorted({f"{layer} {primitive}" for layer, primitive in types if "RNN" in layer or "LSTM" in layer})
            return ", ".join(found) or "CPU plugin"

        return Prepared(request.infer, results, kernel=kernel)
