"""The modules in several processes, and in what training loops do to parameters.

DDP and FSDP2 over two processes, forked workers, shared memory, swapped tensors, parametrizations, pruning, fused
optimizers. See transforms/test_modules.py for DDP and FSDP2 in one process, test_surface.py for copies.
"""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, Dataset

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, assert_equal, build, evaluate, evaluate_cell, pair, randn, weighted

ROOT = Path(__file__).resolve().parents[2]
KIND = pytest.mark.parametrize("kind", KINDS)
ANY_KIND = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])


# ---- two processes ----


class Everything(nn.Module):
    """Every kind, of odd sizes, so that no parameter is split evenly."""

    def __init__(self, namespace: Any = fastrnn) -> None:
        super().__init__()
        self.lstm = namespace.LSTM(3, 5, 2, bidirectional=True)
        self.projected = namespace.LSTM(10, 7, proj_size=3, bias=False)
        self.gru = namespace.GRU(3, 5, bidirectional=True)
        self.rnn = namespace.RNN(10, 5, nonlinearity="tanh")
        self.cells = nn.ModuleList(
            [namespace.LSTMCell(5, 3), namespace.GRUCell(3, 3), namespace.RNNCell(3, 3, nonlinearity="relu")]
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, 3] -> [T, B, 3]"""
        for layer in (self.lstm, self.projected, self.gru, self.rnn):
            x, _ = layer(x)
        lstm, gru, rnn = self.cells
        h, c = lstm(x[-1])
        return rnn(gru(h, c), h) + x.mean(dim=(0, 2))[:, None]


def make_model(namespace: Any = fastrnn) -> nn.Module:
    torch.manual_seed(3)
    return Everything(namespace).double()


def train(model: nn.Module, rows: slice, steps: int = 4) -> list[float]:
    """Losses of these rows of each step's batch."""
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.03), []
    for step in range(steps):
        x, target = randn(6, 4, 3, seed=step), randn(4, 3, seed=100 + step)
        loss = (model(x[:, rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp() -> nn.Module:
    return DistributedDataParallel(make_model(), gradient_as_bucket_view=True)


def ddp_converted() -> nn.Module:
    """Swapped inside the wrapper."""
    return fastrnn.convert(DistributedDataParallel(make_model(nn), static_graph=True), strict=True)


def fsdp() -> nn.Module:
    """Each layer a unit of its own, and the cells with the root."""
    model, mesh = make_model(), init_device_mesh("cpu", (2,))
    for layer in (model.lstm, model.projected, model.gru, model.rnn):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": ddp, "ddp converted": ddp_converted, "fsdp": fsdp}


def worker(rank: int, folder: str, shared: nn.Module) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "meeting").as_uri(), rank=rank, world_size=2)
    torch.save({k: train(make(), slice(2 * rank, 2 * rank + 2)) for k, make in WRAPPERS.items()}, f"{folder}/{rank}.pt")
    with torch.no_grad():
        shared.weight_hh_l0[rank] = rank + 1.0
    time.sleep(0.2)  # see examples/ddp.py
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, list[float]]], nn.Module]]:
    """What each of them found, and a module that both wrote to."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    shared = fastrnn.GRU(3, 5).share_memory()
    mp.spawn(worker, (folder, shared), nprocs=2)
    yield [torch.load(f"{folder}/{rank}.pt") for rank in range(2)], shared


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(wrapper: str, two_processes: Any) -> None:
    """Mean losses of two halves of each batch against one process on all of it, four steps of Adam on."""
    halves = [torch.tensor(found[wrapper], dtype=torch.float64) for found in two_processes[0]]
    expected = torch.tensor(train(make_model(), slice(0, 4)), dtype=torch.float64)
    torch.testing.assert_close(sum(halves) / 2, expected, rtol=1e-10, atol=0)
    assert not torch.equal(*halves)
    assert expected.unique().numel() == len(expected)


def test_shared_module_sent_to_processes(two_processes: Any) -> None:
    """Writes to a shared module's parameters, made in other processes, are seen here."""
    shared = two_processes[1]
    assert shared.weight_hh_l0[0].eq(1).all()
    assert shared.weight_hh_l0[1].eq(2).all()
    before = shared(torch.ones(2, 1, 3))[0]
    with torch.no_grad():
        shared.weight_hh_l0[:2] = 0
    assert not torch.equal(shared(torch.ones(2, 1, 3))[0], before)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def example(tmp_path: Path) -> list[str]:
    """examples/ddp.py on words of which each is followed by one of two."""
    draw, word, words = random.Random(0), 0, []
    for _ in range(3000):
        words.append("abcdefghij"[word])
        word = (2 * word + draw.randrange(2)) % 10
    (tmp_path / "words.txt").write_text(" ".join(words))
    sizes = {"size": 16, "batch": 8, "seq-len": 12, "dropout": 0, "lr": 3}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["examples/ddp.py", "--text", str(tmp_path / "words.txt"), *options]


