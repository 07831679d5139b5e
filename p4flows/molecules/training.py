"""Maximum likelihood on rows of features, for so many minutes, with checkpoints."""

import copy
import io
import math
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nflows.flows.base import Flow
from torch import Tensor
from tqdm.auto import tqdm

from p4flows import InvertibleMatrix, MergeHook

_CLIP_NORM = 100.0
_LOOKS = 50  # at the held-out rows, over a training
_LOOKED_AT = 4_000
_SAVED_EVERY = 30.0  # seconds


class Curve(NamedTuple):
    """A point of a training curve.

    Attributes:
        step: how many steps were done.
        seconds: how long they took.
        training: mean negative log-likelihood of training rows in nats.
        held_out: that of held-out rows.
    """

    step: int
    seconds: float
    training: float
    held_out: float


def train_flow(
    flow: Flow,
    rows: Tensor,
    held_out: Tensor,
    *,
    minutes: float,
    steps: int | None = None,
    batch: int = 512,
    learning_rate: float = 1e-3,
    span: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    checkpoint: Path | None = None,
    bar: tqdm | None = None,
) -> list[Curve]:
    """Train by likelihood and keep the state that held-out rows liked best.

    The learning rate falls to zero on a cosine over the minutes, or over the steps where they are
    given: a run of given steps ends with the same numbers whenever it was interrupted.

    Args:
        flow: trained in place.
        rows: features, shape `(rows, features)`.
        held_out: features that the flow is judged by.
        minutes: how long.
        steps: how many steps, instead of the minutes.
        batch: rows of a step.
        learning_rate: Adam's at the start of the cosine.
        span: which part of the cosine this training is.
        seed: of the batches.
        checkpoint: where an interrupted training stops and a later call goes on.
        bar: is advanced from 0 to 1.

    Returns:
        The training curve.

    Raises:
        FloatingPointError: when the loss is not finite.
        ValueError: when the checkpoint cannot be read.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    hook = None
    if any(isinstance(module, InvertibleMatrix) for module in flow.modules()):
        hook = MergeHook(flow, optimizer)
    generator = torch.Generator().manual_seed(seed)
    step, spent, best = 0, 0.0, math.inf
    curve: list[Curve] = []
    best_state = copy.deepcopy(flow.state_dict())
    found = load_checkpoint(checkpoint)
    if found is not None:
        flow.load_state_dict(found["flow"])
        optimizer.load_state_dict(found["optimizer"])
        if hook is not None:
            hook.load_state_dict(found["hook"])
        generator.set_state(found["generator"])
        step, spent, best = found["step"], found["spent"], found["best"]
        best_state, curve = found["best_state"], [Curve(*point) for point in found["curve"]]

    def progress() -> float:
        return step / steps if steps is not None else spent / (60.0 * minutes)

    def save() -> None:
        save_checkpoint(
            checkpoint,
            {
                "flow": flow.state_dict(),
                "optimizer": optimizer.state_dict(),
                "hook": hook.state_dict() if hook is not None else None,
                "generator": generator.get_state(),
                "step": step,
                "spent": spent,
                "best": best,
                "best_state": best_state,
                "curve": [tuple(point) for point in curve],
            },
        )

    @torch.no_grad()
    def nll(data: Tensor) -> float:
        seen = data[:: max(1, len(data) // _LOOKED_AT)]
        return -flow.log_prob(seen).mean().item()

    saved = time.perf_counter()
    flow.train()
    try:
        while progress() < 1.0:
            begin = time.perf_counter()
            place = span[0] + (span[1] - span[0]) * progress()
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * learning_rate * (1.0 + math.cos(math.pi * place))
            chosen = torch.randint(len(rows), (batch,), generator=generator)
            loss = -flow.log_prob(rows[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), _CLIP_NORM)
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step}: the generator is that of the last "
                    f"look at held-out frames; a smaller learning_rate may help"
                )
            optimizer.step()
            before = progress()
            step, spent = step + 1, spent + time.perf_counter() - begin
            if bar is not None:
                bar.update(min(progress(), 1.0) - before)
            if int(progress() * _LOOKS) > int(before * _LOOKS):
                flow.eval()
                curve.append(Curve(step, spent, nll(rows), nll(held_out)))
                flow.train()
                if bar is not None:
                    bar.set_postfix_str(
                        f"nats: training {curve[-1].training:.2f}, held out {curve[-1].held_out:.2f}"
                    )
                if curve[-1].held_out < best:
                    best, best_state = curve[-1].held_out, copy.deepcopy(flow.state_dict())
            if time.perf_counter() - saved > _SAVED_EVERY:
                save()
                saved = time.perf_counter()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        flow.eval()
        if hook is not None:
            hook.remove()
    if curve:
        flow.load_state_dict(best_state)
    return curve


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written aside and moved to its place, so that there is all of it or none.

    Args:
        file: the place; its suffix is kept.
        write: is called with the path aside.
    """
    aside = file.with_name(f"{file.stem}.part{file.suffix}")
    try:
        write(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def save_checkpoint(file: Path | None, content: dict[str, Any]) -> None:
    """Write tensors and numbers; without a file, nothing."""
    if file is not None:
        # torch answers a full disk with a RuntimeError of its own, a buffer with an OSError.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_whole(file, lambda aside: aside.write_bytes(buffer.getbuffer()))


def load_checkpoint(file: Path | None) -> dict[str, Any] | None:
    """What `save_checkpoint` has written, None where there is no file; ValueError for others."""
    if file is None or not file.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(file, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it to start anew") from error
    except Exception as error:  # pickle's own
        raise ValueError(f"{file} is no checkpoint ({error}): delete it to start anew") from error
    return found
