"""Modules called by many threads at once, with weights that change meanwhile; after a fork, in spawned processes, in
sub-interpreters; Ctrl-C during a call.

What is promised stands in docs/recipes.md, "Threads and processes". See kernels/test_module_call.py for calls of a few
microseconds and for memory that is exchanged, test_parallel.py for DDP, FSDP2, DataLoader and hogwild.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from tests.helpers import build, randn, tensors

ROOT = Path(__file__).resolve().parents[2]
THREADS = 16
Job = Callable[[], list[Tensor]]


def numbers(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*sizes, seed=sum(sizes), dtype=dtype)


# ---- sixteen threads ----


def inference(module: nn.Module, *args: Any, **options: Any) -> Job:
    def job() -> list[Tensor]:
        with torch.no_grad():
            output, state = module(*args, **options)
        return [output, *tensors(state)]

    return job


def training(module: nn.Module, x: Tensor, **options: Any) -> Job:
    """Three steps from the same start each time; losses, and the weights after them."""

    def job() -> list[Tensor]:
        own = copy.deepcopy(module)
        optimizer, losses = torch.optim.SGD(own.parameters(), 0.1), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = own(x, **options)[0].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in own.parameters())]

    return job


def stepping(module: Any, x: Tensor) -> Job:
    def job() -> list[Tensor]:
        state, outputs = None, []
        with torch.no_grad():
            for row in x:
                output, state = module.step(row, state)
                outputs.append(output)
        return [*outputs, *tensors(state)]

    return job


def cell(module: nn.Module, x: Tensor) -> Job:
    def job() -> list[Tensor]:
        with torch.no_grad():
            return list(tensors(module(x)))

    return job


def jobs() -> list[Job]:
    """Every class, dtypes, options and sizes, some of which run on threads of their own where torch has several."""
    torch.manual_seed(0)
    lengths, resets = torch.tensor([30, 1, 17, 30]), torch.arange(120).view(30, 4) % 11 == 0
    shared = fastrnn.LSTM(8, 96, 2)  # which several threads call
    return [
        inference(shared, numbers(30, 4, 8)),
        inference(shared, numbers(1, 1, 8)),
        stepping(shared, numbers(6, 2, 8)),
        training(shared, numbers(30, 4, 8)),
        inference(fastrnn.GRU(8, 33, bidirectional=True), numbers(30, 4, 8), lengths=lengths),
        training(fastrnn.GRU(8, 64, 2, bidirectional=True), numbers(30, 4, 8), lengths=lengths),
        inference(fastrnn.RNN(5, 17, dtype=torch.float64), numbers(9, 3, 5, dtype=torch.float64)),
        training(fastrnn.RNN(5, 17, dtype=torch.float64), numbers(9, 3, 5, dtype=torch.float64)),
        inference(fastrnn.LSTM(6, 24, dtype=torch.bfloat16), numbers(12, 3, 6, dtype=torch.bfloat16)),
        training(fastrnn.LSTM(6, 24, proj_size=7, recompute=4), numbers(12, 3, 6)),
        training(fastrnn.SLSTM(6, 16, num_heads=2), numbers(12, 3, 6)),
        training(fastrnn.LSTM(8, 32, peephole=True), numbers(30, 4, 8), resets=resets),
        inference(fastrnn.quantize(fastrnn.GRU(8, 64)), numbers(30, 4, 8)),
        inference(fastrnn.MGU(8, 20), numbers(30, 4, 8)),
        stepping(fastrnn.GRU(8, 64, 2, layer_norm=True), numbers(6, 2, 8)),
        cell(fastrnn.LSTMCell(8, 32), numbers(4, 8)),
    ]


@contextmanager
def running(*loops: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Each loop again and again on a thread of its own until the block ends. Gives what ended them before."""
    stop, raised = threading.Event(), []

    def run(loop: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                loop()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield raised
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for(raised: list[BaseException], *results: list[Any]) -> None:
    """For a handful of results, however slow the machine is, or for what ended them; and for a little at least."""
    time.sleep(0.15)
    end = time.monotonic() + 60
    while sum(map(len, results)) < 6 and not raised and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_sixteen_threads(count: int) -> None:
    """Each goes through all jobs, from one of its own on: the bits that one thread alone has."""
    torch.set_num_threads(count)
    work = jobs()
    expected = [job() for job in work]
    wrong, raised = [], []

    def go(start: int) -> None:
        try:
            torch.set_num_threads(count)  # each thread has a number of its own
            for i in range(len(work)):
                at = (start + i) % len(work)
                if not all(map(torch.equal, work[at](), expected[at])):
                    wrong.append(at)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=go, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised and not wrong


# ---- weights that change meanwhile ----

X = numbers(40, 4, 16)
ROADS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[Tensor]]]] = {
    "plain": (lambda: fastrnn.LSTM(16, 64, 2), lambda m: inference(m, X)()),
    "training": (lambda: fastrnn.LSTM(16, 64, 2), lambda m: gradients(m)),
    "lengths": (lambda: fastrnn.GRU(16, 64), lambda m: inference(m, X, lengths=torch.tensor([40, 3, 7, 40]))()),
    "two directions": (lambda: fastrnn.GRU(16, 64, bidirectional=True), lambda m: inference(m, X)()),
    "training, two directions": (lambda: fastrnn.LSTM(16, 48, bidirectional=True), lambda m: gradients(m)),
    "half": (lambda: fastrnn.LSTM(16, 64, dtype=torch.bfloat16), lambda m: inference(m, X.bfloat16())()),
    "quantized": (lambda: fastrnn.quantize(fastrnn.LSTM(16, 64)), lambda m: inference(m, X)()),
    "cell": (lambda: fastrnn.GRUCell(16, 64), lambda m: cell(m, X[0])()),
}
ROAD = pytest.mark.parametrize("road", ROADS)


