r"""A density in two dimensions, learnt by several processes.

    torchrun --nproc-per-node 2 examples/toy_density_ddp.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \
        examples/toy_density_ddp.py

gloo on CPUs, nccl on CUDA devices. torch's DistributedDataParallel averages the gradients; the
merge hook is registered once, as always, and compares the processes at each merge.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from p4flows import MergeHook, bent_stacked_flow, toy


class Loss(nn.Module):
    """What DistributedDataParallel calls: gradients are averaged on the way through `forward`."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def main() -> None:
    """Train, and say how far the density is from the truth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=sorted(toy.TARGETS), default="moons")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=250, help="samples a step of each process")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

    torch.manual_seed(arguments.seed)
    flow = bent_stacked_flow(2, arguments.blocks).to(device)
    module = DistributedDataParallel(Loss(flow), device_ids=[device] if cuda else None)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    hook = MergeHook(module, optimizer)

    target = toy.TARGETS[arguments.target]
    generator = torch.Generator().manual_seed(1_000 * (arguments.seed + 1) + rank)
    for _ in tqdm(range(arguments.steps), disable=rank > 0):
        optimizer.zero_grad()
        module(target.sample(arguments.batch, generator).to(device)).backward()
        optimizer.step()
        scheduler.step()

    flow.eval()
    points = target.sample(20_000, generator)
    with torch.no_grad():
        mine = flow.log_prob(points.to(device)).cpu()
    divergence = (target.log_density(points) - mine).mean().to(device)
    dist.all_reduce(divergence)
    if rank == 0:
        ranks = dist.get_world_size()
        print(f"KL {divergence.item() / ranks:.3f} nats, {ranks} processes, {hook.stats}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
