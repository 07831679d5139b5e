"""Several processes, started by torch's spawn with gloo: DistributedDataParallel, drift.

What a process finds is written to a file, because one that ends while another still talks to it may
be torn down with an error.
"""

import os
import pickle
import sys
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from p4flows import MergeHook, P4InvTransform, bent_stacked_flow

DATA = 1.0 + 0.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(7))


class Loss(nn.Module):
    """DistributedDataParallel averages the gradients of what is called."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return -self.flow.log_prob(x).mean()


def flow_of(seed):
    torch.manual_seed(seed)
    return bent_stacked_flow(2, 2, rank=1)


def state_of(flow):
    return {name: value.clone() for name, value in flow.state_dict().items()}


def ddp(
    rank,
    folder,
    spoil=lambda rank, step, flow, optimizer: True,
    steps=12,
    early=False,
    broadcast_buffers=False,
):
    # Without broadcast_buffers, seeds have to be the same from the start.
    flow = flow_of(seed=0)
    hook = MergeHook(flow, every=5) if early else None
    module = DistributedDataParallel(Loss(flow), broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    hook = MergeHook(module, optimizer, every=5) if hook is None else hook
    for step in range(steps):
        rows = torch.Generator().manual_seed(2 * step + rank)
        optimizer.zero_grad()
        module(1.0 + torch.randn(8, 2, generator=rows)).backward()
        if spoil(rank, step, flow, optimizer):
            optimizer.step()
    return state_of(flow), hook.stats.merged


def ddp_equal(rank, folder):
    return ddp(rank, folder)


def ddp_broadcast(rank, folder):
    """The first process writes the buffers of the others before each step."""
    return ddp(rank, folder, broadcast_buffers=True)


def ddp_other_seeds(rank, folder):
    def spoil(rank, step, flow, optimizer):
        if step == 0 and rank == 1:
            flow.state_dict()["_transform.matrix.seed"].add_(1)
        return True

    return drifts(rank, folder, spoil, r"_transform\.matrix\.seed")


def ddp_skipped_step(rank, folder):
    # The process that is a step behind finds that the other has gone, or is told as well.
    what = "drifted apart in .*u" if rank == 0 else ""
    with pytest.raises(RuntimeError, match=what):
        ddp(rank, folder, lambda rank, step, *_: not (rank == 1 and step == 2))


def hook_before_ddp(rank, folder):
    what = "drifted apart in .*u" if rank == 0 else ""
    with pytest.raises(RuntimeError, match=what):
        ddp(rank, folder, lambda rank, step, *_: not (rank == 1 and step == 2), early=True)


def drifts(rank, folder, spoil, what):
    with pytest.raises(RuntimeError, match=rf"drifted apart in .*{what}"):
        ddp(rank, folder, spoil)
    # All of them are told: none leaves while another is on its way to the same error.
    (folder / f"told{rank}").touch()
    for _ in range(600):
        if (folder / f"told{1 - rank}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the other process was not told")


def own_flow(rank, folder):
    """Each process may as well train a flow of its own."""
    flow = flow_of(seed=rank)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    hook = MergeHook(flow, optimizer, every=5, compare_processes=False)
    for _ in range(5 + rank):
        optimizer.zero_grad()
        (-flow.log_prob(DATA[:8]).mean()).backward()
        optimizer.step()
    assert hook.stats.merged == 4


def zero_redundancy(rank, folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    flow = flow_of(0)
    optimizer = ZeroRedundancyOptimizer(flow.parameters(), torch.optim.Adam)
    with pytest.raises(TypeError, match="ZeroRedundancyOptimizer keeps the state of u and v"):
        MergeHook(flow, optimizer)


def sharded(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # where it was before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard

    layer = P4InvTransform(4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match="matrix is sharded"):
        MergeHook(layer)


def join(rank, folder):
    from torch.distributed.algorithms.join import Join

    flow = flow_of(0)
    module = DistributedDataParallel(Loss(flow))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    MergeHook(module, optimizer, every=2)
    with pytest.raises(RuntimeError, match="Join lets some processes stop"), Join([module]):
        for _ in range(2):
            module(DATA[:8]).backward()
            optimizer.step()


def _process(rank, ranks, folder, task):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    try:
        outcome = task(rank, folder), None
    except BaseException:
        outcome = None, traceback.format_exc()
    (folder / f"rank{rank}").write_bytes(pickle.dumps(outcome))
    # Not by dist.destroy_process_group: where a process failed, the others would wait. And not past
    # the interpreter's end, where gloo's threads now and then abort.
    sys.stderr.flush()
    os._exit(0)


def run(task, folder, ranks=2):
    """What each process returned."""
    (folder / "store").unlink(missing_ok=True)
    multiprocessing.spawn(_process, (ranks, folder, task), nprocs=ranks)
    found = [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(ranks)]
    for _, error in found:
        assert error is None, error
    return [value for value, _ in found]


def assert_same(states):
    first, *others = states
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name


def refusals(rank, folder):
    for task in (own_flow, zero_redundancy, sharded):
        task(rank, folder)


def test_all_ranks_end_with_the_same_numbers(tmp_path):
    (first, merged), (second, _) = run(ddp_equal, tmp_path)
    assert merged == 8
    assert_same([first, second])
    (third, _), (fourth, _) = run(ddp_broadcast, tmp_path)
    assert_same([first, third, fourth])


@pytest.mark.parametrize(
    "task", [ddp_other_seeds, ddp_skipped_step, hook_before_ddp, join, refusals]
)
def test_what_drifts_or_cannot_merge_is_an_error(task, tmp_path):
    run(task, tmp_path)
