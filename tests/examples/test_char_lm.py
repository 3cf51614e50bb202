"""examples/char_lm.py: it learns, both backends agree, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import char_lm
import fastrnn

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "char_lm.py"
SMALL = "--embed 8 --hidden 16 --batch 4 --seq-len 16 --steps 12 --lr 0.01 --sample 20 --threads 1"
COMPARE = "--compare --steps 20 --block 5 --warmup 5"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """--threads sets them for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 characters of words in random order: predictable within a word only."""
    words = ["grau,", "teurer", "Freund,", "ist", "alle", "Theorie\n", "und", "grün", "des", "Lebens", "Baum"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=5000))[:20_000], encoding="utf-8")
    return path


def run(text: Path, *options: object, expect: int = 0) -> dict[str, Any]:
    """Runs the program in this process: the JSON it wrote, or nothing if it had to fail."""
    report = text.with_name("report.json")
    argv: list[str] = []
    for option in ("--text", text, SMALL, *options, "--json", report):
        argv += option.split() if isinstance(option, str) else [str(option)]
    assert char_lm.main(argv) == expect
    return json.loads(report.read_text()) if expect in (0, 1) else {}


def error_of(capsys: pytest.CaptureFixture[str], text: Path, *options: object) -> str:
    """The error that the program ends with, from its own checks or from argparse."""
    try:
        run(text, *options, expect=2)
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]


def tensors_of(value: Any, path: str = "") -> dict[str, Any]:
    """A nested checkpoint as flat path -> leaf."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key in value for name, leaf in tensors_of(value[key], f"{path}/{key}").items()}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    left, right = (tensors_of(torch.load(path, weights_only=True)) for path in (first, second))
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


# ---- training ----


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
def test_training_beats_the_unigram_entropy(text: Path, backend: str) -> None:
    options = "--hidden 32 --layers 1 --batch 8 --steps 150 --valid-every 75"
    report = run(text, "--backend", backend, options)
    losses, validation = report["results"]["losses"], report["results"]["validation"]
    assert [entry["step"] for entry in validation] == [75, 150]
    assert len(losses) == 150
    assert report["unigram_entropy"] > 3.5
    assert losses[0] > report["unigram_entropy"]
    assert validation[-1]["bits_per_char"] < 0.6 * report["unigram_entropy"]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compare_agrees(text: Path, cell: str, dtype: str) -> None:
    report = run(text, COMPARE, "--cell", cell, "--dtype", dtype)
    check, speed = report["results"]["loss_check"], report["results"]["speed"]
    assert check["agree"] and check["steps"] == 20
    assert check["largest_difference"] <= char_lm.TOLERANCE[dtype]
    assert len(speed["ratios"]) == 3
    assert all(len(values) == 3 and min(values) > 0 for values in speed["chars_per_second"].values())


