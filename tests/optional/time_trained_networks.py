"""How long trained networks take, as their users run them and with recurrent modules of ours.

`python -m tests.optional.time_trained_networks` prints a table in Markdown: medians of blocks of calls in turns, and
the pairs' ratio (their time / fastrnn's) with its interval. silero-vad runs on one thread, as it sets itself, the rest
on ``--threads``.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastrnn
from benchmarks.stats import median_interval

from . import trained_networks
from .packages import folder
from .time_models import medians, paired

Call = Callable[[], Any]
Row = tuple[str, str, Call, Call]  # what, what runs it, theirs, ours


def silero_vad() -> Iterator[Row]:
    import onnx
    import onnxruntime

    torch.set_num_threads(1)
    silero, audio = trained_networks.silero_vad(), trained_networks.speech()
    torch.set_num_threads(1)
    window = audio[512 * 300 :][:512]
    jit, runtime = silero.load_silero_vad(), silero.load_silero_vad(onnx=True)
    ours = trained_networks.SileroVAD.of_jit(jit)
    theirs = trained_networks.SileroVAD.of_jit(jit, torch.nn)
    what = "silero-vad, a window of 32 ms"
    yield what, "ONNX Runtime", lambda: runtime(window, 16000), lambda: ours(window, 16000)
    yield what, "TorchScript", lambda: jit(window, 16000), lambda: ours(window, 16000)
    yield what, "torch.nn", lambda: theirs(window, 16000), lambda: ours(window, 16000)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = fastrnn.to_onnx(ours.rnn, states=True).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x, state = torch.randn(1, 1, 128), (torch.zeros(1, 1, 128), torch.zeros(1, 1, 128))
    feeds = {name: each.numpy() for name, each in zip(("input", "h_0", "c_0"), (x, *state), strict=True)}
    yield "its LSTM alone, a step", "ONNX Runtime", lambda: session.run(None, feeds), lambda: ours.rnn(x, state)
    sequence = silero.load_silero_vad(sequence=True, max_frames=1024)
    graph = onnx.load(folder("silero_vad") / "data" / "silero_vad_16k_sequence.onnx").graph
    whole, array = trained_networks.SileroVAD.of_onnx(graph), audio.numpy()
    what = "silero-vad, 30 s in one call"
    yield what, "ONNX Runtime", lambda: sequence.audio_forward(array), lambda: whole.audio_forward(audio)


def converted(what: str, model: Any, run: Callable[[Any], Any]) -> Iterator[Row]:
    ours = fastrnn.convert(copy.deepcopy(model), strict=True)
    yield what, "torch.nn", lambda: run(model), lambda: run(ours)


def resemblyzer() -> Iterator[Row]:
    model, audio = trained_networks.voice_encoder(), trained_networks.speech()
    from resemblyzer.audio import wav_to_mel_spectrogram

    mels = torch.from_numpy(wav_to_mel_spectrogram(audio.numpy())).unfold(0, 160, 80).transpose(1, 2)[:8].contiguous()
    yield from converted("resemblyzer, 8 windows of 1.6 s", model, lambda model: model(mels))


def pyannote() -> Iterator[Row]:
    model = trained_networks.voice_activity()._segmentation.model
    windows = trained_networks.speech().unfold(0, 80000, 80000)[:, None].contiguous()
    yield from converted("whisperx (pyannote.audio), 6 windows of 5 s", model, lambda model: model(windows))
    features = model.sincnet(windows).transpose(1, 2).contiguous()
    yield from converted("its LSTMs alone", torch.nn.ModuleList([model.lstm]), lambda model: model[0](features))


def kraken() -> Iterator[Row]:
    model = trained_networks.layout_model()
    from kraken.lib.dataset import ImageInputTransforms

    page = ImageInputTransforms(1, 600, 0, 3, (0, 0), valid_norm=False)(trained_networks.page()).unsqueeze(0)
    yield from converted("kraken, a page of 600 x 402 pixels", model.nn, lambda network: network(page))


def g2p_en() -> Iterator[Row]:
    theirs = trained_networks.g2p()
    ours = trained_networks.with_our_grus(theirs)
    yield "g2p_en, a word", "NumPy", lambda: theirs.predict("activationist"), lambda: ours.predict("activationist")


def textgenrnn() -> Iterator[Row]:
    model, utils, vocabulary = trained_networks.textgenrnn()
    ours = trained_networks.TextGenerator(model)
    tokens = utils.textgenrnn_encode_sequence(list("The quick brown fox jumps over the lazy")[-40:], vocabulary, 40)
    rows = tokens.repeat(128, 0)
    what = "textgenrnn, the next character"
    yield what, "Keras, predict", lambda: model.predict(tokens, verbose=0), lambda: ours.predict(tokens, 1)
    what += " of 128 texts"
    yield what, "Keras, predict_on_batch", lambda: model.predict_on_batch(rows), lambda: ours.predict(rows, 128)


NETWORKS = (silero_vad, resemblyzer, pyannote, kraken, g2p_en, textgenrnn)


def seconds_of(call: Call, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a block, about")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--networks", nargs="*", default=[f.__name__ for f in NETWORKS])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| | run by | its time | with fastrnn | ratio |\n|---|---|---|---|---|")
    for network in NETWORKS:
        if network.__name__ not in args.networks:
            continue
        torch.set_num_threads(args.threads)
        for what, runner, theirs, ours in network():
            warm = [min(seconds_of(call, 1) for _ in range(3)) for call in (theirs, ours)]
            count = max(1, round(args.seconds / max(warm)))
            times = paired([lambda call=call: seconds_of(call, count) for call in (theirs, ours)], args.pairs)
            ratio, (a, b) = median_interval([x / y for x, y in times]), medians(times)
            cells = (
                what,
                runner,
                f"{a:.3g} ms",
                f"{b:.3g} ms",
                f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