def gradients(module: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    output = module(x)[0]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), x)]


def two_sets(road: str) -> tuple[nn.Module, nn.Module, Callable[[nn.Module], list[Tensor]]]:
    torch.manual_seed(0)
    make, call = ROADS[road]
    return make(), make(), call


def is_one_of(found: list[Tensor], *wanted: list[Tensor]) -> bool:
    return any(all(map(torch.equal, found, each)) for each in wanted)


@ROAD
def test_one_parameter_is_exchanged(road: str) -> None:
    """weight_hh is set to another Parameter while three threads call: each result is of the one or of the other."""
    module, _, call = two_sets(road)
    name = next(n for n, _ in [*module.named_parameters(), *module.named_buffers()] if n.startswith("weight_hh"))
    kept = getattr(module, name)
    is_parameter = isinstance(kept, nn.Parameter)

    def other() -> Tensor:  # a new object each time, and the last one may go while a call reads it
        return nn.Parameter(-kept.detach()) if is_parameter else -kept

    wanted = [call(module)]
    setattr(module, name, other())
    wanted.append(call(module))
    results: list[list[Tensor]] = []

    def exchange() -> None:
        setattr(module, name, kept)
        time.sleep(0)
        setattr(module, name, other())

    with running(exchange, *[lambda: results.append(call(module))] * 3) as raised:
        wait_for(raised, results)
    assert not raised and len(results) > 3
    assert all(is_one_of(found, *wanted) for found in results)


@ROAD
def test_the_whole_module_is_exchanged(road: str) -> None:
    """All weights at once: callers look the module up once a call."""
    first, second, call = two_sets(road)
    wanted = [call(first), call(second)]
    holder, results = nn.ModuleDict({"rnn": first}), []

    def exchange() -> None:
        for source in (second, first):
            holder["rnn"] = copy.deepcopy(source)
            time.sleep(0)

    with running(exchange, *[lambda: results.append(call(holder["rnn"]))] * 3) as raised:
        wait_for(raised, results)
    assert not raised and len(results) > 3
    assert all(is_one_of(found, *wanted) for found in results)


