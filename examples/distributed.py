"""Surgery on several processes: ``torchrun --nproc-per-node 2 examples/distributed.py``, on CPUs, or one GPU each.

Trains the demo's 25 tasks on customer reviews under DistributedDataParallel, each process on its part of every batch.
Then the first process trains on the whole batches alone. It prints that the processes agree to the bit, and
how far they are from the single one.

With ``--checkpoint FOLDER`` each epoch ends with a checkpoint, and a run begins after the last one that is whole: a job
that was killed goes on where it was when it is started again, on any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, all processes together. The method's state is in the model's."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the last checkpoint in a folder that is whole. Returns after how many epochs it was written; 0: none."""
    epochs = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)  # which is written last
    if epochs > 0:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder / str(epochs))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return epochs


def train(
    data: Split, epochs: int, rank: int, size: int, device: torch.device, checkpoints: Path | None = None
) -> list[Tensor]:
    """Train on part ``rank`` of ``size`` of every batch. Returns the parameters."""
    torch.manual_seed(0)
    inputs, labels = data.inputs.double(), data.labels.double()
    net: nn.Module = Net(inputs.shape[1], labels.shape[1], "auto" if size > 1 else None).double().to(device)
    model = DistributedDataParallel(net) if size > 1 else net
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    done = 0 if checkpoints is None else resume(checkpoints, model, optimizer)
    if done and rank == 0:
        print(f"{size} processes, resumed after {done} epochs")
    for epoch in range(done, epochs):
        order = torch.Generator().manual_seed(epoch)  # the same in every process, also in one that resumes
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
        if checkpoints is not None:
            save(checkpoints / str(epoch + 1), model, optimizer)
    return [p.detach() for p in net.parameters()]


def main() -> None:
    """Train on all processes, compare them, and compare with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="folder, the same for all processes: save there, and resume")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/distributed.py")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    data = reviews.make_dataset(reviews.load(), seed=0).train

    params = train(data, options.epochs, rank, size, device, options.checkpoint)
    firsts = [p.clone() for p in params]
    for p in firsts:
        dist.broadcast(p, 0)
    equal = torch.tensor(int(all(map(torch.equal, params, firsts))), device=device)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    if rank == 0:
        alone = train(data, options.epochs, 0, 1, device)
        worst = max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(params, alone, strict=True))
        print(f"parameters are the same to the bit in all {size} processes: {'yes' if equal.item() else 'NO'}")
        print(f"largest relative difference from one process with the whole batches: {worst:.1e}")
        if not equal.item() or worst > 1e-6:
            raise SystemExit("they do not agree")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
