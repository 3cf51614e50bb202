"""The suites: which rows each of them has. Plain data, no torch, so that --list is instant."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from benchmarks.cases import FORWARD_MODE, PENALTY, PER_SAMPLE, Row, Size, Suite, entries

FORWARD, TRAIN = ("fwd",), ("train",)

DECODE = [  # one step on a state that is passed in, and the three cells
    *entries("decode", "LSTM", (1, 1, 512, 512), stateful=True),
    *entries("decode", "LSTM", (1, 1, 256, 256), (1, 1, 1024, 1024), modes=FORWARD, stateful=True),
    *entries("decode", "LSTM", (1, 8, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "GRU", (1, 1, 512, 512), stateful=True),
    *entries("decode", "GRU", (1, 8, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "RNN", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("cell", "LSTMCell", (1, 1, 512, 512), (1, 32, 256, 256), (1, 256, 128, 128), stateful=True),
    *entries("cell", "GRUCell", (1, 1, 512, 512), (1, 32, 256, 256), (1, 256, 128, 128), stateful=True),
    *entries("cell", "RNNCell", (1, 1, 512, 512), (1, 32, 256, 256), stateful=True),
]

SMALL = [
    entry
    for cell in ("LSTM", "GRU", "RNN")
    for entry in entries("small", cell, (1, 1, 64, 64), (1, 1, 256, 256), (16, 1, 64, 64), (16, 8, 64, 64))
]

PACKED = [
    *entries("packed", "LSTM", (64, 16, 128, 128), shortest=8),
    *entries("packed", "LSTM", (128, 32, 256, 256), shortest=16),
    *entries("packed", "LSTM", (128, 32, 256, 256), shortest=16, bidirectional=True),
    *entries("packed", "GRU", (64, 16, 128, 128), shortest=8),
    *entries("packed", "GRU", (128, 32, 256, 256), shortest=16),
    *entries("packed", "RNN", (128, 32, 256, 256), shortest=16),
]

QUICK = [
    *entries("lstm", "LSTM", (100, 1, 256, 256), (128, 8, 128, 128), (1024, 4, 64, 64)),
    *entries("lstm", "LSTM", (100, 1, 512, 512), (512, 16, 128, 128), (128, 32, 256, 256)),
    *entries("gru", "GRU", (100, 1, 256, 256), (128, 8, 128, 128), (128, 32, 256, 256)),
    *entries("rnn", "RNN", (100, 1, 256, 256), (128, 8, 128, 128), (128, 32, 256, 256)),
    *entries("packed", "LSTM", (64, 16, 128, 128), shortest=8),
    *entries("packed", "GRU", (64, 16, 128, 128), shortest=8),
    *entries("proj", "LSTM", (64, 8, 128, 128), proj=64),
    *entries("bidir", "LSTM", (64, 8, 128, 128), layers=2, bidirectional=True),
    *entries("decode", "LSTM", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("decode", "GRU", (1, 1, 512, 512), modes=FORWARD, stateful=True),
    *entries("cell", "LSTMCell", (1, 1, 512, 512), (1, 32, 256, 256), modes=FORWARD, stateful=True),
    *entries("cell", "GRUCell", (1, 32, 256, 256), stateful=True),
    *entries("cell", "RNNCell", (1, 32, 256, 256), modes=FORWARD, stateful=True),
    *entries("float64", "LSTM", (64, 8, 128, 128), dtype="float64"),
    *entries("float64", "GRU", (64, 8, 128, 128), modes=FORWARD, dtype="float64"),
]

DENSE_SIZES: tuple[Size, ...] = (
    (1, 1, 512, 512), (100, 1, 256, 256), (100, 1, 512, 512), (100, 1, 1024, 1024), (128, 8, 128, 128),
    (128, 32, 256, 256), (128, 32, 512, 512), (64, 64, 512, 512), (512, 16, 128, 128), (1024, 4, 64, 64),
)  # fmt: skip

FULL = [  # minutes to an hour
    *entries("lstm", "LSTM", *DENSE_SIZES, (64, 64, 1024, 1024), (25, 16, 1760, 1760)),
    *entries("gru", "GRU", *DENSE_SIZES),
    *entries("rnn", "RNN", *DENSE_SIZES),
    *PACKED,
    *entries("proj", "LSTM", (64, 8, 128, 128), proj=64),
    *entries("proj", "LSTM", (128, 16, 512, 512), proj=256),
    *entries("bidir", "LSTM", (64, 8, 128, 128), (128, 16, 256, 256), layers=2, bidirectional=True),
    *entries("bidir", "GRU", (128, 16, 256, 256), layers=2, bidirectional=True),
    *DECODE,
    *entries("float64", "LSTM", (64, 8, 128, 128), (128, 32, 256, 256), dtype="float64"),
    *entries("float64", "GRU", (64, 8, 128, 128), (128, 32, 256, 256), dtype="float64"),
]

ACCURACY = [
    entry
    for dtype in ("float32", "bfloat16", "float16")
    for entry in [
        *entries("lstm", "LSTM", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("gru", "GRU", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("rnn", "RNN", (32, 8, 64, 64), (256, 4, 128, 128), modes=TRAIN, dtype=dtype),
        *entries("packed", "LSTM", (32, 8, 64, 64), modes=TRAIN, shortest=4, dtype=dtype),
        *entries("proj", "LSTM", (32, 8, 64, 64), modes=TRAIN, proj=32, dtype=dtype),
        *entries("bidir", "LSTM", (32, 8, 64, 64), modes=TRAIN, layers=2, bidirectional=True, dtype=dtype),
        *entries("cell", "LSTMCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
        *entries("cell", "GRUCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
        *entries("cell", "RNNCell", (1, 8, 64, 64), modes=TRAIN, stateful=True, dtype=dtype),
    ]
]

DEEPBENCH = [  # input size = hidden size, as there; T and B are its own
    *(
        entry
        for H, T, batches in (
            (512, 25, (16, 32, 64, 128)), (1024, 25, (16, 32, 64, 128)), (2048, 25, (16, 32, 64, 128)),
            (4096, 25, (16, 32, 64, 128)), (1536, 50, (8, 16, 32)), (256, 150, (16, 32, 64)),
        )
        for B in batches
        for entry in entries("deepbench-train", "LSTM", (T, B, H, H), modes=TRAIN)
    ),
    *(
        entry
        for H in (1760, 2048, 2560)
        for B in (16, 32, 64, 128)
        for entry in entries("deepbench-train", "RNN", (50, B, H, H), modes=TRAIN)
    ),
    *entries("deepbench-train", "GRU", (1500, 32, 2816, 2816), (750, 32, 2560, 2560), modes=TRAIN),
    *entries("deepbench-train", "GRU", (375, 32, 2048, 2048), (187, 32, 1536, 1536), modes=TRAIN),
    *entries("deepbench-train", "GRU", (1500, 32, 1024, 1024), (1500, 64, 1024, 1024), modes=TRAIN),
    *entries("deepbench-train", "GRU", (1, 32, 512, 512), modes=TRAIN),
    *(
        entry
        for cell, sizes in (
            ("LSTM", ((512, 25), (1024, 25), (2048, 25), (1536, 50), (256, 150))),
            ("GRU", ((2816, 1500), (2560, 750), (2048, 375), (1536, 187), (1024, 1500), (512, 1))),
        )
        for H, T in sizes
        for B in (1, 2, 4)
        for entry in entries("deepbench-server", cell, (T, B, H, H), modes=FORWARD)
    ),
]  # fmt: skip

SERVER = [  # a few sequences at a time, on one thread
    *entries("server", "LSTM", (90, 1, 200, 900), (80, 2, 448, 448), (1, 4, 320, 640), modes=FORWARD),
    *entries("server", "LSTM", (60, 1, 160, 320), (20, 4, 256, 256), modes=FORWARD),
    *entries("server", "LSTM", (100, 1, 512, 512), (100, 1, 1024, 1024), modes=FORWARD),
    *entries("server", "GRU", (90, 1, 200, 900), (80, 2, 448, 448), (60, 1, 160, 320), modes=FORWARD),
    *entries("server", "GRU", (50, 4, 512, 512), (100, 1, 512, 512), modes=FORWARD),
    *entries("server", "RNN", (1, 1, 384, 384), (100, 1, 512, 512), modes=FORWARD),
    # Where no state is given ONNX Runtime's first step multiplies nothing with it, and torch.nn's and ours do.
    *entries("server", "LSTM", (1, 4, 320, 640), modes=FORWARD, stateful=True),
    *entries("server", "RNN", (1, 1, 384, 384), modes=FORWARD, stateful=True),
    # Chunks of a stream with the state of the one before, as detectors of voice activity take them.
    *entries("stream", "LSTM", (1, 1, 128, 128), (4, 1, 128, 128), (16, 1, 128, 128), modes=FORWARD, stateful=True),
    *entries("stream", "LSTM", (1, 1, 64, 64), (4, 1, 64, 64), modes=FORWARD, layers=2, stateful=True),
    *entries("stream", "GRU", (1, 1, 128, 128), (4, 1, 128, 128), modes=FORWARD, stateful=True),
]

MLPERF = [  # layers and widths of the reference models; T and B are ours, small enough for a CPU
    *entries("gnmt", "LSTM", (50, 32, 1024, 1024), bidirectional=True),  # first encoder layer
    *entries("gnmt", "LSTM", (50, 32, 1024, 1024), layers=4),  # a stack of four, encoder or decoder
    *entries("gnmt", "LSTM", (1, 32, 1024, 1024), modes=FORWARD, layers=4, stateful=True),  # one decoder step
    *entries("rnnt", "LSTM", (200, 8, 240, 1024), layers=2),  # encoder before the time reduction
    *entries("rnnt", "LSTM", (100, 8, 2048, 1024), layers=3),  # and after it
    *entries("rnnt", "LSTM", (40, 8, 512, 512), layers=2),  # prediction network
    *entries("rnnt", "LSTM", (1, 8, 512, 512), modes=FORWARD, layers=2, stateful=True),  # one step of it
]

SWEEP = [
    entry
    for cell in ("LSTM", "GRU", "RNN")
    for T in (10, 100)
    for H in (64, 128, 256, 512, 1024)
    for B in (1, 4, 16, 64)
    for entry in entries("sweep", cell, (T, B, H, H))
]

VARIANTS = [
    *entries("plain", "LSTM", (64, 8, 128, 128)),
    *entries("plain", "GRU", (64, 8, 128, 128)),
    *entries("plain", "RNN", (64, 8, 128, 128)),
    *entries("relu", "RNN", (64, 8, 128, 128), nonlinearity="relu"),
    *(
        entry
        for cell in ("LSTM", "GRU")
        for family, options in (
            ("nobias", {"bias": False}), ("batchfirst", {"batch_first": True}), ("bidir", {"bidirectional": True}),
            ("layers", {"layers": 3}), ("state", {"stateful": True}), ("float64", {"dtype": "float64"}),
            ("bfloat16", {"dtype": "bfloat16"}), ("float16", {"dtype": "float16"}), ("packed", {"shortest": 8}),
        )
        for entry in entries(family, cell, (64, 8, 128, 128), **options)
    ),
    *entries("proj", "LSTM", (64, 8, 128, 128), proj=64),
    *entries("widein", "LSTM", (64, 8, 1024, 128)),
    *entries("narrowin", "LSTM", (64, 8, 3, 128)),
]  # fmt: skip

RL = [  # sequences with episode boundaries inside, as policies are trained on
    *entries("rl", "LSTM", (128, 32, 256, 256), resets=50),
    *entries("rl", "LSTM", (16, 256, 128, 128), (512, 16, 128, 128), modes=TRAIN, resets=100),
    *entries("rl", "GRU", (128, 32, 256, 256), resets=50),
    *entries("rl", "GRU", (64, 64, 128, 128), modes=TRAIN, resets=20),
]

MASKS = [  # what lengths and resets cost, or save, of the same call without
    *(
        entry
        for cell in ("LSTM", "GRU", "RNN")
        for options in ({"resets": 50}, {"shortest": 16}, {"shortest": 16, "padded": True})
        for entry in entries("masks", cell, (128, 32, 256, 256), **options)  # type: ignore[arg-type]
    ),
    *entries("masks", "LSTM", (512, 16, 128, 128), (16, 256, 128, 128), (128, 1, 256, 256), resets=50),
    *entries("masks", "LSTM", (1, 1, 256, 256), (1, 32, 256, 256), modes=FORWARD, stateful=True, resets=50),
]

VOCABULARY = 50_000
TOKENS = [
    entry for cell in ("LSTM", "GRU") for entry in entries("tokens", cell, (128, 32, VOCABULARY, 256), tokens=True)
]

RECOMPUTE = [
    entry
    for frozen in (True, False)
    for entry in entries("recompute", "LSTM", (4096, 16, 128, 128), modes=TRAIN, recompute=64, frozen=frozen)
]

CELL_SIZES = ((100, 16, 64, 64), (128, 32, 256, 256), (512, 16, 128, 128))
CELLS = [  # cells that torch.nn has not got
    *entries("peephole", "LSTM", *CELL_SIZES, peephole=True),
    *entries("layernorm", "LSTM", *CELL_SIZES, layer_norm=True),
    *entries("layernorm", "GRU", *CELL_SIZES, layer_norm=True),
    *(
        entry
        for cell in ("LSTM", "GRU")
        for entry in [
            *entries("recurrent dropout", cell, *CELL_SIZES, modes=TRAIN, recurrent_dropout=0.25),
            *entries("zoneout", cell, *CELL_SIZES, zoneout=0.1),
        ]
    ),
    *entries("reset before", "GRU", *CELL_SIZES, reset_after=False),
    *entries("heads", "LSTM", *CELL_SIZES, num_heads=4),
    *entries("projection", "LSTM", (100, 16, 64, 128), (128, 32, 256, 512), (512, 16, 128, 256), proj=64),
]

NESTED = [
    entry
    for cell in ("LSTM", "GRU")
    for sizes in CELL_SIZES
    for entry in entries("nested", cell, sizes, shortest=sizes[0] // 8, nested=True)
]

MEMORY = [
    *entries("memory", "LSTM", (512, 16, 512, 512), (128, 32, 256, 256), modes=TRAIN),
    *entries("memory", "GRU", (512, 16, 512, 512), modes=TRAIN),
    *entries("memory", "RNN", (512, 16, 512, 512), modes=TRAIN),
    *entries("memory", "LSTM", (512, 16, 512, 512), modes=FORWARD),
    *entries("memory", "LSTM", (128, 16, 256, 256), modes=TRAIN, layers=2, bidirectional=True),
    *entries("memory", "LSTM", (128, 32, 256, 256), modes=TRAIN, shortest=16),
]

SCALING = [  # from a common middle (128, 16, 256, 256), one size at a time
    entry
    for cell in ("LSTM", "GRU")
    for entry in [
        *entries("scaling", cell, *((T, 16, 256, 256) for T in (8, 32, 128, 512))),
        *entries("scaling", cell, *((128, B, 256, 256) for B in (1, 4, 64))),
        *entries("scaling", cell, *((128, 16, H, H) for H in (64, 128, 512))),
    ]
]


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all of them."""
    return tuple(sorted({cores, *(1 << k for k in range(cores.bit_length()) if 1 << k <= cores)}))


