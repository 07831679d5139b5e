"""Memory of one layer with its optimizer, measured in a process of its own.

    python benchmarks/memory.py --contestant nn.Linear --size 4096

Prints JSON, in MiB: what is held between steps (parameters, buffers, gradients, optimizer state;
counted) and what the process had at most beyond what it held before the layer was built, during
training steps with merges and during one correction (high-water mark of the kernel, Linux only).
"""

import argparse
import json
from pathlib import Path

import torch
from contestants import CONTESTANTS, negative_log_likelihood
from torch import nn

from p4flows import MergeHook, P4InvTransform

MIB = 2**20


def held(layer: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state."""
    tensors = [*layer.parameters(), *layer.buffers()]
    tensors += [p.grad for p in layer.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def status(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, size: int, batch: int) -> dict[str, float]:
    """Memory of the contestant in MiB."""
    torch.manual_seed(0)
    # The first step loads libraries and the optimizer's modules, which are not the layer's.
    train(name, torch.randn(2, 8, requires_grad=True))
    inputs = torch.randn(batch, size, requires_grad=True)
    (inputs @ torch.ones(size, 1)).sum().backward()
    before = status("VmRSS")
    layer, optimizer = train(name, inputs)
    numbers = {"held": held(layer, optimizer), "peak": status("VmHWM") - before}
    if isinstance(layer, P4InvTransform):
        forget_peak()
        layer.matrix.correct()
        numbers["peak_of_correction"] = status("VmHWM") - before
    return {key: round(value / MIB, 1) for key, value in numbers.items()}


def train(name: str, inputs: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Four steps, two of which merge."""
    size = inputs.shape[1]
    layer = CONTESTANTS[name].build(size)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-6)
    if isinstance(layer, P4InvTransform):
        MergeHook(layer, optimizer, every=2, correct_every=None)
    # The factorisation that checks the initial matrix is over.
    forget_peak()
    for _ in range(4):
        optimizer.zero_grad()
        negative_log_likelihood(*layer(inputs)).backward()
        optimizer.step()
    return layer, optimizer


def main() -> None:
    """Measure one contestant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contestant", choices=list(CONTESTANTS), required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.contestant, arguments.size, arguments.batch)))


if __name__ == "__main__":
    main()
