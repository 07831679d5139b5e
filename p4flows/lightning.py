"""Training by Lightning: a `LightningModule` for any flow, and `fit` for the plain case."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import signal
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, random_split

from p4flows.arguments import check_positive_int
from p4flows.merging import AveragedModel, MergeHook

try:
    import lightning
    from lightning.pytorch import callbacks as ready
except ImportError as error:
    raise ImportError("p4flows.lightning needs lightning: pip install 'p4flows[train]'") from error

AnyFlow = TypeVar("AnyFlow", bound=nn.Module)
# The map of `fit(standardize=True)`, in the state of a flow.
_SHIFT, _SCALE = "_transform._transforms.0._shift", "_transform._transforms.0._scale"
# Arguments of `fit` that a resumed run may change.
_OPTIONS = ("loss", "learning_rate", "optimizer", "schedule", "hook", "average")
_FREE = {"flow", "checkpoint", "checkpoint_every", "progress", "callbacks", "logger", "options"}


def negative_log_likelihood(flow: nn.Module, batch: Any) -> Tensor:
    """Mean of −log q(x) over a batch: inputs, or a tuple or list (inputs,) or (inputs, context).

    The flow has `log_prob(inputs, context)`, or is called as `flow(context).log_prob(inputs)`.
    """
    inputs, *context = batch if isinstance(batch, tuple | list) else (batch,)
    if hasattr(flow, "log_prob"):
        return -flow.log_prob(inputs, *context).mean()  # type: ignore[operator]
    return -flow(*context).log_prob(inputs).mean()


class FlowModule(lightning.LightningModule):
    """A flow in Lightning's `Trainer`, with the merges of its P4 layers.

    Args:
        flow: of nflows, normflows or zuko: see `negative_log_likelihood`.
        loss: function of (flow, batch) that returns a scalar.
        learning_rate: at the first step.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`; a fused Adam by default.
        schedule: "cosine" to zero; or a function of (optimizer, number of steps); or None.
        hook: True makes a `MergeHook` where P4 layers are trained; or your own, or False.
        average: decay of a running average of what the layers apply, such as 0.999. It is
            validated, and is what `load_flow` and `fit` return.

    Raises:
        FloatingPointError: from the `Trainer`, before a step whose loss or gradient is not finite.

    Example:
        >>> from p4flows import bent_stacked_flow
        >>> FlowModule(bent_stacked_flow(2, 2), learning_rate=5e-3).hook.stats.merged
        0
    """

    def __init__(
        self,
        flow: nn.Module,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = negative_log_likelihood,
        learning_rate: float = 1e-3,
        optimizer: Callable[..., Optimizer] | None = None,
        schedule: Any = "cosine",
        hook: MergeHook | bool = True,
        average: float | None = None,
    ) -> None:
        super().__init__()
        self.flow, self.loss, self.learning_rate = flow, loss, learning_rate
        self.schedule, self.average = schedule, average
        self.optimizer = optimizer or functools.partial(torch.optim.Adam, fused=True)
        self.hook = hook if isinstance(hook, MergeHook) else None
        if hook is True:
            with contextlib.suppress(ValueError):  # no P4 layer is trained
                self.hook = MergeHook(flow)
        self.averaged: AveragedModel | None = None
        if average is not None:
            decay = get_ema_multi_avg_fn(average)
            self.averaged = AveragedModel(flow, multi_avg_fn=decay, use_buffers=True)
            self.averaged.requires_grad_(False)
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None
        # What `fit` adds.
        self.begin, self.steps, self.stopped = time.perf_counter(), 0, ""
        self.settings: dict[str, str] = {}
        self.generator: torch.Generator | None = None
        self.random: list[Tensor] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes here which hook it calls, many times a step, and nn.Module takes long.
        if name == "_current_fx_name":
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def evaluated(self) -> nn.Module:
        """The average where there is one, else the flow."""
        return self.flow if self.averaged is None else self.averaged.module

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule, as Lightning takes them."""
        parameters = [p for p in self.flow.parameters() if p.requires_grad]
        optimizer = self.optimizer(parameters, lr=self.learning_rate)
        if self.schedule is None:
            return optimizer
        make = CosineAnnealingLR if self.schedule == "cosine" else self.schedule
        steps = self.steps or self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": make(optimizer, int(steps)), "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, logged as "loss"."""
        self._loss = loss = self.loss(self.flow, batch)
        if (self.global_step + 1) % 50 == 0:  # it takes long
            self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a step that would spoil the flow."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        loss = self._loss.detach()
        spoilt, one = torch.tensor([0.0, 1.0], device=loss.device)
        if gradients and self.trainer.scaler is None:  # a scaler skips such steps by itself
            # The kernel of a scaler: a norm of each gradient takes ten times as long.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, spoilt, one)
        # To the host together: one synchronisation a step.
        self._value, found = torch.stack([loss, spoilt.to(loss.dtype)]).tolist()
        if found or not math.isfinite(self._value):
            named = {n: p.grad for n, p in self.flow.named_parameters() if p.grad is not None}
            names = _not_finite({"loss": loss, **named})
            raise FloatingPointError(f"not finite at step {self.global_step + 1}: {names}")

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """A step, which goes into the curve and the average."""
        super().optimizer_step(*arguments, **options)
        self.losses.append(self._value)
        if self.averaged is not None:
            self.averaged.update_parameters(self.flow)

    def on_train_start(self) -> None:
        """Stop a run that has all its steps."""
        self.on_train_batch_end()
        if self.trainer.fit_loop.restarted_mid_epoch:  # a new iterator may have drawn numbers
            self._restore_random()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Stop by hand: at `Trainer(max_steps=)` it neither validates nor resumes exactly."""
        self.trainer.should_stop |= 0 < self.steps <= self.global_step

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss of a batch; the mean over rows is logged as "validation"."""
        rows = len(batch[0] if isinstance(batch, tuple | list) else batch)
        loss = self.loss(self.evaluated, batch)
        self.log("validation", loss, prog_bar=True, batch_size=rows, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Keep the best flow."""
        value = self.trainer.callback_metrics["validation"].item()
        if self.trainer.sanity_checking:
            return
        if all(value < known for _, known in self.validations):
            self.best = {name: x.clone() for name, x in self.evaluated.state_dict().items()}
        self.validations.append((self.global_step, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best flow, the curves, and the state of generators of random numbers."""
        if names := _not_finite(dict(self.flow.named_parameters())):
            raise FloatingPointError(f"not finite after step {self.global_step}: {names}")
        checkpoint["p4flows"] = {
            "best": self.best or self.evaluated.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validations": self.validations,
            "seconds": time.perf_counter() - self.begin,
            "stopped": self.stopped,
            "merges": None if self.hook is None else dict(self.hook.stats),
            "settings": self.settings,
            "random": [each.get_state() for each in self._generators()],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what `on_save_checkpoint` added."""
        saved = checkpoint["p4flows"]
        self.losses, self.validations = saved["losses"].tolist(), saved["validations"]
        self.best = saved["best"] if self.validations else None
        self.begin = time.perf_counter() - saved["seconds"]
        self.random = saved["random"]
        self._restore_random()

    def _restore_random(self) -> None:
        if self.trainer.world_size == 1:  # of several, each has its own
            for generator, state in zip(self._generators(), self.random, strict=False):
                generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        own = [] if self.generator is None else [self.generator]
        return [torch.default_generator, *own, *torch.cuda.default_generators]


def _not_finite(tensors: dict[str, Tensor]) -> str:
    return ", ".join(name for name, x in tensors.items() if not bool(x.isfinite().all()))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What `fit` has to tell of a run.

    Attributes:
        train: loss of every step, shape `(steps,)`, float64.
        validation: validation losses, shape `(validations,)`, float64.
        validation_steps: after which steps they were taken.
        seconds: wall-clock time of training, that before a resume included.
        stopped: why the run stopped.
        merges: counts of the `MergeHook`, or None.
    """

    train: Tensor
    validation: Tensor
    validation_steps: Tensor
    seconds: float
    stopped: str
    merges: dict[str, int] | None

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return len(self.train)

    def __repr__(self) -> str:
        best = f", validation={self.validation.min():.4f}" if len(self.validation) else ""
        return (
            f"FitResult(steps={self.steps}, train={self.train[-100:].mean():.4f}{best}, "
            f"seconds={self.seconds:.1f}, stopped={self.stopped!r})"
        )

    def plot(self) -> Any:
        """Draw the curves into new axes of matplotlib, and return these."""
        import matplotlib.pyplot as plt

        axes = plt.figure().add_subplot(xlabel="step", ylabel="loss (nats)")
        axes.plot(range(1, self.steps + 1), self.train, linewidth=0.5, label="train")
        axes.plot(self.validation_steps, self.validation, label="validation")
        axes.legend()
        return axes


class _Batches:
    """Batches of rows or of a drawing function; each follows from the seed and its number."""

    def __init__(self, source: Any, batch_size: int, steps: int, seed: int) -> None:
        self.source, self.batch_size, self.steps, self.seed = source, batch_size, steps, seed
        self.number = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        first = self.number - self.number % self.steps
        if not callable(self.source):
            order = torch.randperm(len(self.source[0]), generator=self._random(first))
            chosen = order.split(self.batch_size)
        for number in range(self.number, first + self.steps):
            self.number = number + 1
            if callable(self.source):
                yield self.source(self._random(number))
            else:
                yield tuple(part[chosen[number - first]] for part in self.source)

    def _random(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def _text(value: Any) -> str:
    """What two processes can compare: arrays by checksum, no addresses."""
    if isinstance(value, DataLoader):
        value = (value.batch_size, getattr(value.dataset, "tensors", value.dataset))
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Tensor | np.ndarray):
        rows = torch.as_tensor(value).cpu().contiguous()
        checksum = zlib.crc32(rows.view(torch.uint8).numpy().data)
        return f"{tuple(rows.shape)} {rows.dtype} with checksum {checksum:08x}"
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


def _as_rows(data: Any, flow: nn.Module) -> tuple[Tensor, ...] | None:
    """Rows and their context in the precision of the flow; None where data is something else."""
    parts = data if isinstance(data, tuple) else (data,)
    if not all(isinstance(part, Tensor | np.ndarray) for part in parts):
        return None
    rows = tuple(map(torch.as_tensor, parts))
    if rows[0].dim() < 2 or len({len(part) for part in rows}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in rows)
        raise ValueError(f"data must be rows of features, and as many of context, got {shapes}")
    dtype = next(p.dtype for p in flow.parameters() if p.is_floating_point())
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in rows)


def _insert(flow: Any, shift: Tensor, scale: Tensor) -> None:
    affine = PointwiseAffineTransform(shift, scale)
    flow._transform = CompositeTransform([affine, flow._transform])


def _to_unit_scale(flow: nn.Module, rows: Tensor, standardize: bool) -> None:
    mean, std = rows.mean(0), rows.std(0)
    far = ((std < 0.1) | (std > 10.0) | (mean.abs() > 10.0)).flatten().nonzero().flatten().tolist()
    if standardize:
        scale = 1.0 / torch.where(std > 0.0, std, 1.0)
        _insert(flow, -mean * scale, scale)
    elif far:
        message = f"data is far from unit scale in columns {far[:8]}: pass standardize=True"
        warnings.warn(message, stacklevel=3)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its advice, and with an interrupt that remains one."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as error:  # what Lightning makes of an interrupt; it ignores the next
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    finally:
        log.setLevel(level)


def _files(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    return sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint at a path."""
    for file in [path] if path.is_file() else _files(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            if archive.testzip() is None:  # torch.load does not look at the checksums
                return file, torch.load(file, map_location="cpu", weights_only=True)
        warnings.warn(f"{file} is damaged", stacklevel=3)
    raise FileNotFoundError(f"{path} has no whole checkpoint")


def load_flow(checkpoint: str | os.PathLike[str], flow: AnyFlow) -> AnyFlow:
    """The best flow of a run, finished or not, in evaluation mode.

    Args:
        checkpoint: the folder of `fit`, or a file that a `Trainer` wrote of a `FlowModule`.
        flow: of the same construction; its state is overwritten.

    Returns:
        The flow.

    Raises:
        FileNotFoundError: when there is no checkpoint, or none that is whole.
    """
    best = _newest(Path(checkpoint))[1]["p4flows"]["best"]
    if _SHIFT in best and _SHIFT not in flow.state_dict():
        _insert(flow, best[_SHIFT], best[_SCALE])
    flow.load_state_dict(best)
    return flow.eval()


class _Saver(ready.ModelCheckpoint):
    """Keeps the newest two; within an epoch only where the loader can go on from there."""

    def __init__(self, folder: Path | None, every: int, loader: Any) -> None:
        often: Any = {"every_n_epochs": -(-every // len(loader))}
        if hasattr(loader, "state_dict"):
            often = {"every_n_train_steps": every, "save_on_train_epoch_end": False}
        kept: Any = {"monitor": "step", "mode": "max", "save_top_k": 2 if folder else 0}
        super().__init__(folder, "{step}", enable_version_counter=False, **kept, **often)

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.global_step < module.steps:  # else there is a validation to come
            super().on_train_batch_end(trainer, module, *arguments)


def fit(
    flow: AnyFlow,
    data: Any,
    *,
    validation: Any = 0.1,
    max_steps: int | None = None,
    max_epochs: int = 100,
    patience: int | None = None,
    batch_size: int = 256,
    steps_per_epoch: int = 100,
    standardize: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[lightning.Callback] = (),
    logger: Any = False,
    **options: Any,
) -> tuple[AnyFlow, FitResult]:
    """Train a flow, in place and on its device.

    Args:
        flow: of nflows, normflows or zuko: see `negative_log_likelihood`.
        data: rows, a tensor or NumPy array; (rows, context); a `DataLoader`; or a function of a
            `torch.Generator` that draws a batch.
        validation: share of rows to hold out, or rows, (rows, context) or a `DataLoader`, or None.
        max_steps: optimizer steps in all.
        max_epochs: epochs in all, where there is no max_steps.
        patience: epochs without a better validation loss after which to stop.
        batch_size: rows in a batch.
        steps_per_epoch: batches of a function that count as an epoch.
        standardize: put the affine map to mean 0 and standard deviation 1 into the flow.
        checkpoint: folder for checkpoints. A run goes on from the newest, and ends with the
            numbers that it would have ended with.
        checkpoint_every: steps between checkpoints; without `state_dict` of a `DataLoader`, they
            are written at ends of epochs.
        seed: of the split and order of rows, or of the generator.
        progress: whether to show a progress bar.
        callbacks: handed to the `Trainer`.
        logger: handed to the `Trainer`.
        **options: loss, learning_rate, optimizer, schedule, hook and average of `FlowModule`.

    Returns:
        The flow in evaluation mode, the best by validation or else the last; and a `FitResult`.

    Raises:
        TypeError: when data is none of these.
        ValueError: when an argument is out of range, or the run in the folder has another.
        FloatingPointError: when a loss or gradient is not finite, before the step.
        OSError: when a checkpoint cannot be written.

    Example:
        >>> from p4flows import bent_stacked_flow
        >>> rows = torch.randn(500, 2)
        >>> flow, result = fit(bent_stacked_flow(2, 2), rows, max_steps=20, progress=False)
        >>> result.steps, result.stopped
        (20, 'max_steps=20 reached')
    """
    given = locals()
    for name in ("max_steps", "max_epochs", "patience", "batch_size", "steps_per_epoch"):
        if given[name] is not None:
            check_positive_int(name, given[name])
    rows, held_out = _as_rows(data, flow), _as_rows(validation, flow) or validation
    if held_out is None or isinstance(held_out, float | int):
        share, held_out = float(held_out or 0.0), None
        if rows is not None and share:
            random = torch.Generator().manual_seed(seed)
            every: Any = range(len(rows[0]))
            kept, out = (part.indices for part in random_split(every, [1 - share, share], random))
            held_out = tuple(part[out] for part in rows) if out else None
            rows = tuple(part[kept] for part in rows)
    if patience and held_out is None:
        raise ValueError("patience needs validation data")
    if standardize and not (rows and isinstance(flow, Flow)):
        raise ValueError("standardize=True needs data as rows, and a Flow of nflows")
    loader = data
    if rows is not None:
        if _SHIFT not in flow.state_dict():
            _to_unit_scale(flow, rows[0], standardize)
        loader = _Batches(rows, batch_size, max(1, len(rows[0]) // batch_size), seed)
    elif callable(data):
        loader = _Batches(data, 1, steps_per_epoch, seed)
    elif not isinstance(data, DataLoader):
        raise TypeError(f"data must be rows, a DataLoader or a function, got {type(data).__name__}")
    elif checkpoint and data.persistent_workers:
        raise ValueError("persistent_workers=True of the DataLoader cannot be resumed exactly")

    module = FlowModule(flow, **options)
    module.steps = max_steps or max_epochs * len(loader)
    module.generator = getattr(data, "generator", None)
    given |= {name: getattr(module, name) for name in _OPTIONS}
    module.settings = {name: _text(value) for name, value in given.items() if name not in _FREE}
    module.settings |= {n: f"{tuple(x.shape)} {x.dtype}" for n, x in flow.state_dict().items()}
    saved: dict[str, Any] = {}
    folder = Path(checkpoint) if checkpoint else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    if folder and _files(folder):
        newest, state = _newest(folder)
        saved, now = state["p4flows"], module.settings
        before = saved["settings"]
        if changed := [n for n in {**before, **now} if before.get(n) != now.get(n)]:
            named = ", ".join(f"{n} was {before.get(n)} and is {now.get(n)}" for n in changed[:4])
            raise ValueError(f"{checkpoint} cannot go on as it was: {named}")
    if saved and saved["stopped"]:
        saved["stopped"] = f"already at step {len(saved['losses'])}"
    else:
        own: list[lightning.Callback] = [*callbacks, _Saver(folder, checkpoint_every, loader)]
        if patience:
            early: Any = {"patience": patience, "check_on_train_epoch_end": False}
            own.append(ready.EarlyStopping("validation", **early))  # before a checkpoint
        if progress and not any(isinstance(each, ready.ProgressBar) for each in callbacks):
            own.append(ready.TQDMProgressBar(refresh_rate=50))
        if isinstance(held_out, tuple):
            batches = list(zip(*(part.split(1024) for part in held_out), strict=True))
            held_out = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        device = next(flow.parameters()).device
        flow.train()
        with _quiet():
            trainer = lightning.Trainer(
                accelerator=device.type,
                devices=[device.index] if device.type == "cuda" else 1,
                max_epochs=-1,
                callbacks=own,
                logger=logger,
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                inference_mode=False,  # what a layer keeps from a validation is used in training
            )
            try:
                trainer.fit(module, loader, held_out, ckpt_path=newest if saved else None)
            except FloatingPointError as error:
                last = next(iter(_files(folder) if folder else []), "none")
                raise FloatingPointError(f"{error}; last good checkpoint: {last}") from error
            early = trainer.early_stopping_callback
            module.stopped = "stopped by a callback"
            if trainer.global_step == module.steps:
                module.stopped = f"max_steps={module.steps} reached"
            elif early is not None and early.wait_count >= early.patience:
                module.stopped = f"no better validation in {early.patience} epochs"
            if folder:
                trainer.save_checkpoint(folder / "last.ckpt")
        state = {}
        module.on_save_checkpoint(state)
        saved = state["p4flows"]
        flow.to(device)
    flow.load_state_dict(saved["best"])
    steps = torch.tensor([step for step, _ in saved["validations"]], dtype=torch.int64)
    losses = torch.tensor([loss for _, loss in saved["validations"]], dtype=torch.float64)
    end = saved["seconds"], saved["stopped"], saved["merges"]
    return flow.eval(), FitResult(saved["losses"], losses, steps, *end)