CORES = os.cpu_count() or 1
THREADS = [
    *entries("threads", "LSTM", (160, 8, 40, 256), layers=3),
    *entries("threads", "LSTM", (128, 32, 256, 256), (16, 8, 64, 64)),
    *entries("threads", "GRU", (200, 1, 128, 128), (128, 8, 128, 128)),
    *entries("threads", "RNN", (100, 1, 256, 256)),
]

# Shapes on which runtimes are often compared: one step, one row, small and large batches.
PEER_SIZES: tuple[Size, ...] = (
    (1, 1, 512, 512), (100, 1, 256, 256), (128, 8, 128, 128), (128, 32, 256, 256), (512, 16, 128, 128),
    (1024, 4, 64, 64), (64, 64, 512, 512), (16, 16, 256, 256),
)  # fmt: skip
RUNTIMES = ("torch", "aten", "loop", "compiled", "int8", "onnxruntime", "openvino", "jax", "keras")
PEER_TABLE = [
    *entries("lstm", "LSTM", *PEER_SIZES),
    *entries("gru", "GRU", *PEER_SIZES),
    *entries("rnn", "RNN", *PEER_SIZES[:4]),
]

QUANTIZED = [
    *entries("lstm", "LSTM", (1, 1, 512, 512), (1, 1, 1024, 1024), (100, 1, 256, 256), modes=FORWARD),
    *entries("lstm", "LSTM", (100, 1, 512, 512), (100, 1, 1024, 1024), (64, 16, 512, 512), modes=FORWARD),
    *entries("gru", "GRU", (1, 1, 512, 512), (100, 1, 512, 512), (64, 16, 512, 512), modes=FORWARD),
]

