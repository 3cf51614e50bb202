"""fastrnn.convert, to_torch and patch: swapped models keep parameters, names, hooks and results."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.options import SWITCHES as OPTIONS
from tests.helpers import CELL_KINDS, KINDS, assert_equal, build, randn, weighted

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
ANY_KIND = pytest.mark.parametrize("kind", [*KINDS, *CELL_KINDS])


# ---- models as packages write them ----


class Tagger(nn.Module):
    """Tokens, packed, through a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(tokens), torch.tensor([4, 7, 2]), True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Seq2Seq(nn.Module):
    """A GRU's last state starts cells, step by step; nested containers; one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.encoder = nn.ModuleDict({"stack": nn.ModuleList([nn.GRU(6, 6), nn.GRU(6, 6)])})
        self.decoder = nn.Sequential(nn.Sequential(nn.GRUCell(6, 6)))
        self.same = self.decoder[0][0]
        self.head = nn.Linear(6, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.t())
        for layer in self.encoder["stack"]:
            x, h = layer(x)
        state, logits = h[0], []
        for step in x:
            state = self.same(step, state)
            logits.append(self.head(state))
        return torch.stack(logits)


class Policy(nn.Module):
    """LSTM and Elman cores for actor and critic, with states carried through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.actor, self.critic = nn.LSTM(4, 8, proj_size=3), nn.RNN(4, 3, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(3, 3), nn.RNNCell(3, 3)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.t())
        state: Any = None
        for chunk in x.chunk(2):
            y, state = self.actor(chunk, state)
        _, h = self.critic(x)
        return torch.cat([self.cells[0](y[-1])[0], self.cells[1](h[0]), *state[0]])


MODELS: dict[str, Callable[[], nn.Module]] = {"tagger": Tagger, "seq2seq": Seq2Seq, "policy": Policy}
MODEL = pytest.mark.parametrize("name", MODELS)
TOKENS = torch.arange(21).reshape(3, 7).remainder(20)


def results(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(TOKENS)
    weighted([output]).backward()
    return {"output": output.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.modules.rnn.RNNCellBase))]


@MODEL
def test_models(name: str) -> None:
    """Equal outputs and gradients; the same Parameters under the same names; and back."""
    model = MODELS[name]().double()
    expected, parameters, state = results(model), dict(model.named_parameters()), model.state_dict()
    assert fastrnn.unconverted(model) == {}
    assert fastrnn.convert(model, strict=True) is model
    assert {type(m).__module__.partition(".")[0] for m in recurrent(model)} == {"fastrnn"}
    assert_equal(results(model), expected)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    assert fastrnn.to_torch(model) is model
    assert {type(m).__module__ for m in recurrent(model)} == {"torch.nn.modules.rnn"}
    assert_equal(results(model), expected, tolerance=0.0)


@MODEL
def test_optimizer_made_before(name: str) -> None:
    """Steps before and after the swap, and after the swap back, are those of an unswapped model."""
    torch.manual_seed(1)
    expected = MODELS[name]().double()
    model = copy.deepcopy(expected)
    optimizers = [torch.optim.Adam(m.parameters(), 0.05) for m in (model, expected)]
    for change in (nn.Module.train, fastrnn.convert, fastrnn.convert, fastrnn.to_torch):
        change(model)
        for m, optimizer in zip((model, expected), optimizers, strict=True):
            for _ in range(2):
                results(m)
                optimizer.step()
    assert_equal(dict(model.named_parameters()), dict(expected.named_parameters()))


@ANY_KIND
def test_the_module_itself(kind: str) -> None:
    """The root is a recurrent module: its attributes become those that the constructor of ours makes."""
    module = build(nn, kind, 4, 6, bias=False, dtype=torch.float64).eval().requires_grad_(False)
    made = build(fastrnn, kind, 4, 6, bias=False, dtype=torch.float64)
    plain = dict(vars(module))
    assert fastrnn.convert(module) is module
    assert type(module) is type(made)
    assert set(vars(module)) == set(vars(made))
    assert repr(module) == repr(made)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert fastrnn.to_torch(module) is module
    assert type(module) is type(build(nn, kind, 4, 6))
    assert set(vars(module)) == set(plain)


