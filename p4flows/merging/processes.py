"""Several processes that train the same module: what has to be equal on all of them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from p4flows.matrices import PerturbedMatrix


def group_of(module: nn.Module | None) -> "dist.ProcessGroup | None":
    """The processes that train a module together."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    for each in () if module is None else module.modules():
        if isinstance(each, DistributedDataParallel):
            return each.process_group
    return dist.group.WORLD


def refuse_flattened(module: nn.Module) -> None:
    """An error where parameters of a module are parts of one flat tensor."""
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in module.modules()):
        raise TypeError(
            "FullyShardedDataParallel flattens u and v, and a merge needs the whole matrix: put P4 "
            "layers into its ignored_modules, or use DistributedDataParallel"
        )


def refuse_what_cannot_merge(
    matrices: Mapping[str, PerturbedMatrix], optimizer: Optimizer | None
) -> None:
    """An error where u, v or their optimizer state are not whole on each process."""
    for name, matrix in matrices.items():
        if any(hasattr(parameter, "device_mesh") for parameter in matrix.parameters()):
            raise TypeError(
                f"{name} is sharded (fully_shard, a DTensor), and a merge needs the whole matrix: "
                "leave P4 layers out by fully_shard's ignored_params, or use "
                "DistributedDataParallel"
            )
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise TypeError(
            "ZeroRedundancyOptimizer keeps the state of u and v on one process, and a merge has to "
            "change it on all: use the optimizer itself for P4 layers"
        )


def refuse_join(module: nn.Module | None) -> None:
    """An error inside torch's `Join`, where some processes step and others do not."""
    for each in () if module is None else module.modules():
        config = getattr(each, "_join_config", None)
        if isinstance(each, DistributedDataParallel) and getattr(config, "enable", False):
            raise RuntimeError(
                "Join lets some processes stop while others step, and merge: give all of them as "
                "many batches (DistributedSampler with drop_last=True)"
            )


class Comparison:
    """Whether all processes merge the same: one reduction of a few numbers for each merge.

    It goes through a group of its own, and is waited for at the next merge. A process that has
    taken a step less is late, and to wait for it at once would be to wait for ever.

    Args:
        group: the processes. All of them have to get here.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self._group: dist.ProcessGroup = dist.new_group(
            dist.get_process_group_ranks(group), use_local_synchronization=True
        )
        self._pending: tuple[Any, Tensor, list[str]] | None = None

    @torch.no_grad()
    def start(self, matrices: Mapping[str, PerturbedMatrix], steps: int) -> None:
        """Look at the comparison before, and start the next one."""
        self.finish()
        device = next(iter(matrices.values())).frozen.device
        names = ["the count of steps"]
        rows = [torch.tensor(float(steps), dtype=torch.float64, device=device)]
        for name, matrix in matrices.items():
            for part in ("u", "v", "frozen", "seed"):
                names.append(f"{name}.{part}")
                rows.append(_fingerprint(getattr(matrix, part)))
        # NaN would be equal to nothing, on the process that has it too.
        own = torch.nan_to_num(torch.stack(rows), nan=-1.0, posinf=-2.0, neginf=-3.0)
        extremes = torch.stack([own, -own])
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, self._group, async_op=True)
        self._pending = work, extremes, names

    def close(self) -> None:
        """Destroy the group."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def finish(self) -> None:
        """Wait for the comparison that was started."""
        if self._pending is None:
            return
        (work, extremes, names), self._pending = self._pending, None
        work.wait()
        spreads = (extremes[0] + extremes[1]).tolist()
        differing = [name for name, off in zip(names, spreads, strict=True) if off]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise RuntimeError(
                f"processes have drifted apart in {', '.join(differing[:3])}{more}: give each the "
                "same state at the start, average gradients in every step, and skip a step on all "
                "or on none"
            )


def _fingerprint(tensor: Tensor) -> Tensor:
    """A number that two tensors share when they are equal, and hardly otherwise."""
    flat = tensor.detach().flatten()
    if not flat.is_floating_point():
        # Halves of an int64, each of which a double holds exactly.
        flat = torch.cat([flat >> 32, flat & 0xFFFFFFFF])
    flat = flat.double()
    weights = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    return torch.dot(flat, torch.sin(weights))
