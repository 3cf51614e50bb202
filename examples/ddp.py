"""Trains a tagger of random digits on several processes: DistributedDataParallel or FSDP2 around fastrnn's layers.

    torchrun --standalone --nproc_per_node 2 examples/ddp.py --wrap fsdp
    python examples/ddp.py                                      # one process, the same losses

Each step's batch is split over the processes, so that the losses do not depend on their number. The task: say at each
step whether the sum of the digits so far is even.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastrnn

DIGITS = 10


class Tagger(nn.Module):
    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS, hidden)
        self.rnn: nn.Module = getattr(fastrnn, cell)(hidden, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, digits: Tensor) -> Tensor:
        """digits [B, T] -> logits [B, T, 2]"""
        return self.head(self.rnn(self.embed(digits))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--cell", choices=["LSTM", "GRU", "RNN"], default="LSTM")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if args.batch % ranks:
        parser.error(f"--batch: expected a multiple of {ranks} (processes), got {args.batch}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")

    torch.manual_seed(0)  # the same weights on every process
    tagger = Tagger(args.cell, args.hidden).to(device)
    model: nn.Module = tagger
    if ranks > 1 and args.wrap == "ddp":
        model = DistributedDataParallel(tagger, device_ids=[device.index] if cuda else None)
    elif ranks > 1:
        mesh = init_device_mesh(device.type, (ranks,))
        fully_shard(tagger.rnn, mesh=mesh)
        fully_shard(tagger, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(1)  # the same batches on every process, of which each takes its part
    for step in range(args.steps):
        digits = torch.randint(DIGITS, (args.batch, args.length), generator=generator)
        digits = digits.chunk(ranks)[rank].to(device)
        logits = model(digits)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), digits.cumsum(1).remainder(2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        if rank == 0 and (step < 5 or step % 20 == 19):
            print(f"step {step + 1:4d}   loss {total.item() / ranks:.6f}", flush=True)
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