@pytest.mark.parametrize(("kind", "count"), [("LSTM", 1), ("GRU", 2)])
def test_sixteen_threads_while_the_module_is_exchanged(kind: str, count: int) -> None:
    """Calls of six sizes in flight at once, with backward passes among them, and of modules that are just being thrown
    away: whatever is kept, for another call or for a backward pass, is kept for each module and size by itself."""
    torch.set_num_threads(count)
    first, second = (getattr(fastrnn, kind)(16, 64, 2, bidirectional=True) for _ in range(2))
    sizes = ((1, 1), (1, 9), (7, 1), (12, 3), (40, 4), (6, 33))  # steps and rows
    work = [(numbers(*size, 16), train) for size in sizes for train in (False, True)]
    holder, results = nn.ModuleDict({"rnn": first}), []

    def call(module: nn.Module, at: int) -> list[Tensor]:
        x, train = work[at]
        if not train:
            return inference(module, x)()
        output, _ = module(x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), list(module.parameters()))]

    def go(start: int) -> None:
        torch.set_num_threads(count)  # each thread has a number of its own
        for i in range(len(work)):
            at = (start + i) % len(work)
            results.append((at, call(holder["rnn"], at)))

    def exchange() -> None:
        for source in (second, first):
            holder["rnn"] = copy.deepcopy(source)
            time.sleep(0)

    wanted = [[call(module, at) for module in (first, second)] for at in range(len(work))]
    with running(exchange, *(functools.partial(go, k) for k in range(THREADS))) as raised:
        wait_for(raised, results)
    assert not raised and {at for at, _ in results} == set(range(len(work)))
    assert all(is_one_of(found, *wanted[at]) for at, found in results)


@ROAD
@pytest.mark.parametrize("how", ["optimizer", "load_state_dict", "assign"])
def test_weights_change_in_place(road: str, how: str) -> None:
    """A call in flight may read some of either: its numbers stay finite, and the next one has what was written last.

    In training the backward pass tells of weights that were written to since, as torch.nn's does.
    """
    first, second, call = two_sets(road)
    if how == "optimizer" and road == "quantized":
        pytest.skip("it has no parameters")
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (first, second)]

    def write() -> None:
        if how == "optimizer":
            for p in first.parameters():
                p.grad = torch.full_like(p, 0.01)
            for maximize in (False, True):
                torch.optim.SGD(first.parameters(), 1.0, maximize=maximize).step()
        else:
            for state in reversed(states):
                given = {k: v.clone() for k, v in state.items()}
                first.load_state_dict(given, assign=how == "assign")
        time.sleep(0)

    reads: list[bool] = []
    told: list[str] = []

    def read() -> None:
        try:
            reads.append(all(bool(x.isfinite().all()) and x.abs().max() < 1e4 for x in call(first)))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            told.append(str(error))

    with running(write, read, read, read) as raised:
        wait_for(raised, reads, told)
    assert not raised and all(reads)
    assert not told or ("training" in road and how != "assign")
    second.load_state_dict(first.state_dict())
    assert is_one_of(call(first), call(second))