def test_compare_notices_a_cut_gradient(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient without its path through the carried bias must not pass for rounding."""
    library_of = char_lm.library_of

    class WrongLSTM(torch.nn.LSTM):
        def forward(self, *inputs: Any) -> Any:
            self.bias_hh_l0.requires_grad_(False)
            return super().forward(*inputs)

    wrong = ModuleType("wrong")
    wrong.LSTM = WrongLSTM  # type: ignore[attr-defined]
    monkeypatch.setattr(char_lm, "library_of", lambda name: wrong if name == "fastrnn" else library_of(name))
    report = run(text, COMPARE, expect=1)
    assert report["status"] == 1 and not report["results"]["loss_check"]["agree"]


def test_chunks_follow_each_other_with_carried_state(text: Path) -> None:
    """Chunk by chunk gives the loss of the whole stream at once; at its end a fresh state starts over."""
    args = char_lm.parse_options([*SMALL.split(), "--lr", "1e-12"])
    corpus = char_lm.make_corpus(text.read_text(encoding="utf-8")[:300], args)
    trainer = char_lm.Trainer("torch", args, corpus, torch.device("cpu"))
    length = len(corpus.train) // 4
    assert corpus.vocabulary == "".join(sorted(set(text.read_text(encoding="utf-8")[:300])))
    assert trainer.streams[:, 1].tolist() == corpus.train[length : 2 * length].tolist()
    chunks = (length - 1) // 16
    with torch.no_grad():
        whole = trainer.streams[: 16 * chunks + 1]
        expected = char_lm.bits_per_char(trainer.model(whole[:-1], None)[0], whole[1:]).item()
    losses, _ = trainer.run(chunks)
    assert sum(losses) / chunks == pytest.approx(expected, rel=1e-5)
    assert trainer.run(1)[0][0] == pytest.approx(losses[0], rel=1e-5)
    assert trainer.position == 16


# ---- checkpoints ----


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
def test_resume_is_bit_for_bit(text: Path, tmp_path: Path, backend: str, cell: str) -> None:
    """With dropout (the generator), Adam's moments, a carried state, and the text's end on the way."""
    options = ["--backend", backend, "--cell", cell, "--dropout 0.2 --max-chars 660 --threads 2"]
    whole = run(text, *options, "--checkpoint", tmp_path / "whole.pt")
    first = run(text, *options, "--checkpoint", tmp_path / "parts.pt", "--steps", 7)
    rest = run(text, *options, "--checkpoint", tmp_path / "parts.pt", "--resume")
    assert first["results"]["losses"] + rest["results"]["losses"] == whole["results"]["losses"]
    assert rest["results"]["sample"] == whole["results"]["sample"]
    assert rest["results"]["validation"][-1] == whole["results"]["validation"][-1]
    assert_same_checkpoint(tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_each_backend_continues_the_others_checkpoint(text: Path, tmp_path: Path) -> None:
    whole = run(text, "--backend", "torch")["results"]["losses"]
    for first, second in (("fastrnn", "torch"), ("torch", "fastrnn")):
        path = tmp_path / f"{first}.pt"
        run(text, "--backend", first, "--checkpoint", path, "--steps", 6)
        rest = run(text, "--backend", second, "--checkpoint", path, "--resume")["results"]["losses"]
        assert rest == pytest.approx(whole[6:], abs=char_lm.TOLERANCE["float32"])


def test_interrupted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C: one line, which names a checkpoint only where there is one, and the shell's own status for it."""
    chunk = char_lm.Trainer.train_chunk

    def interrupted_at_step_8(trainer: Any) -> torch.Tensor:
        if trainer.step == 8:
            raise KeyboardInterrupt
        return chunk(trainer)

    monkeypatch.setattr(char_lm.Trainer, "train_chunk", interrupted_at_step_8)
    path = tmp_path / "lm.pt"
    for options, said in (
        ([], "char_lm: interrupted"),
        (["--checkpoint", path], "char_lm: interrupted"),
        (["--checkpoint", path, "--checkpoint-every", 5], f"char_lm: interrupted: --resume continues from {path}"),
        ([COMPARE], "char_lm: interrupted"),
    ):
        run(text, "--backend torch", *options, expect=130)
        assert capsys.readouterr().err.splitlines()[-1] == said


def test_interrupted_write_keeps_the_old_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lm.pt"
    run(text, "--backend torch --checkpoint", path, "--steps", 5)
    before = path.read_bytes()

    def full_disk(value: Any, file: Any) -> None:
        file.write(before[:1000])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(text, "--backend torch --checkpoint", path, "--resume")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["lm.pt"]
    run(text, "--backend torch --checkpoint", path, "--resume")


def test_damaged_checkpoints_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lm.pt"
    resume = ["--backend torch --checkpoint", path, "--resume"]
    run(text, "--backend torch --checkpoint", path, "--steps", 5)
    good = path.read_bytes()
    weights = torch.load(path, weights_only=True)["model"]["rnn.weight_hh_l0"].numpy().tobytes()
    flipped = bytearray(good)
    flipped[good.index(weights) + 11] ^= 16  # one bit of one weight: torch.load alone takes it
    for damaged in (b"", b"hello", good[: len(good) // 2], good[:-1], good[100:], bytes(flipped)):
        path.write_bytes(damaged)
        assert "--checkpoint: expected an undamaged checkpoint" in error_of(capsys, text, *resume)
    others: list[Any] = [{"model": {}}, torch.zeros(3), {"program": char_lm.PROGRAM, "schema": 99}]
    for other in others:
        torch.save(other, path)
        assert "--checkpoint: expected an undamaged checkpoint" in error_of(capsys, text, *resume)
    path.write_bytes(good)
    run(text, *resume)


def test_checkpoint_of_another_run_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lm.pt"
    run(text, "--backend torch --checkpoint", path, "--steps", 5)
    resume = ["--backend torch --checkpoint", path, "--resume"]
    wrong = f"--hidden: expected 16 as in the checkpoint {path}, got 24"
    assert error_of(capsys, text, *resume, "--hidden", 24) == wrong
    assert "--cell: expected lstm" in error_of(capsys, text, *resume, "--cell", "gru")
    assert "--seq-len: expected 16" in error_of(capsys, text, *resume, "--seq-len", 8)
    assert "--text or --max-chars: expected" in error_of(capsys, text, *resume, "--max-chars", 10_000)


# ---- input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "argument --steps: expected int >= 1, got '0'"),
        ("--hidden big", "argument --hidden: expected int >= 1, got 'big'"),
        ("--lr -1", "argument --lr: expected float > 0, got '-1'"),
        ("--lr nan", "argument --lr: expected float > 0, got 'nan'"),
        ("--clip inf", "argument --clip: expected float > 0, got 'inf'"),
        ("--dropout 1.5", "argument --dropout: expected float >= 0 and <= 1, got '1.5'"),
        ("--cell mamba", "argument --cell: invalid choice: 'mamba'"),
        ("--resume", "--resume: expected --checkpoint FILE beside it, got none"),
        ("--checkpoint nowhere/lm.pt", "--checkpoint: expected a file in a folder that can be written to"),
        ("--checkpoint new.pt --resume", "--checkpoint: expected an existing file with --resume, got new.pt"),
        ("--compare --checkpoint new.pt", "--checkpoint: expected no --compare beside it, got new.pt"),
        ("--compare --dropout 0.1", "--dropout: expected 0 with --compare"),
        ("--compare --steps 19", "--steps: expected at least --warmup + 2 * --block = 20 with --compare"),
        ("--device warp", "--device: expected cpu, cuda or cuda:N, got warp"),
        ("--device cuda:99", "--device: expected an available device, got cuda:99"),
        ("--prompt €", "--prompt: expected one or more of the text's"),
        ("--max-chars 60", "--text: expected at least 68 characters to train on"),
        ("--backend torch --lr 1e30 --clip 1e30", "--lr: expected finite losses up to step"),
    ],
)
def test_bad_options(text: Path, capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert message in error_of(capsys, text, options)


def test_bad_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    assert "--text: expected a readable UTF-8 text file" in error_of(capsys, path)
    path.write_bytes(b"\xff\xfe\xff" * 1000)
    assert "--text: expected a readable UTF-8 text file" in error_of(capsys, path)
    for content in ("", "short"):
        path.write_text(content)
        assert "--text: expected at least 68 characters" in error_of(capsys, path)


def test_existing_checkpoint_is_not_overwritten(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lm.pt"
    path.write_text("precious")
    assert "--checkpoint: expected a new file, or --resume" in error_of(capsys, text, "--checkpoint", path)
    assert path.read_text() == "precious"


def test_stdlib_corpus() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in char_lm.stdlib_files(root)]
    assert len(names) > 300 and names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    first = char_lm.stdlib_text(100_000)
    assert len(first) == 100_000 and first == char_lm.stdlib_text(150_000)[:100_000]
    assert (root / names[0]).read_text(encoding="utf-8")[:1000] == first[:1000]


def test_sampling_is_deterministic_from_the_seed(text: Path) -> None:
    def sample(*options: object) -> str:
        return run(text, "--backend", "torch", "--prompt", "grün", *options)["results"]["sample"]

    first = sample()
    assert len(first) == 24 and first.startswith("grün") and first == sample()
    assert first != sample("--seed", 1)
    assert sample("--temperature", 0) == sample("--temperature", 1e-9)


def test_command_line(text: Path, tmp_path: Path) -> None:
    """As a user starts it: no progress bar into a pipe, the same numbers as in this process."""
    options = ["--text", str(text), *SMALL.split(), "--json", str(tmp_path / "out.json")]
    same_package = os.environ | {"PYTHONPATH": str(Path(fastrnn.__file__).parent.parent)}
    result = subprocess.run(
        [sys.executable, SCRIPT, *options],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env=same_package,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "held out" in result.stdout and "chars/s" in result.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["schema"] == 1 and report["mode"] == "train" and report["options"]["hidden"] == 16
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["threads"] == 1
    assert report["results"]["losses"] == run(text)["results"]["losses"]
