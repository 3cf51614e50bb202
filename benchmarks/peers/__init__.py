"""Contestants behind one interface (base.Peer); fastrnn is one of them. A package that is absent makes skipped rows.

All of these run on the CPU. Peers that need a GPU (cuDNN through torch.nn, FlashRNN, haste, TorchRL's Triton kernels)
take the same interface: their `missing()` asks for a device and their `Prepared.synchronize` waits for it. cuDNN is
timed by benchmarks/gpu, on its own clock; the others have no module yet.
"""

import torch

from benchmarks.peers.base import NoResult, Peer, Prepared
from benchmarks.peers.jax_scan import JaxPeer
from benchmarks.peers.keras_layers import KerasPeer
from benchmarks.peers.kernels import fastrnn_kernel, torch_kernel
from benchmarks.peers.loops import CellLoop, CompiledLoopPeer, HandLoop, LayerPerStep, LoopPeer
from benchmarks.peers.modules import ModulePeer, prepare_module
from benchmarks.peers.onnx_runtimes import OnnxRuntimePeer, OpenVinoPeer
from benchmarks.peers.our_quantized import QuantizedPeer
from benchmarks.peers.per_sample import OpacusPeer, SampleLoop
from benchmarks.peers.sequences import (
    EmbeddingPeer,
    EverythingKeptPeer,
    PackedPeer,
    PlainCellPeer,
    TokenColumnsPeer,
    TorchRLPeer,
    UnmaskedPeer,
)
from benchmarks.peers.torch_others import AtenPeer, DynamicInt8Peer

__all__ = ["PEERS", "ModulePeer", "NoResult", "Peer", "Prepared", "prepare_module"]

CONTESTANTS: tuple[Peer, ...] = (
    ModulePeer("fastrnn", "fastrnn", "fastrnn", kernel=fastrnn_kernel, options=True, per_sample=True),
    QuantizedPeer("ourint8", torch.int8),
    QuantizedPeer("ourbf16", torch.bfloat16),
    ModulePeer("torch", "torch.nn", "torch.nn", version_of="torch", kernel=torch_kernel, only_reverse=("LSTM",)),
    AtenPeer(),
    DynamicInt8Peer(),
    LoopPeer("loop", "hand loop, input GEMM hoisted", HandLoop, "ATen, eager loop after one input GEMM"),
    CompiledLoopPeer(),
    LoopPeer("cellloop", "loop over torch.nn's cell", CellLoop, "ATen, eager loop over cells"),
    LoopPeer("perstep", "torch.nn's layer, a call a step", LayerPerStep, "a torch.nn layer called at every step"),
    SampleLoop("sampleloop", "torch.nn"),
    SampleLoop("oursampleloop", "fastrnn"),
    OpacusPeer(),
    UnmaskedPeer("unmasked", "fastrnn without lengths and resets", "fastrnn", kernel=fastrnn_kernel, options=True),
    EverythingKeptPeer("everykept", "fastrnn without recompute", "fastrnn", kernel=fastrnn_kernel, options=True),
    PackedPeer("packed", "fastrnn, the rows packed", "fastrnn", kernel=fastrnn_kernel, options=True),
    PlainCellPeer("plaincell", "fastrnn's plain cell", "fastrnn", kernel=fastrnn_kernel, options=True),
    TokenColumnsPeer("columns", "fastrnn, tokens as columns", "fastrnn", kernel=fastrnn_kernel, options=True),
    EmbeddingPeer(),
    TorchRLPeer("pad"),
    TorchRLPeer("scan"),
    OnnxRuntimePeer(),
    OpenVinoPeer(),
    JaxPeer(),
    KerasPeer(),
)
PEERS: dict[str, Peer] = {peer.key: peer for peer in CONTESTANTS}