def other_calls() -> list[Job]:
    """Those that go from Python by another way than plain ones."""
    torch.manual_seed(2)
    lstm, gru, noisy = fastrnn.LSTM(8, 24, 2, bidirectional=True), fastrnn.GRU(8, 24), fastrnn.GRU(8, 24, recompute=4)
    x, lengths = numbers(12, 3, 8), torch.tensor([12, 5, 9])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    nested = torch.nested.nested_tensor([x[:n, b] for b, n in enumerate(lengths)], layout=torch.jagged)

    def of_rows(module: nn.Module, rows: Any) -> Job:
        def job() -> list[Tensor]:
            output = module(rows)[0]
            values = output.data if isinstance(output, PackedSequence) else output.values()
            return [values.detach(), *torch.autograd.grad(values.square().sum(), list(module.parameters()))]

        return job

    return [
        of_rows(lstm, packed),
        of_rows(gru, packed),
        of_rows(lstm, nested),
        of_rows(gru, nested),
        inference(lstm, x, lengths=lengths),
        training(gru, x, lengths=lengths),
        training(noisy, x),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_forward_derivatives_of_another_thread() -> None:
    """torch has one level of them for all threads: a call of this one's keeps its road, and its bits."""
    work, module, x = other_calls(), fastrnn.GRU(8, 24, recompute=4), numbers(12, 3, 8)
    expected = [job() for job in work]

    def batched() -> Any:
        return torch.autograd.functional.jacobian(lambda x: module(x)[0][-1], x, vectorize=True)

    jacobian = batched()
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with torch.autograd.forward_ad.dual_level():
            entered.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait()
    try:
        assert [all(map(torch.equal, job(), want)) for job, want in zip(work, expected, strict=True)] == [True] * len(
            work
        )
        torch.testing.assert_close(batched(), jacobian)
    finally:
        done.set()
        holder.join()

    linear, x = nn.Linear(4, 6), torch.randn(5, 4)
    seen: list[bool] = []

    def call() -> None:
        for job, want in zip(work[:4], expected[:4], strict=True):
            seen.append(all(map(torch.equal, job(), want)))

    with running(lambda: torch.func.jvp(linear, (x,), (x,)), call, call) as raised:
        wait_for(raised, seen)
    assert not raised and all(seen)


# ---- processes ----


def every_class() -> list[nn.Module]:
    torch.manual_seed(1)
    kinds = ("LSTM", "GRU", "RNN", "SLSTM", "LiGRU", "MGU")
    return [
        *(build(fastrnn, kind, 4, 16, 2) for kind in kinds),
        *(build(fastrnn, kind, 4, 16) for kind in ("LSTMCell", "GRUCell", "RNNCell")),
        fastrnn.quantize(fastrnn.LSTM(4, 16)),
        fastrnn.quantize(fastrnn.GRU(4, 16), torch.bfloat16),
        fastrnn.LSTM(4, 16, bidirectional=True, layer_norm=True, learn_initial_state=True),
    ]


def all_of(module: Any) -> list[Tensor]:
    """Results, steps and gradients."""
    x = numbers(7, 3, 4)
    if not isinstance(module, nn.RNNBase):
        state = module(x[0])
        return [y.detach() for y in (*tensors(state), *torch.autograd.grad(tensors(state)[0].sum(), module.weight_hh))]
    found = [y.detach() for y in inference(module, x)()]
    if not module.bidirectional:
        found += stepping(module, x)()
    if weights := list(module.parameters()):
        found += torch.autograd.grad(module(x)[0].square().sum(), weights)
    return found


def assert_same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert is_one_of(a, b)


def forked(modules: list[nn.Module], results: Any) -> None:
    torch.set_num_threads(1)
    results.put([[x.numpy() for x in all_of(module)] for module in modules])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_threads_call() -> None:
    """The parent's kernels run on two threads each in the midst of calls and backward passes; a child on one."""
    modules = every_class()
    expected = [all_of(module) for module in modules]
    torch.set_num_threads(2)
    large = [inference(fastrnn.LSTM(16, 96), X), training(fastrnn.GRU(16, 96), X)]
    context = mp.get_context("fork")
    with running(*large, *large) as raised:
        for _ in range(3):
            results = context.SimpleQueue()
            child = context.Process(target=forked, args=(modules, results))
            child.start()
            found = results.get() if results._reader.poll(30) else pytest.fail("the child hangs")
            child.join(30)
            assert child.exitcode == 0
            assert_same([[torch.from_numpy(x) for x in each] for each in found], expected)
    assert not raised


def spawned(given: Any, results: Any) -> None:
    """Calls what it is sent, and writes to the weights, which are shared."""
    torch.set_num_threads(1)
    modules = given.get()
    results.put([[x.numpy() for x in all_of(module)] for module in modules])
    with torch.no_grad():
        for x in modules[0].parameters():
            x.zero_()
    results.put("written")
    given.get()  # the parent has looked


def test_modules_sent_to_a_spawned_process() -> None:
    """Through a queue, which puts their weights into shared memory: the same results there, and one set of weights."""
    modules = every_class()
    expected = [all_of(module) for module in modules]
    context = mp.get_context("spawn")
    given, results = context.SimpleQueue(), context.SimpleQueue()
    child = context.Process(target=spawned, args=(given, results))
    child.start()
    given.put(modules)
    assert results._reader.poll(60), "the child hangs"
    assert_same([[torch.from_numpy(x) for x in each] for each in results.get()], expected)
    assert results.get() == "written"
    assert all((x == 0).all() for x in modules[0].parameters())
    assert (modules[0](numbers(7, 3, 4))[0] == 0).all()
    given.put(None)
    child.join(60)
    assert child.exitcode == 0


# ---- interpreters ----


def run_script(script: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


INTERPRETERS = """
import sys
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    own = interpreters.create("isolated" if {isolated} else "legacy")
else:
    import _xxsubinterpreters as interpreters
    own = interpreters.create(isolated={isolated})
if {first}: import fastrnn
try:  # Python 3.13 returns what the others raise
    print(interpreters.run_string(own, f"import sys; sys.path[:] = {{sys.path!r}}; import fastrnn").formatted)
except interpreters.RunFailedError as error:
    print(error)
interpreters.destroy(own)
import fastrnn, torch
print(tuple(fastrnn.GRU(3, 4)(torch.ones(2, 1, 3))[0].shape))
"""


@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "with the GIL shared"])
@pytest.mark.parametrize("first", [True, False], ids=["imported before", "not yet imported"])
def test_sub_interpreters_are_refused(first: bool, isolated: bool) -> None:
    """Before torch is imported there, which fails half way and ends the process later, or waits without end. The main
    interpreter goes on. (An isolated one of Python 3.12 and newer has a GIL of its own.)"""
    refusal, shape = run_script(INTERPRETERS.format(first=first, isolated=isolated)).splitlines()
    assert "ImportError" in refusal and "expected the main interpreter, got a sub-interpreter" in refusal
    assert shape == "(2, 1, 4)"