QUANTIZED_ERROR = [  # errors die away in a fresh layer, last longer with larger recurrent weights, and grow in chaos
    entry
    for cell in ("LSTM", "GRU", "RNN")
    for entry in [
        *(
            entry
            for H in (64, 256, 1024)
            for gain in (1.0, 2.0, 4.0)
            for entry in entries("drift", cell, (10_000, 4, H, H), modes=FORWARD, gain=gain)
        ),
        *entries("drift", cell, (10_000, 4, 64, 256), modes=FORWARD, trained=True),
    ]
]

PER_SAMPLE_LAYERS = [  # gradients a sample, as in differentially private training
    *entries("persample", "LSTM", (64, 64, 128, 128), (16, 64, 64, 64), (256, 16, 128, 128), modes=PER_SAMPLE),
    *entries("persample", "GRU", (64, 64, 128, 128), modes=PER_SAMPLE),
    *entries("persample", "RNN", (64, 64, 128, 128), modes=PER_SAMPLE),
]
GRADIENT_PENALTY = [
    entry
    for cell in ("LSTM", "GRU", "RNN")
    for entry in entries("penalty", cell, (64, 16, 128, 128), (128, 32, 256, 256), modes=PENALTY)
]

MIDDLE: Size = (100, 16, 160, 160)
AUDIT = [  # whatever may be asked of torch.nn, each in the cells that have it
    *(
        entry
        for cell in ("LSTM", "GRU", "RNN")
        for entry in [
            *entries("plain", cell, MIDDLE, (1, 1, 128, 128), (60, 1, 160, 320), (32, 64, 256, 256)),
            *entries("float64", cell, MIDDLE, dtype="float64"),
            *entries("bfloat16", cell, MIDDLE, (1, 1, 128, 128), (32, 64, 256, 256), dtype="bfloat16"),
            *entries("float16", cell, (16, 4, 64, 64), dtype="float16"),
            *entries("batchfirst", cell, MIDDLE, batch_first=True),
            *entries("unbatched", cell, (100, 1, 160, 160), unbatched=True),
            *entries("bidir", cell, MIDDLE, (1, 1, 256, 256), (20, 1, 256, 256), bidirectional=True),
            *entries("layers", cell, MIDDLE, layers=3),
            *entries("nobias", cell, MIDDLE, bias=False),
            *entries("state", cell, MIDDLE, stateful=True),
            *entries("packed", cell, MIDDLE, shortest=10),
            *entries("frozen", cell, MIDDLE, modes=TRAIN, frozen=True),
            *entries("autocast", cell, MIDDLE, modes=("fwd-autocast", "train-autocast")),
            *entries("checkpoint", cell, MIDDLE, modes=("train-checkpoint",)),
            *entries("compiled", cell, MIDDLE, modes=("fwd-compiled", "train-compiled")),
            *entries("forwardmode", cell, MIDDLE, modes=FORWARD_MODE),
            *entries("penalty", cell, MIDDLE, modes=PENALTY),
            *entries("step", cell, (1, 1, 128, 128), (1, 16, 256, 256), modes=("fwd-step",), stateful=True),
            *entries(
                "cell", f"{cell}Cell", (1, 1, 128, 128), (1, 32, 256, 256), (1, 32, 300, 300), (1, 64, 512, 512),
                (1, 128, 256, 256), stateful=True,
            ),
            *entries("cell loop", f"{cell}Cell", (1, 16, 160, 160), modes=("fwd-loop", "train-loop"), stateful=True),
        ]
    ),
    *entries("proj", "LSTM", MIDDLE, proj=80),
    *entries("relu", "RNN", MIDDLE, nonlinearity="relu"),
]  # fmt: skip

