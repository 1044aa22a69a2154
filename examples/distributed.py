"""Surgery on several processes: ``torchrun --nproc-per-node 2 examples/distributed.py``, on CPUs, or one GPU each.

Trains the demo's 25 tasks on customer reviews under DistributedDataParallel, each process on its part of every batch.
Then the first process trains on the whole batches alone. It prints that the processes agree to the bit, and
how far they are from the single one.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from fastmtl.demo import reviews
from fastmtl.demo.dataset import Split


class Net(nn.Module):
    """Trunk, surgery, heads; its output is the total loss.

    Args:
        num_inputs: D.
        num_tasks: T.
        process_group: ``"auto"``: all processes share a batch; None: this one is alone.
    """

    def __init__(self, num_inputs: int, num_tasks: int, process_group: Any) -> None:
        super().__init__()
        self.process_group = process_group
        self.trunk = nn.Sequential(nn.Linear(num_inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.surgery = fastmtl.FeatureSurgery(fastmtl.PCGrad(), num_tasks, process_group=process_group)
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(num_tasks))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of inputs [n, D] and labels [n, T]; n need not be the same everywhere."""
        zs = self.surgery(self.trunk(inputs))
        logits = [head(z)[:, 0] for head, z in zip(self.heads, zs, strict=True)]
        sums = [cross_entropy(x, y, reduction="sum") for x, y in zip(logits, labels.unbind(1), strict=True)]
        counts = [len(labels)] * len(sums)
        return self.surgery.total(fastmtl.distributed.mean(sums, counts, self.process_group))


def train(data: Split, epochs: int, rank: int, size: int, device: torch.device) -> list[Tensor]:
    """Train on part ``rank`` of ``size`` of every batch. Returns the parameters."""
    torch.manual_seed(0)
    inputs, labels = data.inputs.double(), data.labels.double()
    net: nn.Module = Net(inputs.shape[1], labels.shape[1], "auto" if size > 1 else None).double().to(device)
    model = DistributedDataParallel(net) if size > 1 else net
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    order = torch.Generator().manual_seed(0)  # the same in every process
    for epoch in range(epochs):
        total = torch.zeros((), dtype=torch.float64, device=device)
        batches = torch.randperm(len(inputs), generator=order).split(256)
        for batch in batches:
            part = batch.tensor_split(size)[rank]
            loss = model(inputs[part].to(device), labels[part].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if size > 1:
            dist.all_reduce(total)
        if rank == 0:
            print(
                f"{size} processes, epoch {epoch}: mean loss {total.item() / size / len(batches) / labels.shape[1]:.4f}"
            )
    return [p.detach() for p in net.parameters()]


def main() -> None:
    """Train on all processes, compare them, and compare with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/distributed.py")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    data = reviews.make_dataset(reviews.load(), seed=0).train

    params = train(data, epochs, rank, size, device)
    firsts = [p.clone() for p in params]
    for p in firsts:
        dist.broadcast(p, 0)
    equal = torch.tensor(int(all(map(torch.equal, params, firsts))), device=device)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    if rank == 0:
        alone = train(data, epochs, 0, 1, device)
        worst = max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(params, alone, strict=True))
        print(f"parameters are the same to the bit in all {size} processes: {'yes' if equal.item() else 'NO'}")
        print(f"largest relative difference from one process with the whole batches: {worst:.1e}")
        if not equal.item() or worst > 1e-6:
            raise SystemExit("they do not agree")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