def test_without_the_gil_it_is_refused() -> None:
    """As a free-threaded Python with PYTHON_GIL=0 would tell; where it may, that switches the GIL on by itself."""
    script = (
        "import sys\n"
        "sys._is_gil_enabled = lambda: False\n"
        "try: import fastrnn\n"
        "except ImportError as error: print(error)\n"
        "del sys._is_gil_enabled, sys.modules['fastrnn.interpreter']\n"
        "import fastrnn\n"
    )
    assert "expected Python's GIL, which is off" in run_script(script)
    assert "mod_gil_not_used" not in (ROOT / "csrc/torch/module.cpp").read_text()


# ---- Ctrl-C ----

INTERRUPTED = """
import os, signal, threading, time
import torch, fastrnn

torch.set_num_threads({count})
torch.manual_seed(0)
module, x = fastrnn.GRU(16, 64, bidirectional={bidirectional}), torch.randn(1000, 8, 16)


def infer():
    with torch.no_grad():
        return module(x)


def train():
    output, h_n = module(x)
    return output.detach(), *torch.autograd.grad(output.square().sum(), list(module.parameters()))


def alongside():
    torch.set_num_threads({count})
    while True:
        others.append(all(map(torch.equal, {call}(), expected)))


expected, others = {call}(), []
begin = time.perf_counter()
{call}()
took = time.perf_counter() - begin
for _ in range({threads}):
    threading.Thread(target=alongside, daemon=True).start()
for i in range(4):
    timer = threading.Timer(took * (0.2 + 0.2 * i), os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            {call}()
    except KeyboardInterrupt:
        print("interrupted")
    assert all(map(torch.equal, {call}(), expected))
before, deadline = len(others), time.monotonic() + 30
while len(others) < before + {threads} and time.monotonic() < deadline:
    time.sleep(0.01)
assert len(others) >= before + {threads} and all(others)
print("all right", flush=True)
os._exit(0)  # threads are in calls
"""


@pytest.mark.parametrize(
    ("call", "count", "threads", "bidirectional"),
    [("infer", 1, 0, False), ("train", 2, 0, True), ("infer", 2, 2, True), ("train", 1, 2, False)],
)
def test_interrupted_calls(call: str, count: int, threads: int, bidirectional: bool) -> None:
    """Ctrl-C in the midst of a call, forward or backward, on two threads or while others call: Python tells of it when
    the call has returned, and the next one has the bits that it would have had."""
    script = INTERRUPTED.format(call=call, count=count, threads=threads, bidirectional=bidirectional)
    assert run_script(script).splitlines() == ["interrupted"] * 4 + ["all right"]