FORWARD_DERIVATIVES = [
    entry
    for cell in ("LSTM", "GRU", "RNN")
    for entry in entries(
        "forwardmode", cell, (64, 16, 128, 128), (128, 32, 256, 256), (100, 16, 160, 160), modes=FORWARD_MODE
    )
]
PER_SAMPLE_PEERS = ("sampleloop", "oursampleloop", "opacus")

SUITES: dict[str, Suite] = {
    "quick": Suite("every family at its smaller sizes, about two minutes", tuple(QUICK), budget_s=1.5),
    "decode": Suite("one step: layers at T = 1 with a state, and the cells", tuple(DECODE), budget_s=2.0),
    "small": Suite("few steps of small layers, where what a call costs counts", tuple(SMALL), budget_s=1.0),
    "packed": Suite("PackedSequence, lengths uniform, forward and training", tuple(PACKED)),
    "full": Suite("every family at all sizes, long", tuple(FULL)),
    "accuracy": Suite("error against a float64 run of torch.nn, by dtype", tuple(ACCURACY), kind="accuracy"),
    "deepbench": Suite("DeepBench's LSTM, GRU and vanilla sizes, training and server", tuple(DEEPBENCH), longest_s=2.0),
    "server": Suite("one to four sequences at a time", tuple(SERVER), peers=("torch", "onnxruntime")),
    "mlperf": Suite("layers of GNMT and RNN-T", tuple(MLPERF)),
    "sweep": Suite("a grid over H, B and T, for the heat maps", tuple(SWEEP), budget_s=1.0, longest_s=2.0),
    "variants": Suite("every option of the layers at one size", tuple(VARIANTS), budget_s=2.0),
    "rl": Suite(
        "resets inside sequences, against three hand loops and TorchRL", tuple(RL),
        peers=("loop", "cellloop", "perstep", "torchrlpad", "torchrlscan"),
    ),
    "masks": Suite("what lengths and resets cost beside a call without", tuple(MASKS), peers=("unmasked",)),
    "tokens": Suite("tokens of a large vocabulary against an embedding", tuple(TOKENS), peers=("embedding", "columns")),
    "tokensmemory": Suite("peak memory of the same", tuple(TOKENS), kind="memory", peers=("embedding", "columns")),
    "recompute": Suite("training with recompute against without", tuple(RECOMPUTE), peers=("everykept",)),
    "recomputememory": Suite("peak memory of the same", tuple(RECOMPUTE), kind="memory", peers=("everykept",)),
    "cells": Suite(
        "cells that torch.nn lacks, against our plain one and a loop", tuple(CELLS), peers=("plaincell", "loop")
    ),
    "nested": Suite("nested tensors against the same rows packed", tuple(NESTED), peers=("packed",)),
    "memory": Suite("peak memory of a step, each side in processes of its own", tuple(MEMORY), kind="memory"),
    "persample": Suite(
        "per-sample gradients by vmap, against loops and Opacus", tuple(PER_SAMPLE_LAYERS), peers=PER_SAMPLE_PEERS,
    ),
    "persamplememory": Suite(
        "peak memory of per-sample gradients", tuple(PER_SAMPLE_LAYERS[:1]), kind="memory", peers=PER_SAMPLE_PEERS,
    ),
    "penalty": Suite("a second derivative in every step", tuple(GRADIENT_PENALTY), peers=("torch", "loop")),
    "penaltymemory": Suite("peak memory of the same", tuple(GRADIENT_PENALTY), kind="memory"),
    "audit": Suite("every call that has a twin in torch.nn, for the list of losses", tuple(AUDIT), budget_s=1.0),
    "forwardmode": Suite("tangents, and Hessian-vector products", tuple(FORWARD_DERIVATIVES), peers=("torch", "loop")),
    "scaling": Suite(
        "cost against T, B, H and threads, with fitted exponents", tuple(SCALING), budget_s=1.5,
        threads=thread_counts(CORES),
    ),
    "threads": Suite(
        "more threads than processors, and processors that others use", tuple(THREADS), budget_s=2.0,
        threads=(1, CORES, CORES + 1, 2 * CORES, 4 * CORES), busy_threads=(1, CORES), busy=CORES,
    ),
    "quantized": Suite("narrow weights: with --ours ourint8 or ourbf16", tuple(QUANTIZED), peers=("fastrnn", "int8")),
    "quantizederror": Suite(
        "error of narrow weights after 1 to 10,000 steps", tuple(QUANTIZED_ERROR), kind="drift",
        peers=("fastrnn", "ourint8", "ourbf16"),
    ),
    "peers": Suite("common shapes against every runtime there is", tuple(PEER_TABLE), peers=RUNTIMES, budget_s=2.0),
}  # fmt: skip


def select(suites: Sequence[str] | None, pattern: str | None, peers: Sequence[str] | None = None) -> dict[Row, Suite]:
    """Rows to run, each id once, with the suite it was first found in.

    No suite named: `quick`, or every suite when there is a pattern, so that an id needs no suite to be found.
    """
    names = suites or (list(SUITES) if pattern else ["quick"])
    chosen: dict[str, tuple[Row, Suite]] = {}
    for name in names:
        for row in SUITES[name].rows(peers):
            if pattern is None or re.search(pattern, row.id):
                chosen.setdefault(row.id, (row, SUITES[name]))
    return dict(chosen.values())
