"""Maximum likelihood on rows of features, for so many minutes, with checkpoints."""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from nflows.flows.base import Flow
from torch import Tensor, nn
from tqdm.auto import tqdm

from p4flows import InvertibleMatrix, MergeHook
from p4flows.molecules.storage import load_checkpoint, save_checkpoint

_CLIP_NORM = 100.0
_LOOKS = 40  # at the held-out rows, over a training
_LOOKED_AT = 2_000
_SAVED_EVERY = 60.0  # seconds


class Curve(NamedTuple):
    """A point of a training curve: step, seconds, and the two mean negative log-likelihoods."""

    step: int
    seconds: float
    training: float
    held_out: float


class Training:
    """Adam on a cosine that ends after so many minutes or steps; keeps the best state.

    A run of given steps ends with the same numbers whether or not it was interrupted: `checkpoint`
    is written every minute, and when somebody interrupts. Each batch has noise of the data's own
    covariance, which falls with the learning rate: the flow learns no frame by heart.
    """

    def __init__(
        self,
        flow: Flow,
        rows: Tensor,
        held_out: Tensor,
        *,
        batch: int = 512,
        learning_rate: float = 1e-3,
        noise: float = 0.0,
        weight_decay: float = 0.0,
        span: tuple[float, float] = (0.0, 1.0),
        circular: tuple[int, ...] = (),
        seed: int = 0,
        checkpoint: Path | None = None,
    ) -> None:
        self.flow, self.rows, self.held_out = flow, rows, held_out
        self.batch, self.learning_rate, self.noise = batch, learning_rate, noise
        self.span, self.checkpoint = span, checkpoint
        # Of the nets alone: u and v of a P4 layer start from zero after each merge.
        nets = [m.weight for m in flow.modules() if isinstance(m, nn.Linear)]
        others = [p for p in flow.parameters() if all(p is not weight for weight in nets)]
        groups = [
            {"params": nets, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        self.hook = None
        if any(isinstance(module, InvertibleMatrix) for module in flow.modules()):
            self.hook = MergeHook(flow, self.optimizer)
        self.generator = torch.Generator().manual_seed(seed)
        self.circular = list(circular)
        # Of the circular columns as well, whose wells are narrow beside the circle.
        covariance = torch.cov(rows[:: -(-len(rows) // 50_000)].double().T)
        jitter = 1e-6 * torch.eye(len(covariance), dtype=torch.float64)
        self.spread = torch.linalg.cholesky(covariance + jitter).to(rows)
        self.step, self.seconds, self.best = 0, 0.0, math.inf
        self.best_state = copy.deepcopy(flow.state_dict())
        self.curve: list[Curve] = []
        found = load_checkpoint(checkpoint)
        if found is not None:
            flow.load_state_dict(found["flow"])
            self.optimizer.load_state_dict(found["optimizer"])
            if self.hook is not None:
                self.hook.load_state_dict(found["hook"])
            self.generator.set_state(found["generator"])
            self.step, self.seconds, self.best = found["counts"]
            self.best_state = found["best_state"]
            self.curve = [Curve(*point) for point in found["curve"]]

    def run(self, minutes: float, steps: int | None, bar: tqdm) -> list[Curve]:
        """Train until the minutes, or the steps if they are given, are over."""

        def progress() -> float:
            return self.step / steps if steps is not None else self.seconds / (60.0 * minutes)

        saved = now = time.perf_counter()
        self.flow.train()
        try:
            while (before := progress()) < 1.0:
                self._step(self.span[0] + (self.span[1] - self.span[0]) * before)
                if int(progress() * _LOOKS) > int(before * _LOOKS):
                    self.look()
                    *_, training, held_out = self.curve[-1]
                    bar.set_postfix_str(f"nats: training {training:.2f}, held out {held_out:.2f}")
                before_step, now = now, time.perf_counter()
                self.seconds += now - before_step
                bar.update(min(progress(), 1.0) - bar.n)
                if now - saved > _SAVED_EVERY:
                    self._save()
                    saved = now
            if not self.curve or self.curve[-1].step < self.step:
                self.look()
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            self.flow.eval()
            if self.hook is not None:
                self.hook.remove()
        self._save()
        self.flow.load_state_dict(self.best_state)
        return self.curve

    def choose_threads(self, most: int) -> None:
        """As many threads as make a step fastest: small nets may gain nothing, or lose."""
        seconds = {}
        rows = self.rows[: self.batch]
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            for _ in range(4):
                begin = time.perf_counter()
                self.flow.log_prob(rows).mean().backward()
                seconds[threads] = time.perf_counter() - begin
        self.optimizer.zero_grad()
        torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))

    def _step(self, place: float) -> None:
        falling = 0.5 * (1.0 + math.cos(math.pi * place))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * falling
        chosen = torch.randint(len(self.rows), (self.batch,), generator=self.generator)
        rows = self.rows[chosen]
        if self.noise:
            kicks = torch.randn(rows.shape, generator=self.generator, dtype=rows.dtype)
            rows = rows + self.noise * falling * kicks @ self.spread.T
            angles = rows[:, self.circular]
            rows[:, self.circular] = torch.remainder(angles + math.pi, 2.0 * math.pi) - math.pi
        loss = -self.flow.log_prob(rows).mean()
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}: a smaller learning_rate may help"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.flow.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def look(self) -> None:
        """Note a point of the curve, and the state if held-out rows like it best."""
        self.flow.eval()
        seen = (data[:: max(1, len(data) // _LOOKED_AT)] for data in (self.rows, self.held_out))
        values = [-self.flow.log_prob(data).mean().item() for data in seen]
        self.flow.train()
        self.curve.append(Curve(self.step, self.seconds, *values))
        if values[1] < self.best:
            self.best, self.best_state = values[1], copy.deepcopy(self.flow.state_dict())

    def _save(self) -> None:
        content = {
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hook": self.hook.state_dict() if self.hook is not None else None,
            "generator": self.generator.get_state(),
            "counts": (self.step, self.seconds, self.best),
            "best_state": self.best_state,
            "curve": [tuple(point) for point in self.curve],
        }
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, content)