def test_one_module_under_two_names_and_tied_weights() -> None:
    model = nn.ModuleDict({"a": nn.GRU(4, 4), "b": nn.GRU(4, 4), "c": nn.LSTM(4, 4)})
    model["again"] = model["a"]
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    model.outside = [model["c"]]  # a plain list that the model does not know as a module
    fastrnn.convert(model)
    assert model["again"] is model["a"]
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0
    assert model.outside[0] is model["c"]
    assert isinstance(model.outside[0], fastrnn.LSTM)
    assert len(list(model.parameters())) == 11
    twin = copy.deepcopy(model)
    assert twin["again"] is twin["a"]
    assert twin["b"].weight_hh_l0 is twin["a"].weight_hh_l0


@ANY_KIND
def test_hooks_stay(kind: str) -> None:
    seen: list[str] = []
    module = build(nn, kind, 4, 6)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    next(module.parameters()).register_hook(lambda g: seen.append("gradient"))
    module._register_state_dict_hook(lambda *_: seen.append("state"))
    fastrnn.convert(module)
    x = torch.randn((3, 4) if "Cell" in kind else (5, 3, 4), requires_grad=True)
    out = module(x)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    module.state_dict()
    assert sorted(seen) == sorted(["before", "after", "gradient", "backward", "state"])
    handle.remove()
    seen.clear()
    module(x.detach())
    assert "after" not in seen


@ANY_KIND
@pytest.mark.parametrize("used", [False, True])
def test_parametrized_modules(kind: str, used: bool) -> None:
    """Weight norm and spectral norm stay, before and after the module's first call; so do copies and removal."""
    name = "weight_hh" if "Cell" in kind else "weight_hh_l0"
    module = build(nn, kind, 4, 6, dtype=torch.float64).eval()
    parametrizations.weight_norm(module, name)
    parametrizations.spectral_norm(module, name.replace("hh", "ih"))
    x = randn(3, 4) if "Cell" in kind else randn(5, 3, 4)

    def run(m: nn.Module) -> dict[str, Tensor]:
        m.zero_grad()
        out = m(x)
        weighted([y for y in (out if isinstance(out, tuple) else (out,)) if isinstance(y, Tensor)]).backward()
        return {n: p.grad.clone() for n, p in m.named_parameters()}

    expected = run(copy.deepcopy(module))
    if used:
        run(module)
    names = list(module.state_dict())
    fastrnn.convert(module)
    assert isinstance(module, getattr(fastrnn, kind.partition("_")[0]))
    assert list(module.state_dict()) == names
    assert_equal(run(module), expected)
    assert_equal(run(copy.deepcopy(module)), expected)
    fastrnn.to_torch(module)
    assert_equal(run(module), expected, tolerance=0.0)
    fastrnn.convert(module)
    parametrize.remove_parametrizations(module, name)
    parametrize.remove_parametrizations(module, name.replace("hh", "ih"))
    assert type(module) is getattr(fastrnn, kind.partition("_")[0])


