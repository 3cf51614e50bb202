"""The modules in what training loops wrap around them: autocast, checkpoints, saved-tensor hooks, copies, DDP, FSDP."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastrnn
from tests.helpers import CELL_KINDS, KINDS, build
from tests.transform_cases import (
    assert_close,
    calls_of,
    count_calls,
    every_module,
    final_states,
    layer_forward,
    loss_of,
    make_module,
    modules_by_reference,
)


def _gradients(module: torch.nn.Module, x: Tensor, **keywords: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(module)(x, **keywords), (x, *module.parameters()))


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of enough rows for modules to take their own matrix products where they are able to."""
    return torch.randn(11, 3, 8, dtype=dtype, requires_grad=True)


@every_module
def test_gradients_and_calls(kind: str):
    """[r01] One fused forward and backward a layer, for both directions, with and without lengths and resets."""
    module, x = make_module(kind, dtype=torch.float64), _input(torch.float64)
    masks = {"lengths": torch.tensor([11, 0, 6]), "resets": torch.rand(11, 3) < 0.4}
    for keywords in ({}, masks):
        with count_calls() as calls:
            actual = _gradients(module, x, **keywords)
        assert calls == {"forward": calls_of(module), "backward": calls_of(module)}
        with modules_by_reference():
            assert_close(actual, _gradients(module, x, **keywords))


@every_module
@pytest.mark.parametrize("masked", [False, True])
def test_vectorized_hessian(kind: str, masked: bool):
    """torch.autograd.functional batches by the older vmap, which has rules for few of ATen's ops."""
    module = make_module(kind, dtype=torch.float64)
    masks = {"lengths": torch.tensor([3, 1]), "resets": torch.rand(3, 2) < 0.4} if masked else {}
    x = torch.randn(3, 2, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return loss_of(module)(x, **masks)

    by_rows = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x, vectorize=True), by_rows)


@every_module
def test_double_backward(kind: str):
    """[r02] Through a whole module."""
    module, x = make_module(kind, dtype=torch.float64), _input(torch.float64)
    inputs = (x, *module.parameters())

    def run() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss_of(module)(x), inputs, create_graph=True)
        return torch.autograd.grad(loss_of(lambda: first)(), inputs)

    actual = run()
    with modules_by_reference():
        assert_close(actual, run())


@every_module
def test_batched_gradients(kind: str):
    """[r03b] Legacy vmap over gradients, as in torch.autograd.functional.jacobian(vectorize=True)."""
    module, x = make_module(kind, dtype=torch.float64), _input(torch.float64)
    inputs = (x, *module.parameters())
    output, _ = module(x)
    grads = torch.stack([output.detach().cos(), output.detach().sin()])
    actual = torch.autograd.grad(output, inputs, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in grads]
    assert_close(actual, tuple(map(torch.stack, zip(*expected, strict=True))))


# ---- autocast ----


@every_module
def test_autocast(kind: str):
    """[r08] A bfloat16 recurrence, and float32 gradients that are close to those without autocast."""
    module, x = make_module(kind), _input()
    with torch.autocast("cpu", torch.bfloat16):
        output, state = module(x)
    assert {y.dtype for y in (output, *final_states(state))} == {torch.bfloat16}
    grads = torch.autograd.grad(loss_of(lambda: (output, state))(), (x, *module.parameters()))
    assert {g.dtype for g in grads} == {torch.float32}
    assert_close(output.float(), module(x)[0], 0.03)
    for actual, expected in zip(grads, _gradients(module, x), strict=True):
        assert (actual - expected).norm() < 0.03 * expected.norm()


def test_autocast_leaves_float64_alone():
    module = make_module("lstm", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(_input(torch.float64))[0].dtype == torch.float64


def test_autocast_of_per_sample_gradients():
    """Autocast inside torch.func: one fused forward and backward there too."""
    module = make_module("gru")
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = functional_call(module, parameters, (x.unsqueeze(1),))[0]
        assert output.dtype == torch.bfloat16
        return output.float().sin().sum()

    x = _input().detach()
    with count_calls() as calls:
        actual = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    assert calls == {"forward": 1, "backward": 1}
    each = [grad(loss)(parameters, x[:, i]) for i in range(3)]
    assert_close(actual, {name: torch.stack([g[name] for g in each]) for name in parameters}, 0.03)


# ---- saved tensors and checkpoints ----


@every_module
def test_saved_tensor_hooks(kind: str):
    """[r09c] Hooks see what is kept; save_on_cpu keeps copies of it."""
    module, x = make_module(kind), _input()
    expected = _gradients(module, x)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t):
        loss = loss_of(module)(x)
    assert len(kept) > 4
    assert_close(torch.autograd.grad(loss, (x, *module.parameters())), expected)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(module)(x)
    assert_close(torch.autograd.grad(loss, (x, *module.parameters())), expected)


def _nodes(results: Iterable[Tensor]) -> list[Any]:
    """Every node of their graph."""
    found, waiting = {}, [x.grad_fn for x in results]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += (following for following, _ in node.next_functions)
    return list(found)


@pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])
def test_what_walks_the_graph_meets_tensors_alone(kind: str):
    """torchviz asks everything that a node of Python's has saved for its size."""
    x, lengths, resets = _input(), torch.tensor([11, 5, 2]), torch.rand(11, 3) < 0.4
    if kind in CELL_KINDS:
        calls = [functools.partial(build(fastrnn, kind, 8, 6), x[0])]
    else:
        every: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, {"bias": False}]
        every += [{"recompute": 4}, {"learn_initial_state": True}]
        lstm = ({"proj_size": 2}, {"return_all_states": True}) if kind == "LSTM" else ()
        modules = [build(fastrnn, kind, 8, 6, **options) for options in (*every, *lstm)]
        given = ((x, {}), (x.detach(), {}), (x, {"lengths": lengths}), (x, {"resets": resets}),
                 (pack_padded_sequence(x, lengths), {}))  # fmt: skip
        calls = [functools.partial(m, input, **options) for m in modules for input, options in given]
        calls.append(functools.partial(build(fastrnn, kind, 8, 6).bfloat16(), x.bfloat16()))
    for call in calls:
        results = [y for y in pytree.tree_leaves(call()) if isinstance(y, Tensor) and y.requires_grad]
        nodes = _nodes(results)
        saved = [y for node in nodes for y in getattr(node, "saved_tensors", ())]
        # Nodes of C++ show nothing of what they have saved.
        assert saved or any("CppFunction" in type(node).__name__ for node in nodes)
        assert all(isinstance(y, Tensor) for y in saved)


@every_module
def test_multi_grad_hook(kind: str):
    module, x = make_module(kind), _input()
    seen: list[Sequence[Tensor | None]] = []
    torch.autograd.graph.register_multi_grad_hook((x, *module.parameters()), seen.append)
    loss_of(module)(x).backward()
    ((of_x, *of_parameters),) = seen
    assert_close((of_x, *of_parameters), (x.grad, *(p.grad for p in module.parameters())))


@every_module
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kind: str, reentrant: bool):
    """[r09c] Both kinds of activation checkpoint: the forward pass runs twice."""
    module, x = make_module(kind), _input()
    expected = _gradients(module, x)

    def flat(x: Tensor) -> tuple[Tensor, ...]:  # the reentrant kind overlooks tensors in nested results
        output, state = module(x)
        return output, *final_states(state)

    with count_calls() as calls:
        loss = loss_of(checkpoint)(flat, x, use_reentrant=reentrant)
        loss.backward()
    assert calls == {"forward": 2 * calls_of(module), "backward": calls_of(module)}
    assert_close((x.grad, *(p.grad for p in module.parameters())), expected)


@every_module
def test_selective_checkpoint(kind: str):
    """[r09c] A policy that keeps the op's results: everything but the op is computed again."""
    module, x = make_module(kind), _input()

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        keep = op is layer_forward
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with count_calls() as calls:
        loss = loss_of(checkpoint)(module, x, use_reentrant=False, context_fn=contexts)
        actual = torch.autograd.grad(loss, (x, *module.parameters()))
    assert calls == {"forward": calls_of(module), "backward": calls_of(module)}
    assert_close(actual, _gradients(module, x))


# ---- lifetimes, copies, in-place writes ----


def test_graph_is_freed():
    """[r09d] No cycle keeps a module's graph alive."""
    saved: list[Any] = []

    class Packed:
        def __init__(self, x: Tensor) -> None:
            self.x = x.detach()  # a result itself would keep its node
            saved.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.x):
        output, _ = make_module("lstm")(_input())
    assert saved and all(held() is not None for held in saved)
    del output, _
    assert all(held() is None for held in saved)


@pytest.mark.parametrize("kind", ["lstm-projected", "rnn_tanh", "rnn_relu"])
def test_in_place_change_of_weights_is_detected(kind: str):
    """[r09d] A parameter that changes between forward and backward."""
    module, x = make_module(kind), _input()
    loss = loss_of(module)(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_module
def test_deep_copy(kind: str):
    """[r09e] A copy gives the same results and gradients and shares nothing."""
    module, x = make_module(kind), _input()
    module(x)[0].sum().backward()
    twin = copy.deepcopy(module)
    assert_close(_gradients(twin, x), _gradients(module, x), 0)
    expected = module(x)[0].detach()
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x)[0].any()
    assert_close(module(x)[0], expected, 0)


@every_module
def test_modes_without_grad(kind: str):
    """[r09e] no_grad and inference_mode save nothing and give the same."""
    module, x = make_module(kind), _input()
    expected = module(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, count_calls() as calls:
            actual = module(x)
        assert calls == {"forward": calls_of(module)}
        assert not actual[0].requires_grad
        assert_close(actual, expected, 1e-6)


@every_module
def test_final_state_may_be_overwritten(kind: str):
    """[r09f] The state a training loop carries on, changed in place before backward."""
    module, x = make_module(kind), _input()

    def run(in_place: bool) -> tuple[Tensor, ...]:
        output, state = module(x)
        states = [s.mul_(2).add_(1) if in_place else s * 2 + 1 for s in final_states(state)]
        return torch.autograd.grad(loss_of(lambda: (output, *states))(), (x, *module.parameters()))

    assert_close(run(True), run(False), 1e-6)


# ---- data parallel ----


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process alone."""
    meeting = Path(tmp_path_factory.mktemp("gloo")) / "file"
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_module
def test_distributed_data_parallel(kind: str, process_group: None):
    """[r11] DDP: same gradients, twice over."""
    module, x = make_module(kind), _input()
    expected = _gradients(module, x)[1:]
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        module.zero_grad()
        loss_of(parallel)(x).backward()
        assert_close(tuple(p.grad for p in module.parameters()), expected)


@every_module
def test_fully_sharded(kind: str, process_group: None):
    """[r11] FSDP2, with parameters sharded and gathered around forward and backward."""
    module, x = make_module(kind), _input()
    expected = _gradients(module, x)[1:]
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        module.zero_grad()
        loss_of(module)(x).backward()
        assert_close(tuple(p.grad.full_tensor() for p in module.parameters()), expected)