def losses(*command: str) -> list[float]:
    env = environment()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"loss ([\d.]+)", done.stdout)
    assert len(found) == 7 and "Warning: FSDP2" not in done.stderr, done.stdout + done.stderr
    return [float(loss) for loss in found]


def test_torchrun_example(example: list[str]) -> None:
    """The command of README.md: two processes print the losses of one, steps 1 to 5, 20 and 40, states carried.

    They add up the same float32 gradients in another order, of which 40 steps make no more than some units of the sixth
    digit.
    """
    example += ["--steps", "40"]
    alone = losses(*example)
    assert len(set(alone)) == 7
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *example]
    for strategy in ("ddp", "fsdp2"):
        assert losses(*run, "--strategy", strategy) == pytest.approx(alone, abs=1e-5)


def test_interrupted_example(example: list[str]) -> None:
    """Ctrl-C ends it with one line and the shell's status for it."""
    command = [sys.executable, *example, "--steps", "1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors == "ddp: interrupted\n"


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
@KIND
def test_data_parallel(kind: str) -> None:
    ours, _ = pair(kind, 4, 6, 2, bidirectional=True)
    ours = ours.cuda()
    x = randn(5, 6, 4, dtype=torch.float32).cuda()
    output = nn.DataParallel(ours, dim=1)(x)[0]
    torch.testing.assert_close(output, ours(x)[0])


# ---- forked processes ----


class Encoded(Dataset[Tensor]):
    """Items that a module makes in the worker, with a backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = randn(9, 40, 4, seed=index, dtype=torch.float32).requires_grad_()
        output = self.module(x)[0]
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        return torch.cat([output.detach().flatten(), grad.flatten()])


@KIND
def test_data_loader_workers(kind: str) -> None:
    """Forked from a process whose kernels ran on two threads: no hang, and the same results."""
    module = build(fastrnn, kind, 4, 64)
    torch.set_num_threads(2)
    dataset = Encoded(module)
    expected = torch.stack([dataset[i] for i in range(6)])
    loader = DataLoader(dataset, batch_size=2, num_workers=2, timeout=60, multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(loader)), expected)
    torch.testing.assert_close(dataset[0], expected[0])  # this process's own threads still work


def hogwild(module: nn.Module) -> None:
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for step in range(5):
        optimizer.zero_grad()
        module(randn(5, 3, 4, seed=step, dtype=torch.float32))[0].square().mean().backward()
        optimizer.step()


def test_hogwild() -> None:
    """Forked processes train one module in shared memory."""
    module = fastrnn.LSTM(4, 6).share_memory()
    x = randn(5, 3, 4, dtype=torch.float32)
    before = module(x)[0].square().mean().item()
    processes = [mp.get_context("fork").Process(target=hogwild, args=(module,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert module(x)[0].square().mean().item() < before


# ---- parameters that are exchanged, computed, masked ----


def run(module: nn.Module) -> dict[str, Tensor]:
    dtype = next(module.parameters()).dtype
    if isinstance(module, nn.RNNBase):
        return evaluate(module, randn(5, 3, 4, dtype=dtype))
    return evaluate_cell(module, randn(3, 4, dtype=dtype))


@pytest.fixture
def swapped_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@ANY_KIND
def test_swap_tensors(kind: str, swapped_parameters: None) -> None:
    """Conversions and load_state_dict that exchange what is inside of Parameters, which stay the same objects.

    torch.nn's layers hold weak references to their parameters, which load_state_dict refuses here. Ours hold none, nor
    do copies and converted modules.
    """
    ours, theirs = pair(kind, 4, 6)
    other = build(fastrnn, kind, 4, 6, dtype=torch.float64)
    for module in (ours, copy.deepcopy(ours), fastrnn.convert(copy.deepcopy(theirs))):
        ids = [id(p) for p in module.parameters()]
        run(module)
        module.zero_grad()
        module.double()
        assert_equal(run(module), run(copy.deepcopy(theirs).double()))
        module.load_state_dict(other.state_dict())
        assert_equal(run(module), run(other), tolerance=0.0)
        module.to("meta").to_empty(device="cpu").load_state_dict(theirs.state_dict())
        assert_equal(run(module), run(copy.deepcopy(theirs).double()))
        assert [id(p) for p in module.parameters()] == ids


@KIND
def test_copies_after_a_parameter_was_exchanged_unseen(kind: str) -> None:
    """As wrappers do that write to a module's dictionary of parameters: copies carry no parameter twice."""
    module = build(fastrnn, kind, 4, 6)
    module._parameters["weight_hh_l0"] = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    twin = copy.deepcopy(module)
    assert_equal(run(twin), run(module), tolerance=0.0)
    assert twin._flat_weights[1] is twin.weight_hh_l0


@ANY_KIND
@pytest.mark.parametrize("how", ["orthogonal", "spectral_norm", "weight_norm"])
def test_training_with_parametrizations(kind: str, how: str) -> None:
    """Three steps of SGD as torch.nn's modules make them; the constraint holds after them.

    Cached, as spectral_norm takes a step of its power iteration each time that a weight is read, and torch.nn's layers
    read more often in a call than ours.
    """
    name = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    results = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        torch.manual_seed(0)
        getattr(parametrizations, how)(module, name)
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        for _ in range(3):
            with parametrize.cached():
                run(module)  # gradients
            optimizer.step()
        if how == "orthogonal":
            weight = getattr(module, name)
            torch.testing.assert_close(weight.t() @ weight, torch.eye(6, dtype=torch.float64))
        results.append(run(module.eval()))
    assert_equal(*results)


@ANY_KIND
def test_pruning_by_kinds_and_removed(kind: str) -> None:
    suffix = "" if "Cell" in kind else "_l0"
    results = []
    for module in pair(kind, 4, 6, dtype=torch.float64):
        prune.global_unstructured(
            [(module, f"weight_ih{suffix}"), (module, f"bias_hh{suffix}")], prune.L1Unstructured, amount=0.4
        )
        prune.ln_structured(module, f"weight_hh{suffix}", amount=2, n=2, dim=1)
        found = {f"pruned {k}": v for k, v in run(module).items()}
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        optimizer.step()
        found.update({f"trained {k}": v for k, v in run(module).items()})
        for name in ("weight_ih", "bias_hh", "weight_hh"):
            prune.remove(module, f"{name}{suffix}")
        assert getattr(module, f"weight_hh{suffix}").eq(0).all(0).sum() == 2
        found.update(sorted(run(module).items()))
        results.append(found)
    assert_equal(*results)


@ANY_KIND
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=["adam", "sgd"])
def test_optimizers(kind: str, optimizer: Any, options: dict[str, bool]) -> None:
    """Parameters of all steps as the plain loop over parameters makes them."""
    results = []
    for each in ({"foreach": False}, options):
        torch.manual_seed(0)
        module = build(fastrnn, kind, 4, 6, dtype=torch.float64)
        steps = optimizer(module.parameters(), 0.05, **each)
        for _ in range(3):
            found = run(module)
            steps.step()
        results.append({**found, **{f"after {n}": p.detach() for n, p in module.named_parameters()}})
    assert_equal(results[1], results[0])


def test_clipped_gradients_and_averaged_weights() -> None:
    """clip_grad_norm_ with foreach, and torch.optim.swa_utils.AveragedModel, which copies a module."""
    results = []
    for module in pair("LSTM", 4, 6, 2, dtype=torch.float64):
        averaged = torch.optim.swa_utils.AveragedModel(module)
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for _ in range(3):
            run(module)
            nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=True)
            optimizer.step()
            averaged.update_parameters(module)
        results.append(run(copy.deepcopy(averaged.module)))
    assert_equal(*results)
    assert weighted([results[0]["output"]]).isfinite()