def test_norms_and_masks_of_hooks_stay() -> None:
    """The older weight_norm and pruning put a computed tensor in a parameter's place before each call."""
    models = [nn.GRU(4, 6, dtype=torch.float64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(models[0], "weight_hh_l0")
    prune.l1_unstructured(models[0], "weight_ih_l0", amount=0.5)
    state = models[0].state_dict()
    output = models[0](randn(5, 3, 4))[0]
    fastrnn.convert(models[0])
    assert list(models[0].state_dict()) == list(state)
    torch.testing.assert_close(models[0](randn(5, 3, 4))[0], output)


def test_copies_and_pickles_of_converted_models() -> None:
    model = fastrnn.convert(Policy())
    expected = results(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin.actor) is fastrnn.LSTM
        assert_equal(results(twin), expected, tolerance=0.0)


def test_half_converted_and_twice() -> None:
    model = nn.Sequential(nn.LSTM(4, 4), fastrnn.LSTM(4, 4), nn.Linear(4, 4), fastrnn.GRUCell(4, 4))
    fastrnn.convert(fastrnn.convert(model))
    assert [type(m) for m in model] == [fastrnn.LSTM, fastrnn.LSTM, nn.Linear, fastrnn.GRUCell]
    fastrnn.to_torch(fastrnn.to_torch(model))
    assert [type(m) for m in model] == [nn.LSTM, nn.LSTM, nn.Linear, nn.GRUCell]


def test_models_without_any() -> None:
    model = nn.Linear(3, 3)
    assert fastrnn.convert(model) is model
    assert fastrnn.to_torch(model) is model


def test_meta_device_and_deferred_weights() -> None:
    with torch.device("meta"):
        model = Tagger()
    fastrnn.convert(model)
    assert all(p.is_meta for p in model.parameters())
    real = Tagger()
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert_equal(results(model), results(real))


def test_random_numbers_are_not_used() -> None:
    model = nn.LSTM(4, 6)
    before = torch.get_rng_state()
    fastrnn.to_torch(fastrnn.convert(model))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_exchanged_parameters_are_seen_after_the_way_back(kind: str) -> None:
    """torch.nn's layers look by weak references for parameters that functional_call exchanged."""
    module, x = build(nn, kind, 4, 6), torch.randn(5, 3, 4)
    fastrnn.to_torch(fastrnn.convert(module))
    zeros = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    assert not torch.func.functional_call(module, zeros, (x,))[0].any()
    assert module(x)[0].any()


def test_module_compiled_before() -> None:
    """module.compile() was called: the next call compiles ours."""
    module, x = nn.GRU(4, 6), torch.randn(5, 3, 4)
    expected = module(x)[0]
    module.compile(backend="aot_eager")
    module(x)
    fastrnn.convert(module)
    torch.testing.assert_close(module(x)[0], expected)


# ---- what is left alone ----


class Derived(nn.LSTM):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)[0]


class Renamed(nn.GRU):
    pass


def awkward() -> nn.ModuleDict:
    model = nn.ModuleDict({"good": nn.LSTM(4, 4), "derived": Derived(4, 4), "renamed": Renamed(4, 4)})
    model["replaced"] = nn.RNN(4, 4)
    model["replaced"].forward = lambda x: x
    model["quantized"] = torch.ao.nn.quantizable.LSTM(4, 4)
    return model


def test_what_is_left_alone() -> None:
    model = awkward()
    types = {name: type(m) for name, m in model.items()}
    reasons = fastrnn.unconverted(model)
    here = __name__
    assert reasons["derived"] == f"is a {here}.Derived, derived from torch.nn.LSTM"
    assert reasons["renamed"] == f"is a {here}.Renamed, derived from torch.nn.GRU"
    assert reasons["replaced"] == "has a forward of its own, set on the instance"
    assert reasons["quantized"].startswith("is a torch.ao.nn.quantizable")
    assert "good" not in reasons
    with pytest.raises(TypeError, match=r"can all be converted, but derived is a .*; renamed is a"):
        fastrnn.convert(model, strict=True)
    assert {name: type(m) for name, m in model.items()} == types
    with pytest.warns(UserWarning, match="leaves alone: derived is a") as record:
        fastrnn.convert(model)
    assert record[0].filename == __file__
    assert {name: type(m) for name, m in model.items()} == {**types, "good": fastrnn.LSTM}


def test_scripted_and_dynamically_quantized_modules_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.LSTM(4, 4)))
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4)), {nn.LSTM})
    assert fastrnn.unconverted(scripted) == {"0": "is a torch.nn.LSTM scripted by torch.jit"}
    assert fastrnn.unconverted(quantized)["0"].startswith("is a torch.ao.nn.quantized.dynamic")


@pytest.mark.parametrize("function", [fastrnn.convert, fastrnn.to_torch])
def test_arguments_that_are_no_modules(function: Any) -> None:
    for bad, got in ((nn.LSTM, "the class LSTM"), (None, "NoneType"), ([nn.LSTM(4, 4)], "list")):
        with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {got}"):
            function(bad)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_torch_lacks(option: str) -> None:
    """Refused by name where one is on; nothing is swapped then."""
    cls, value = (fastrnn.GRU, False) if option == "reset_after" else (fastrnn.LSTM, True)
    model = nn.Sequential(fastrnn.GRU(4, 4), cls(4, 4, **{option: value}))
    with pytest.raises(TypeError, match=rf"that torch.nn has, but 1 has {option}={value}"):
        fastrnn.to_torch(model)
    assert [type(m) for m in model] == [fastrnn.GRU, cls]


