"""A character language model: trains, checkpoints, resumes and samples, on fastrnn or on torch.nn.

    python examples/char_lm.py              # learn from the standard library's source, then write some
    python examples/char_lm.py --compare    # both backends: are the losses the same, and which is faster?
    python examples/char_lm.py --text book.txt --checkpoint lm.pt --steps 5000
    python examples/char_lm.py --text book.txt --checkpoint lm.pt --steps 5000 --resume    # bit for bit

Losses are in bits per character; T is --seq-len, B --batch, V the vocabulary's size, H --hidden.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import BACKENDS, library_of, machine_facts, number, streams

PROGRAM, SCHEMA = "fastrnn char_lm", 1  # stand in every checkpoint and results file

# What a run's numbers depend on besides text, backend, device and threads: options that a checkpoint fixes.
MODEL_OPTIONS = ("cell", "embed", "hidden", "layers", "dropout", "dtype", "seed")
CONFIG = (*MODEL_OPTIONS, "batch", "seq_len", "optimizer", "lr", "clip", "valid_fraction")

# --compare: largest difference of losses, bits/char. A relative error of 1e-6 in every h and c moves the
# first 20 float32 losses by about 1e-6; rounding h to bfloat16 moves them by 1e-4, a cut gradient by 1e-3.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}

# Not the library's own source: tests, installed packages, tables, files that hold the build machine's paths.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")

State = Tensor | tuple[Tensor, Tensor] | None  # h [layers, B, H]; (h, c) for LSTM; None: zeros


class InputError(ValueError):
    """An option, text or checkpoint that cannot be used: what it is, what was expected, what came."""


def fail(argument: str, expected: object, actual: object) -> NoReturn:
    raise InputError(f"{argument}: expected {expected}, got {actual}")


# ---- text ----


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers; its end is held out for validation."""

    train: Tensor  # int64 [characters]
    valid: Tensor  # int64 [characters]
    vocabulary: str  # sorted; a symbol's number is its index
    sha256: str  # of the whole text as UTF-8

    def unigram_entropy(self) -> float:
        """Bits per held-out character for a model that knows symbol frequencies only (add-one counts)."""
        counts = torch.bincount(self.train, minlength=len(self.vocabulary)).double() + 1
        return -(counts / counts.sum()).log2()[self.valid].mean().item()

    def encode(self, text: str, argument: str) -> Tensor:
        """int64 [len(text)]"""
        if not text or not set(text) <= set(self.vocabulary):
            fail(argument, f"one or more of the text's {len(self.vocabulary)} characters", repr(text))
        return torch.tensor([self.vocabulary.index(char) for char in text])


def stdlib_files(root: Path) -> list[Path]:
    """The library's own .py files below root, sorted by their path from root."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in EXCLUDED and not s.startswith(EXCLUDED_PREFIXES)]
        found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(EXCLUDED_PREFIXES)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_text(max_chars: int) -> str:
    """The first max_chars characters of the Python standard library's source."""
    text = ""
    for path in stdlib_files(Path(sysconfig.get_paths()["stdlib"])):
        if len(text) >= max_chars:
            break
        text += path.read_text(encoding="utf-8", errors="replace")
    return text[:max_chars]


def read_text(path: Path | None, max_chars: int) -> str:
    """The first max_chars characters of the file or, without one, of the standard library."""
    if path is None:
        return stdlib_text(max_chars)
    try:
        return path.read_text(encoding="utf-8")[:max_chars]
    except (OSError, UnicodeDecodeError) as error:
        fail("--text", "a readable UTF-8 text file", f"{path} ({error})")


def make_corpus(text: str, config: argparse.Namespace) -> Corpus:
    held_out = int(len(text) * config.valid_fraction)
    size, needed = len(text) - held_out, config.batch * (config.seq_len + 1)
    if size < needed or held_out < 2:
        expected = f"at least {needed:,} characters to train on (--batch * (--seq-len + 1)) and 2 to hold out"
        fail("--text", expected, f"{size:,} and {held_out:,}")
    codes = torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32)
    symbols, ids = codes.unique(return_inverse=True)
    vocabulary, sha256 = "".join(map(chr, symbols.tolist())), hashlib.sha256(text.encode()).hexdigest()
    return Corpus(ids[:size], ids[size:], vocabulary, sha256)


