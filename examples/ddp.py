"""The word language model of word_lm.py on several processes: DistributedDataParallel, or FSDP2, around its layers.

    python examples/ddp.py                                                        # one process
    torchrun --standalone --nproc_per_node 2 examples/ddp.py --strategy fsdp2     # two, of the same batch together

The text is laid out as --batch streams, of which each process has its own, with their states, from beginning to end;
gradients are averaged over the processes. So with --dropout 0 the losses are one process's. (With dropout each process
draws masks of its own.) More machines: docs/examples.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import common
import fastrnn
from char_lm import read_text
from word_lm import AWDLSTM, Corpus, loss_of, perplexity, pieces


def wrapped(model: AWDLSTM, strategy: str, device: torch.device, ranks: int) -> nn.Module:
    """The same model, whose gradients are averaged over the processes in backward."""
    if strategy == "ddp":  # each has all of it
        devices = None if device.index is None else [device.index]
        return DistributedDataParallel(model, device_ids=devices, static_graph=True)  # the same parameters in each step
    mesh = init_device_mesh(device.type, (ranks,))
    fully_shard(model.lstm, mesh=mesh)  # each has a part of every parameter; the LSTM's are gathered for its call alone
    fully_shard(model, mesh=mesh)
    return model


def mean(value: Tensor, ranks: int) -> float:
    """Over the processes, all of which have to ask."""
    value = value.detach().clone()
    if ranks > 1:
        dist.all_reduce(value)
    return value.item() / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--text", type=Path, help="a UTF-8 text (default: Python's own library)")
    parser.add_argument("--words", type=int, default=300_000, help="of the text (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=5_000, help="most frequent words (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="of embedding and layers (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, help="streams of all processes together (default: %(default)s)"
    )
    parser.add_argument("--seq-len", type=int, default=35, help="mean length of a piece (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.5, help="times the recipe's rates (default: %(default)s)")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.batch % ranks:
        parser.error(f"--batch: expected a multiple of {ranks} (processes), got {args.batch}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")

    corpus = Corpus(read_text(args.text, 10 * args.words), args.words, args.vocabulary)
    torch.manual_seed(0)  # the same weights in every process
    awd = AWDLSTM(len(corpus.words), args.size, 2, args.dropout).to(device)
    model = wrapped(awd, args.strategy, device, ranks) if ranks > 1 else awd
    torch.manual_seed(1 + rank)  # masks of its own
    random.seed(0)  # pieces of the same lengths in every process
    optimizer = torch.optim.SGD(model.parameters(), args.lr, weight_decay=1.2e-6)

    text = common.streams(corpus.train, args.batch).chunk(ranks, 1)[rank].to(device)
    held_out = common.streams(corpus.valid, ranks)[:, rank].to(device)
    if min(len(text), len(held_out) // 10) < 3:
        parser.error(
            f"--text: expected more words than {len(corpus.train):,} to train on, {len(corpus.valid):,} held out"
        )
    state, epochs = None, (pieces(text, args.seq_len) for _ in itertools.count())
    for step, (piece, scale) in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), args.steps), 1):
        model.train()
        loss, state = loss_of(model, piece, fastrnn.detach(state))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)  # the averaged gradient's, of which each has all or a part
        optimizer.param_groups[0]["lr"] = args.lr * scale
        optimizer.step()
        if step <= 5 or step % 20 == 0:
            of_all = mean(loss, ranks)
            if rank == 0:
                print(f"step {step:4d}   loss {of_all:.6f}", flush=True)
    nats = mean(torch.tensor(perplexity(model, held_out, args.seq_len), device=device).log(), ranks)
    if rank == 0:
        print(f"held-out perplexity {math.exp(nats):.2f}")
    if dist.is_initialized():
        time.sleep(0.2)  # gloo's threads wait for the interpreter to free the last tensors; joining them would hold it
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it a second time
        if os.environ.get("RANK", "0") == "0":  # Ctrl-C reaches every process
            print("ddp: interrupted", file=sys.stderr)
        sys.exit(130)
