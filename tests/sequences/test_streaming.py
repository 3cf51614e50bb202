"""Within fastrnn.streaming() a sequence in chunks of any sizes has the bits of one call; without, its values."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

import fastrnn
from tests.helpers import KINDS, build, generator, make_state, randn, tensors, threads
from tests.sequences.cases import KIND, SIZES

KIND_AND_PROJECTION = [*((kind, 0) for kind in KINDS), ("LSTM", 9)]


def chunkings(steps, count, seed):
    """Sizes that sum to `steps`: single steps, one large chunk before or after them, and random ones."""
    yield [1] * steps
    yield [steps - 3, 1, 1, 1]
    yield [1, steps - 1]
    for k in range(count):
        cuts = torch.randperm(steps - 1, generator=generator(seed + k))[: 1 + 3 * k].add(1).sort().values
        yield torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([steps])).tolist()


def in_chunks(module, input, state, sizes):
    outputs = []
    for chunk in input.split(sizes):
        if len(chunk) == 1:
            output, state = module.step(chunk[0], state)
            outputs.append(output[None])
        else:
            output, state = module(chunk, state)
            outputs.append(output)
    return (torch.cat(outputs), *tensors(state))


def same(a, b):
    return all(map(torch.equal, a, b))


def as_one(module, input, state):
    output, finals = module(input, state)
    return (output, *tensors(finals))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 17, 100])
@pytest.mark.parametrize(("kind", "proj"), KIND_AND_PROJECTION)
def test_the_bits_of_one_call(kind, proj, batch, count):
    """Random sizes, so that vectors, tiles and panels are partly filled; large ones for two threads to share."""
    options = {"proj_size": proj} if proj else {}
    for hidden, size in ((37, 5), (150, 130)):
        dtype = torch.float64 if hidden == 37 else torch.float32
        torch.manual_seed(hidden)
        module = build(fastrnn, kind, size, hidden, num_layers=2, dtype=dtype, **options)
        input = randn(40, batch, size, dtype=dtype)
        state = make_state(kind, 2, batch, hidden=hidden, proj=proj, dtype=dtype)
        with torch.no_grad(), threads(count), fastrnn.streaming():
            whole = as_one(module, input, state)
            for sizes in chunkings(40, 3, hidden):
                assert same(in_chunks(module, input, state, sizes), whole), sizes
        with torch.no_grad(), threads(3 - count), fastrnn.streaming():
            assert same(as_one(module, input, state), whole)


@pytest.mark.parametrize(("size", "hidden"), [(40, 300), (300, 40)])
def test_weights_of_which_one_is_packed(size, hidden):
    """Of so many rows the deeper weights are read as they lie and the others packed, whatever the steps."""
    module, input = fastrnn.GRU(size, hidden), randn(9, 40, size, dtype=torch.float32)
    with torch.no_grad(), fastrnn.streaming():
        whole = as_one(module, input, None)
        for sizes in chunkings(9, 2, hidden):
            assert same(in_chunks(module, input, None, sizes), whole), sizes
    module.double()
    with torch.no_grad():
        torch.testing.assert_close(whole, as_one(module, input.double(), None), check_dtype=False, rtol=1e-5, atol=1e-5)


def test_without_it_the_bits_differ():
    """What the tests above would see if the context manager did nothing."""
    module, input = fastrnn.LSTM(130, 150, num_layers=2), randn(40, 3, 130, dtype=torch.float32)
    with torch.no_grad(), threads(1):
        whole = as_one(module, input, None)
        chunks = in_chunks(module, input, None, [1] * 40)
        torch.testing.assert_close(chunks, whole)
        assert not same(chunks, whole)
        with fastrnn.streaming():
            torch.testing.assert_close(as_one(module, input, None), whole)


def test_training_tokens_and_quantized_modules():
    torch.manual_seed(0)
    module, tokens = fastrnn.GRU(30, 40, token_input=True), torch.randint(30, (40, 3), generator=generator())
    with threads(1), fastrnn.streaming():
        for input in (tokens, randn(40, 3, 30, dtype=torch.float32)):
            with torch.no_grad():
                whole = as_one(module, input, None)
            assert same([x.detach() for x in as_one(module, input, None)], whole)
            for sizes in chunkings(40, 2, 0):
                assert same([x.detach() for x in in_chunks(module, input, None, sizes)], whole), sizes
        input, dense = randn(40, 100, 30, dtype=torch.float32), fastrnn.GRU(30, 40)
        for dtype in (torch.int8, torch.bfloat16):
            for batch in (1, 3, 100):
                narrow, part = fastrnn.quantize(dense, dtype), input[:, :batch]
                whole = as_one(narrow, part, None)
                for sizes in chunkings(40, 2, 0):
                    assert same(in_chunks(narrow, part, None, sizes), whole), (dtype, batch, sizes)


def test_every_c():
    torch.manual_seed(0)
    module, input = fastrnn.LSTM(64, 24, num_layers=2, return_all_states=True), randn(40, 2, 64, dtype=torch.float32)
    with torch.no_grad(), threads(1), fastrnn.streaming():
        output, _, c = module(input)
        for sizes in chunkings(40, 2, 0):
            state, found = None, []
            for chunk in input.split(sizes):
                part, state, cells = module(chunk, state)
                found.append((part, cells))
            assert same([torch.cat(x) for x in zip(*found, strict=True)], (output, c)), sizes


def test_it_ends_with_its_block_and_is_the_threads_own():
    def state():
        before = fastrnn._C.set_uniform(False)
        fastrnn._C.set_uniform(before)
        return before

    seen = []
    with pytest.raises(KeyError), fastrnn.streaming():
        with fastrnn.streaming():
            pass
        assert state()
        other = threading.Thread(target=lambda: seen.append(state()))
        other.start()
        other.join()
        raise KeyError
    assert not state() and seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@KIND
def test_chunks_are_the_sequence(kind: str, dtype: torch.dtype) -> None:
    """Fed in chunks of any sizes, states handed on: the outputs of one call. Equal bits take streaming()."""
    for H, B in itertools.product(SIZES, (1, 5, 64)):
        module = build(fastrnn, kind, 3, H, num_layers=2, dtype=dtype)
        x = randn(30, B, 3, dtype=dtype)
        with torch.no_grad():
            whole = module(x)
            outputs, state = [], None
            for chunk in x.split([1, 2, 9, 1, 16, 1]):
                output, state = module(chunk, state)
                outputs.append(output)
        torch.testing.assert_close((torch.cat(outputs), state), whole)
