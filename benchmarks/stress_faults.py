"""What comes from outside: signals, kills, full disks, compilers; checks of stress.py."""

import errno
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p4flows import MergeHook, P4InvTransform, bent_stacked_flow
from p4flows.lightning import fit, negative_log_likelihood

# Rows as stress.py has them: check, cases, worst, allowed.
Result = tuple[str, int, float, float]
STEPS = 60


class Interrupted(BaseException):
    pass


def interrupted_merges(interrupts: int) -> Iterator[Result | None]:
    """SIGALRM at any moment of a merge of many layers."""
    layers = nn.Sequential(*(P4InvTransform(6, rank=2) for _ in range(20)))
    hook = MergeHook(layers, torch.optim.SGD(layers.parameters(), lr=0.1), every=1)

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    handler = signal.signal(signal.SIGALRM, interrupt)
    generator = torch.Generator().manual_seed(0)
    count = wrong = attempts = 0
    try:
        while count < interrupts and attempts < 50 * interrupts:
            attempts += 1
            for layer in layers:
                layer.matrix.u.data.normal_(std=1e-2, generator=generator)
            read = [layer.matrix.dense().detach() for layer in layers]
            try:
                delay = 1e-4 + 8e-3 * torch.rand((), generator=generator).item()
                signal.setitimer(signal.ITIMER_REAL, delay)
                hook.merge()
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except Interrupted:
                count += 1
                yield None
            # An interrupt on the way out of `torch.no_grad` leaves gradients off.
            torch.set_grad_enabled(True)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            for layer, dense in zip(layers, read, strict=True):
                same = torch.allclose(layer.matrix.dense(), dense, rtol=1e-4, atol=1e-5)
                wrong += not (same and layer.matrix.error().ratio <= 30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
    yield "merges interrupted by a signal: torn matrices", count, wrong, 0


def run(seed: int, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    flow = bent_stacked_flow(2, 2)

    def sample(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(8, 2, generator=generator)

    options = {"max_steps": STEPS, "checkpoint_every": 5, "seed": seed, **arguments}
    hook = MergeHook(flow, every=3)
    return fit(flow, sample, steps_per_epoch=7, hook=hook, progress=False, **options)[1].train


def killed_fits(kills: int) -> Iterator[Result | None]:
    """SIGKILL in the middle of training, every other time while a checkpoint is written."""
    expected = run(0)
    differing = killed = 0
    for index in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            ready = Path(folder) / "ready"
            child = os.fork()
            if child == 0:
                _train_until_killed(path, ready, index)
            deadline = time.monotonic() + 60.0
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.002 * index)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
            losses = run(0, checkpoint=path)
            differing += not torch.equal(losses, expected)
        yield None
    yield "fit killed, then resumed: runs that end with other numbers", killed, differing, 0


def _train_until_killed(path: Path, ready: Path, index: int) -> None:
    """In a process of its own; tells by a file when the moment has come, and goes on."""
    try:
        save, steps = torch.save, 10 + 2 * index
        saves = 0

        def slow(*arguments: Any) -> None:
            nonlocal saves
            saves += 1
            if index % 2 and saves > index:
                ready.touch()
                time.sleep(60.0)
            save(*arguments)

        def loss(flow: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            if not index % 2:
                steps -= 1
                if steps == 0:
                    ready.touch()
                time.sleep(0.002)
            return -flow.log_prob(batch).mean()

        torch.save = slow
        loss.__qualname__ = negative_log_likelihood.__qualname__
        run(0, checkpoint=path, loss=loss)
        ready.touch()
        time.sleep(60.0)
    finally:
        os._exit(0)


def faults_of_fit() -> Iterator[Result | None]:
    """NaN gradients, flipped bits, a full disk, a folder that takes no file."""
    mishaps: list[str] = []

    def expect(happened: bool, what: str) -> None:
        if not happened:
            mishaps.append(what)

    expected = run(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"

        def broken(flow: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            value = -flow.log_prob(batch).mean()
            if any(path.glob("*.ckpt")):
                bias = flow._transform.bias
                value = value + torch.sqrt((bias - bias.detach()).abs()).sum()
            return value

        broken.__qualname__ = negative_log_likelihood.__qualname__
        expect(
            _raises(FloatingPointError, lambda: run(0, checkpoint=path, loss=broken)),
            "no error of a NaN",
        )
        expect(
            torch.equal(run(0, checkpoint=path), expected),
            "after a NaN",
        )
        yield None

        file = path / "last.ckpt"
        content = bytearray(file.read_bytes())
        numbers = torch.load(file)["state_dict"]["flow._transform.bias"].numpy().tobytes()
        content[content.index(numbers) + 3] ^= 1
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expect(
                torch.equal(run(0, checkpoint=path), expected),
                "after a flip",
            )
        expect(
            any("damaged" in str(warning.message) for warning in caught),
            "no warning of a flip",
        )
        yield None

        shutil.rmtree(path)
        save, calls = torch.save, 0

        def full(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise OSError(errno.ENOSPC, "no space left on device")
            save(*arguments)

        torch.save = full
        try:
            expect(_raises(OSError, lambda: run(0, checkpoint=path)), "no error of the disk")
        finally:
            torch.save = save
        expect(torch.equal(run(0, checkpoint=path), expected), "after a full disk")
        yield None

        (Path(folder) / "file").touch()
        unwritable = Path(folder) / "file" / "run"
        expect(
            _raises(OSError, lambda: run(0, checkpoint=unwritable)),
            "no error of the folder",
        )
    what = f" ({', '.join(mishaps)})" if mishaps else ""
    faults = "NaN gradient, flipped bit, full disk, unwritable folder"
    yield f"fit: {faults}: mishaps{what}", 4, len(mishaps), 0


def _raises(error: type[Exception], call: Any) -> bool:
    try:
        call()
    except error:
        return True
    return False


def stale_backward() -> Iterator[Result | None]:
    """A graph from before a merge is refused by autograd, not differentiated wrongly."""
    silent = 0
    for kind in ("relative", "additive"):
        layer = P4InvTransform(4, rank=2, perturbation=kind)
        layer.matrix.u.data.normal_(std=0.1)
        outputs, logabsdet = layer(torch.randn(3, 4, requires_grad=True))
        layer.matrix.merge()
        silent += not _raises(RuntimeError, (outputs.sum() + logabsdet.sum()).backward)
    yield "backward after a merge: silent ones", 2, silent, 0


def compiled(backend: str) -> Iterator[Result | None]:
    """One graph for all merges, with the numbers of eager mode."""
    flow = bent_stacked_flow(2, 2)
    torch.compiler.reset()
    log_prob = torch.compile(flow.log_prob, fullgraph=True, backend=backend)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    hook = MergeHook(flow, optimizer, every=1)
    x, worst = torch.randn(50, 2), 0.0
    for step in range(20):
        stance = "default" if step < 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            value = log_prob(x)
        worst = max(worst, (value - flow.log_prob(x)).abs().max().item())
        optimizer.zero_grad()
        (-value.mean()).backward()
        optimizer.step()
        yield None
    assert hook.stats.merged > 0
    yield f"compiled by {backend} through merges: largest difference to eager", 20, worst, 1e-4