def test_modules_that_torch_lacks() -> None:
    class Mine(fastrnn.GRU):
        pass

    bad = nn.ModuleDict({"good": fastrnn.LSTM(4, 4), "mine": Mine(4, 4)})
    with pytest.raises(TypeError, match=r"that torch.nn has, but mine is a .*Mine"):
        fastrnn.to_torch(bad)
    assert type(bad["good"]) is fastrnn.LSTM
    quantized = fastrnn.quantize(fastrnn.LSTM(4, 4))
    with pytest.raises(TypeError, match=r"the module itself is a fastrnn\.quantized.QuantizedLSTM"):
        fastrnn.to_torch(quantized)
    assert fastrnn.convert(quantized) is quantized


# ---- patch ----


def ours_everywhere() -> bool:
    places = (nn, nn.modules)
    found = {getattr(place, name) is getattr(fastrnn, name) for place in places for name in NAMES}
    (result,) = found  # all or none
    return result


def test_patch() -> None:
    originals = [getattr(nn, name) for name in NAMES]
    old = nn.LSTM(4, 4)
    with fastrnn.patch():
        assert ours_everywhere()
        assert torch._dynamo.config.allow_rnn
        model = Tagger()
        assert isinstance(model.rnn, nn.LSTM)
        pickle.loads(pickle.dumps(old))
        assert type(copy.deepcopy(old)) is originals[0]
        fastrnn.convert(old)
    assert [getattr(nn, name) for name in NAMES] == originals
    assert not torch._dynamo.config.allow_rnn
    assert type(model.rnn) is type(old) is fastrnn.LSTM
    results(model)


def test_patch_again_inside_and_exceptions() -> None:
    with fastrnn.patch():
        with pytest.raises(KeyError), fastrnn.patch():
            raise KeyError
        assert ours_everywhere()
        assert torch._dynamo.config.allow_rnn
    assert not ours_everywhere()
    with pytest.raises(KeyError), fastrnn.patch():
        raise KeyError
    assert not ours_everywhere()
    assert not torch._dynamo.config.allow_rnn


def test_patch_as_a_decorator() -> None:
    @fastrnn.patch()
    def make() -> nn.Module:
        return Seq2Seq()

    for _ in range(2):
        assert {type(m).__module__.partition(".")[0] for m in recurrent(make())} == {"fastrnn"}
        assert not ours_everywhere()


def test_patches_that_end_in_another_order() -> None:
    """Two threads: the names are torch's again when the last of them is through."""
    inside, leave = threading.Event(), threading.Event()
    after: list[bool] = []

    def other() -> None:
        with fastrnn.patch():
            inside.set()
            leave.wait(60)
            after.append(ours_everywhere())

    thread = threading.Thread(target=other)
    with fastrnn.patch():
        thread.start()
        assert inside.wait(60)
    assert ours_everywhere()
    leave.set()
    thread.join(60)
    assert after == [True]
    assert not ours_everywhere()


def test_patched_models_compile() -> None:
    """torch.compile refuses instances of torch.nn.LSTM, which ours are inside."""
    with fastrnn.patch():
        model = nn.LSTM(4, 6)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(compiled(x)[0], model(x)[0])


# ---- tools that look at the exact type ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@ANY_KIND
def test_quantize_dynamic_says_what_it_leaves(kind: str) -> None:
    """torch's tool swaps torch.nn's classes alone: a warning says what to do, and either way works."""
    quantize_dynamic = torch.ao.quantization.quantize_dynamic
    model = nn.ModuleList([build(nn, kind, 4, 5), nn.Linear(4, 5)])
    fastrnn.convert(model)
    ours = type(model[0])
    with pytest.warns(UserWarning, match=f"leaves this fastrnn.{ours.__name__} as it is") as told:
        found = quantize_dynamic(model)
    assert sum("leaves this" in str(warning.message) for warning in told) == 1
    assert type(found[0]) is ours
    assert not hasattr(found[0], "qconfig")
    assert isinstance(found[1], torch.ao.nn.quantized.dynamic.Linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.ao.quantization knows")
        if "Cell" not in kind:
            narrow = quantize_dynamic(fastrnn.quantize(model))
            assert type(narrow[0]).__name__ == f"Quantized{ours.__name__}"
            assert isinstance(narrow[1], torch.ao.nn.quantized.dynamic.Linear)
        theirs = fastrnn.to_torch(copy.deepcopy(model))
        if kind not in ("RNN_TANH", "RNN_RELU"):  # torch has no quantized RNN
            assert type(quantize_dynamic(theirs)[0]).__module__.startswith("torch.ao.nn.quantized")