# ---- model and training ----


class CharLM(nn.Module):
    """Embedding, recurrent layers, linear head. `library` is fastrnn or torch.nn; nothing else differs."""

    def __init__(self, library: Any, config: argparse.Namespace, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, config.embed)
        recurrent = getattr(library, config.cell.upper())  # LSTM, GRU or RNN
        self.rnn = recurrent(config.embed, config.hidden, num_layers=config.layers, dropout=config.dropout)
        self.head = nn.Linear(config.hidden, symbols)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """int64 ids [T, B] -> logits [T, B, V] and the state after the last step"""
        output, state = self.rnn(self.embedding(ids), state)
        return self.head(output), state


def bits_per_char(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over logits [T, B, V] and targets [T, B]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, tuple):
        return function(state[0]), function(state[1])
    return None if state is None else function(state)


class Trainer:
    """One model on its way through the text: the state crosses the chunks' borders, gradients do not."""

    def __init__(self, backend: str, config: argparse.Namespace, corpus: Corpus, device: torch.device):
        torch.manual_seed(config.seed)
        model = CharLM(library_of(backend), config, len(corpus.vocabulary))
        self.model = model.to(device, getattr(torch, config.dtype))
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        self.optimizer = optimizer(self.model.parameters(), lr=config.lr, fused=True)
        self.config, self.corpus, self.device = config, corpus, device
        self.streams = streams(corpus.train, config.batch).to(device)  # [S, B]
        self.step = 0  # chunks trained on
        self.position = 0  # of the next chunk in the streams
        self.state: State = None

    def train_chunk(self) -> Tensor:
        """Trains on the next [T, B] characters; their loss before the update, bits/char []."""
        self.model.train()
        if self.position + self.config.seq_len >= len(self.streams):
            self.position, self.state = 0, None
        chunk = self.streams[self.position : self.position + self.config.seq_len + 1]
        logits, state = self.model(chunk[:-1], self.state)
        loss = bits_per_char(logits, chunk[1:])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.state = map_state(Tensor.detach, state)
        self.position += self.config.seq_len
        self.step += 1
        return loss.detach()

    def run(self, steps: int) -> tuple[list[float], float]:
        """The losses of the next steps and the seconds they took; reading the losses waits for the device."""
        start = time.perf_counter()
        losses = torch.stack([self.train_chunk() for _ in range(steps)]).tolist()
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, losses)):
            fail("--lr", f"finite losses up to step {self.step}", f"{losses} with {self.config.lr:g}")
        return losses, seconds

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per character of the held-out text, read in contiguous streams as in training."""
        self.model.eval()
        length, held_out = self.config.seq_len, self.corpus.valid
        batch = max(1, min(self.config.batch, len(held_out) // (length + 1)))
        text, state, total = streams(held_out, batch).to(self.device), None, 0.0
        for start in range(0, len(text) - 1, length):
            targets = text[start + 1 : start + length + 1]
            logits, state = self.model(text[start : start + len(targets)], state)
            total += bits_per_char(logits, targets).item() * len(targets)
        return total / (len(text) - 1)

    @torch.no_grad()
    def sample(self, prompt: str, length: int, temperature: float) -> str:
        """prompt and `length` more characters, from a generator of its own; temperature 0: the likeliest."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        ids, state, text = self.corpus.encode(prompt, "--prompt").view(-1, 1), None, prompt
        for _ in range(length):
            logits, state = self.model(ids.to(self.device), state)
            last = logits[-1].double().cpu()  # [1, V]
            if temperature > 0:
                ids = (last / temperature).softmax(-1).multinomial(1, generator=generator)
            else:
                ids = last.argmax(-1, keepdim=True)
            text += self.corpus.vocabulary[int(ids)]
        return text

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; the backend is not in it: each continues the other's."""
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "program": PROGRAM, "schema": SCHEMA,
            "config": {name: getattr(self.config, name) for name in CONFIG},
            "vocabulary": self.corpus.vocabulary, "text_sha256": self.corpus.sha256,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "position": self.position, "state": self.state,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda_rng},
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.position = saved["step"], saved["position"]
        self.state = map_state(lambda tensor: tensor.to(self.device), saved["state"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)


# ---- files ----


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """path holds its old content or all of the new one, wherever the writing stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    write_atomically(path, functools.partial(torch.save, trainer.state_dict()))


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    """Continues from path, if it is undamaged and of the same configuration and text."""
    wanted = f"an undamaged checkpoint of {PROGRAM}, schema {SCHEMA}"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch.load raise a dozen kinds on a damaged file
        fail("--checkpoint", wanted, f"{path} ({type(error).__name__}: {error})")
    header = (saved.get("program"), saved.get("schema")) if isinstance(saved, dict) else type(saved).__name__
    if damaged or header != (PROGRAM, SCHEMA):
        fail("--checkpoint", wanted, f"{path} ({damaged or header})")
    for name, stored in saved["config"].items():
        if stored != getattr(trainer.config, name):
            option = "--" + name.replace("_", "-")
            fail(option, f"{stored} as in the checkpoint {path}", getattr(trainer.config, name))
    if saved["text_sha256"] != trainer.corpus.sha256:
        expected = f"the checkpoint's text, SHA-256 {saved['text_sha256'][:12]}"
        fail("--text or --max-chars", expected, trainer.corpus.sha256[:12])
    trainer.load_state_dict(saved)


# ---- the two commands: each returns the exit status and the results ----


def progress_bar(start: int, total: int) -> Any:
    """Of characters, on stderr; silent where that is not a terminal."""
    return tqdm(initial=start, total=total, unit="char", unit_scale=True, disable=None)


def train(args: argparse.Namespace, trainer: Trainer) -> tuple[int, dict[str, Any]]:
    """Trains up to step --steps, validating and saving on the way, then samples."""
    if args.resume:
        load_checkpoint(trainer, args.checkpoint)
        print(f"resumed   {args.checkpoint} at step {trainer.step}")
    losses: list[float] = []
    validation: list[dict[str, float]] = []
    seconds, chars = 0.0, args.batch * args.seq_len
    strides = (args.valid_every, args.checkpoint_every, 1 if trainer.device.type == "cpu" else 10)
    with progress_bar(trainer.step * chars, args.steps * chars) as bar:
        while trainer.step < args.steps:
            steps = min(args.steps - trainer.step, *(stride - trainer.step % stride for stride in strides))
            new_losses, new_seconds = trainer.run(steps)
            losses, seconds = losses + new_losses, seconds + new_seconds
            bar.set_postfix({"bits/char": f"{losses[-1]:.3f}"}, refresh=False)
            bar.update(steps * chars)
            done = trainer.step == args.steps
            if done or trainer.step % args.valid_every == 0:
                recent, held_out = statistics.fmean(losses[-args.valid_every :]), trainer.validate()
                validation.append({"step": trainer.step, "bits_per_char": held_out})
                bar.write(f"step {trainer.step:6d}   train {recent:.4f}   held out {held_out:.4f} bits/char")
            if args.checkpoint and (done or trainer.step % args.checkpoint_every == 0):
                save_checkpoint(trainer, args.checkpoint)
    results: dict[str, Any] = {"step": trainer.step, "losses": losses, "validation": validation}
    if losses:
        results["chars_per_second"] = len(losses) * chars / seconds
        print(f"speed     {results['chars_per_second']:,.0f} chars/s ({args.backend}, training steps only)")
    if args.sample:
        results["sample"] = trainer.sample(args.prompt, args.sample, args.temperature)
        print(f"sample    temperature {args.temperature:g}\n{results['sample']}")
    return 0, results


def compare(args: argparse.Namespace, trainers: dict[str, Trainer]) -> tuple[int, dict[str, Any]]:
    """Do both backends lose the same, to rounding, and which is faster? Status 1 if the losses differ.

    They take turns, --block steps each, the first of a pair alternating, so that a busy machine slows both.
    """
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    speeds: dict[str, list[float]] = {name: [] for name in trainers}  # chars/s in each timed block
    order, chars = list(trainers), args.batch * args.seq_len
    with progress_bar(0, args.steps * chars) as bar:
        for done in range(0, args.steps, args.block):
            steps = min(args.block, args.steps - done)
            for name in order:
                new_losses, seconds = trainers[name].run(steps)
                losses[name] += new_losses
                if done >= args.warmup and steps == args.block:
                    speeds[name].append(steps * chars / seconds)
            order.reverse()
            bar.set_postfix({"bits/char": f"{losses['torch'][-1]:.3f}"}, refresh=False)
            bar.update(steps * chars)

    checked = min(args.check_steps, args.steps)
    differences = [abs(ours - theirs) for ours, theirs in zip(*losses.values(), strict=True)][:checked]
    largest = max(differences)
    agree = largest <= args.tolerance
    where = f"bits/char at step {differences.index(largest) + 1}, tolerance {args.tolerance:.0e}"
    print(f"losses    {'agree' if agree else 'DIFFER'} in the first {checked} steps")
    print(f"          largest difference {largest:.1e} {where}")
    ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]  # of each pair of blocks
    ratio = statistics.median(ratios)
    print(f"speed     whole training steps, median of {len(ratios)} paired blocks of {args.block} steps")
    for name, values in losses.items():
        bits = f"bits/char {values[0]:.6f} at step 1, {values[-1]:.6f} at step {args.steps}"
        print(f"          {name:7s} {statistics.median(speeds[name]):11,.0f} chars/s   {bits}")
    wins = sum(each > 1 for each in ratios)
    faster = f"fastrnn is faster, in {wins}" if ratio > 1 else f"torch.nn is faster, in {len(ratios) - wins}"
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"          ratio   {ratio:11.3f} {spread}: {faster} of {len(ratios)} pairs")
    check = {"steps": checked, "tolerance": args.tolerance, "largest_difference": largest, "agree": agree}
    speed = {"chars_per_second": speeds, "ratios": ratios, "median_ratio": ratio}
    return 0 if agree else 1, {"losses": losses, "loss_check": check, "speed": speed}


# ---- options ----


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("char_lm", description=__doc__.splitlines()[0])
    count, positive = number(int, 1), number(float, 0, above=True)
    fraction = number(float, 0, 0.5, above=True)

    def add(name: str, *, help: str = "", **options: Any) -> None:
        shown = "(default: %(default)s)" if "default" in options else ""
        parser.add_argument(name, help=f"{help} {shown}".strip(), **options)

    add("--text", type=Path, metavar="FILE", help="UTF-8 text; by default the standard library's source")
    add("--max-chars", type=count, default=2_000_000, metavar="N", help="use only the text's beginning")
    add("--valid-fraction", type=fraction, default=0.05, help="of the text, held out at its end")
    add("--backend", choices=BACKENDS, default="fastrnn")
    add("--compare", action="store_true", help="run both backends, check that they agree and time them")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    add("--embed", type=count, default=64, help="embedding size")
    add("--hidden", type=count, default=256, help="hidden size")
    add("--layers", type=count, default=2, help="recurrent layers")
    add("--dropout", type=number(float, 0, 1), default=0.0, help="between the recurrent layers")
    add("--batch", type=count, default=32, help="streams that the text is cut into")
    add("--seq-len", type=count, default=128, help="characters in a chunk of truncated back-propagation")
    add("--steps", type=count, help="chunks in all, resumed ones included; by default 500, or 60 to compare")
    add("--optimizer", choices=("adam", "adamw"), default="adamw")
    add("--lr", type=positive, default=3e-3, help="learning rate")
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--dtype", choices=TOLERANCE, default="float32")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=count, help="CPU threads; by default torch's own choice")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--valid-every", type=count, default=100, metavar="STEPS", help="steps between validations")
    add("--checkpoint", type=Path, metavar="FILE", help="save to FILE, atomically")
    add("--checkpoint-every", type=count, default=100, metavar="STEPS", help="steps between saves")
    add("--resume", action="store_true", help="continue from --checkpoint")
    add("--sample", type=number(int, 0), default=400, metavar="N", help="characters to write at the end")
    add("--prompt", help="what the sample continues; by default the text's first character")
    add("--temperature", type=number(float, 0), default=0.7, help="of the sample; 0: the likeliest")
    add("--block", type=count, default=5, metavar="STEPS", help="--compare: steps of one turn")
    add("--warmup", type=number(int, 0), default=10, metavar="STEPS", help="--compare: steps before timing")
    add("--check-steps", type=count, default=20, help="--compare: first steps whose losses must agree")
    add("--tolerance", type=number(float, 0), help=f"--compare: difference of losses; by default {TOLERANCE}")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    args.steps = args.steps or (60 if args.compare else 500)
    args.tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    return args


def check_options(args: argparse.Namespace) -> torch.device:
    """What argparse cannot check, before any work; returns the device."""
    shortest = args.warmup + 2 * args.block
    if args.resume and args.checkpoint is None:
        fail("--resume", "--checkpoint FILE beside it", "none")
    if args.compare and args.checkpoint is not None:
        fail("--checkpoint", "no --compare beside it", args.checkpoint)
    if args.compare and args.dropout > 0:
        fail("--dropout", "0 with --compare (other masks, other losses)", args.dropout)
    if args.compare and args.steps < shortest:
        fail("--steps", f"at least --warmup + 2 * --block = {shortest} with --compare", args.steps)
    for option, path in (("--checkpoint", args.checkpoint), ("--json", args.json)):
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            fail(option, "a file in a folder that can be written to", path)
    if args.resume and not args.checkpoint.exists():
        fail("--checkpoint", "an existing file with --resume", args.checkpoint)
    if args.checkpoint is not None and args.checkpoint.exists() and not args.resume:
        fail("--checkpoint", "a new file, or --resume to continue", f"{args.checkpoint}, which exists")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        fail("--device", "cpu, cuda or cuda:N", args.device)
    try:
        return torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        fail("--device", "an available device", f"{args.device} ({str(error).splitlines()[0]})")


def prepare(args: argparse.Namespace) -> tuple[Corpus, dict[str, Trainer], torch.device]:
    """Checks everything, builds the trainers and says what is going to run."""
    device = check_options(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # full float32 in both
    text = read_text(args.text, args.max_chars)
    corpus = make_corpus(text, args)
    args.prompt = text[0] if args.prompt is None else args.prompt
    corpus.encode(args.prompt, "--prompt")  # fails now rather than after the training
    backends = list(BACKENDS) if args.compare else [args.backend]
    trainers = {name: Trainer(name, args, corpus, device) for name in backends}
    facts, size = machine_facts(device), sum(p.numel() for p in trainers[backends[0]].model.parameters())
    parts = f"{len(corpus.train):,} characters to train on, {len(corpus.valid):,} held out"
    print(f"text      {args.text or 'Python standard library'}: {parts}, {len(corpus.vocabulary)} different")
    print(f"model     {args.cell.upper()}, {args.layers} x {args.hidden}, {size:,} parameters, {args.dtype}")
    print(f"machine   {' and '.join(backends)} on {args.device} ({facts['cpu']}, {facts['threads']} threads)")
    print(f"baseline  unigram entropy {corpus.unigram_entropy():.4f} bits/char: symbol frequencies alone")
    return corpus, trainers, device


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if --compare finds a difference, 2 for unusable input, 130 if interrupted."""
    args = parse_options(argv)
    try:
        corpus, trainers, device = prepare(args)
        status, results = compare(args, trainers) if args.compare else train(args, trainers[args.backend])
    except InputError as error:
        print(f"char_lm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = args.checkpoint is not None and args.checkpoint.exists()
        kept = f": --resume continues from {args.checkpoint}" if saved else ""
        print(f"char_lm: interrupted{kept}", file=sys.stderr)
        return 130
    if args.json is not None:
        report = {"program": PROGRAM, "schema": SCHEMA, "mode": "compare" if args.compare else "train"}
        report |= {"options": vars(args), "machine": machine_facts(device), "text_sha256": corpus.sha256}
        report |= {"unigram_entropy": corpus.unigram_entropy(), "status": status, "results": results}
        content = json.dumps(report, indent=1, default=str).encode()
        write_atomically(args.json, lambda file: file.write(content))
    return status


if __name__ == "__main__":
    sys.exit(main())
