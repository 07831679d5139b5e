"""Training by Lightning: a `LightningModule` for any flow, and `fit` for the plain case."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import math
import os
import signal
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from p4flows.arguments import check_positive_int
from p4flows.matrices import PerturbedMatrix
from p4flows.merging import AveragedModel, MergeHook

try:
    import lightning
    from lightning.fabric.utilities.warnings import PossibleUserWarning
    from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
    from lightning.pytorch.plugins.io import TorchCheckpointIO
except ImportError as error:
    raise ImportError("p4flows.lightning needs lightning: pip install 'p4flows[train]'") from error

AnyFlow = TypeVar("AnyFlow", bound=nn.Module)
FUSED_ADAM = functools.partial(torch.optim.Adam, fused=True)


def negative_log_likelihood(flow: nn.Module, batch: Any) -> Tensor:
    """Mean of −log q(x) over a batch.

    Args:
        flow: has `log_prob(inputs, context)`, or is called as `flow(context).log_prob(inputs)`.
        batch: inputs, or a tuple or list (inputs,) or (inputs, context).

    Returns:
        A differentiable scalar.
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
        schedule: of the learning rate after each step. "cosine" ends at zero; a function gets the
            optimizer and the number of steps; None keeps the rate.
        hook: True makes a `MergeHook` where the flow has P4 layers; or one of your own, or False.
        average: decay of a running average of what the layers apply, 0.999 say. Validation,
            `load_flow` and `fit` take it for the flow.

    Attributes:
        hook: the `MergeHook`, or None.

    Raises:
        FloatingPointError: from the `Trainer`, when a loss or gradient is not finite, before the
            step.

    Example:
        >>> from p4flows import bent_stacked_flow
        >>> module = FlowModule(bent_stacked_flow(2, 2), learning_rate=5e-3)
        >>> module.hook.stats.merged
        0
    """

    def __init__(
        self,
        flow: nn.Module,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = negative_log_likelihood,
        learning_rate: float = 1e-3,
        optimizer: Callable[..., Optimizer] = FUSED_ADAM,
        schedule: Literal["cosine"] | Callable[[Optimizer, int], LRScheduler] | None = "cosine",
        hook: MergeHook | bool = True,
        average: float | None = None,
    ) -> None:
        super().__init__()
        self.flow, self.loss, self.learning_rate = flow, loss, learning_rate
        self.optimizer, self.schedule = optimizer, schedule
        matrices = [each for each in flow.modules() if isinstance(each, PerturbedMatrix)]
        if hook is True and any(p.requires_grad for each in matrices for p in each.parameters()):
            hook = MergeHook(flow)
        self.hook = hook if isinstance(hook, MergeHook) else None
        self.averaged: AveragedModel | None = None
        if average is not None:
            decay = get_ema_multi_avg_fn(average)
            self.averaged = AveragedModel(flow, multi_avg_fn=decay, use_buffers=True)
            self.averaged.requires_grad_(False)
        self.total_steps = 0.0
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None
        self._sums: list[tuple[Tensor, int]] = []

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
        trained = [p for p in self.flow.parameters() if p.requires_grad]
        optimizer = self.optimizer(trained, lr=self.learning_rate)
        if self.schedule is None:
            return optimizer
        steps = self.total_steps or max(self.trainer.max_steps, 0)
        # The last resort: it starts the loaders before a checkpoint is there for them.
        steps = steps or self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError("schedule needs the number of steps: give max_steps or schedule=None")
        make = CosineAnnealingLR if self.schedule == "cosine" else self.schedule
        scheduler = make(optimizer, int(steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch; logged as "loss"."""
        self._loss = loss = self.loss(self.flow, batch)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a step that would spoil the flow."""
        every = [p.grad for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient for gradient in every if gradient is not None]
        loss = self._loss.detach()
        spoilt = torch.zeros((), device=loss.device)
        if gradients and self.trainer.scaler is None:  # a scaler skips such steps by itself
            # Its kernel: one call for all, where a norm of each would take ten times as long.
            one = torch.ones_like(spoilt)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, spoilt, one)
        # To the host together: one synchronisation a step.
        self._value, found = torch.stack([loss, spoilt.to(loss.dtype)]).tolist()
        step = self.global_step + 1
        if not math.isfinite(self._value):
            raise FloatingPointError(f"loss is {self._value} at step {step}")
        if found:
            named = [(name, p.grad) for name, p in self.flow.named_parameters()]
            name = next(n for n, g in named if g is not None and not bool(g.isfinite().all()))
            raise FloatingPointError(f"the gradient of {name} is not finite at step {step}")

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """A step, which goes into the curve and the average."""
        super().optimizer_step(*arguments, **options)
        self.losses.append(self._value)
        if self.averaged is not None:
            self.averaged.update_parameters(self.flow)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The loss of a batch; the mean over rows is logged as "validation"."""
        rows = len(batch[0] if isinstance(batch, tuple | list) else batch)
        self._sums.append((self.loss(self.evaluated, batch).detach() * rows, rows))

    def on_validation_epoch_end(self) -> None:
        """Keep the best flow."""
        losses, rows = zip(*self._sums, strict=True)
        self._sums = []
        mean = self.trainer.strategy.reduce(torch.stack(losses).sum() / sum(rows), reduce_op="mean")
        self.log("validation", mean, prog_bar=True, batch_size=1, sync_dist=True)
        value, step = float(mean), self.global_step
        if self.trainer.sanity_checking:
            return
        if not math.isfinite(value):
            raise FloatingPointError(f"validation loss is {value} at step {step}")
        if all(value < known for _, known in self.validations):
            self.best = {name: x.clone() for name, x in self.evaluated.state_dict().items()}
        self.validations.append((step, value))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the curves, the counts of merges and the best flow."""
        checkpoint["p4flows"] = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validations": self.validations,
            "best": self.best or self.evaluated.state_dict(),
            "merges": None if self.hook is None else dict(self.hook.stats),
            "standardized": any(isinstance(each, _UnitScale) for each in self.flow.modules()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what `on_save_checkpoint` added."""
        saved = checkpoint["p4flows"]
        self.losses, self.validations = saved["losses"].tolist(), list(saved["validations"])
        self.best = saved["best"] if self.validations else None


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
        found = f"FitResult(steps={self.steps}, train={self.train[-100:].mean():.4f}"
        if len(self.validation):
            best = int(self.validation.argmin())
            found += f", validation={self.validation[best]:.4f} at {self.validation_steps[best]}"
        return f"{found}, seconds={self.seconds:.1f}, stopped={self.stopped!r})"

    def plot(self, axes: Any = None) -> Any:
        """Draw the curves into axes of matplotlib, new ones by default, and return these."""
        if axes is None:
            import matplotlib.pyplot as plt

            axes = plt.figure().add_subplot()
        axes.plot(range(1, self.steps + 1), self.train, linewidth=0.5, label="train")
        axes.plot(self.validation_steps, self.validation, label="validation")
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.legend()
        return axes


class _Batches:
    """Batches of rows or of a drawing function, which follow from seed, epoch and position."""

    def __init__(self, source: Any, steps: int, batch_size: int, seed: int) -> None:
        self.source, self.steps, self.batch_size, self.seed = source, steps, batch_size, seed
        self.epoch = self.position = self.start = 0
        self.drawn: Tensor | None = None
        self.sampler = self  # Lightning calls `loader.sampler.set_epoch`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        self.random = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        rows = self.source if isinstance(self.source, tuple) else None
        if rows is not None:
            order = torch.randperm(len(rows[0]), generator=self.random).split(self.batch_size)
        if self.drawn is not None:
            self.random.set_state(self.drawn)
        start, self.start, self.drawn = self.start, 0, None
        for position in range(start, self.steps):
            self.position = position + 1
            if rows is None:
                yield self.source(self.random)
            else:
                yield tuple(part[order[position]] for part in rows)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "drawn": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.drawn = state["position"], state["drawn"]


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that are written aside, then renamed; the one before the last is kept."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch.save answers a full disk with a RuntimeError
        torch.save(checkpoint, content)
        _write(Path(path), content.getbuffer())
        if Path(path).exists():
            os.replace(path, Path(path).with_name("previous.ckpt"))
        os.replace(Path(path).with_suffix(".part"), path)


def _write(path: Path, content: Any) -> None:
    aside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        message = f"the checkpoint {path} cannot be written: {error.strerror}"
        raise OSError(error.errno, message) from error


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in a folder; None where there is nothing."""
    return _first_whole([folder / "last.ckpt", folder / "previous.ckpt"])


def _first_whole(files: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    found = [file for file in files if file.exists()]
    for file in found:
        try:
            with zipfile.ZipFile(file) as archive:  # knows checksums, which torch.load ignores
                if archive.testzip() is None:
                    return file, torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception:  # whatever it is that a torn file leads to
            pass
        warnings.warn(f"{file} is damaged: the checkpoint before it is used", stacklevel=3)
    if found:
        raise ValueError(f"{found[-1]} is damaged and has no whole checkpoint before it")
    return None


_KEPT = ("settings", "saved", "seconds", "in_epoch", "stopped", "random")


class _Keeper(Checkpoint):
    """Stops at max_steps, and writes checkpoints from which a run goes on exactly."""

    def __init__(
        self, folder: Path | None, every: int, max_steps: int | None, max_epochs: int, loader: Any
    ) -> None:
        self.folder, self.every, self.loader = folder, every, loader
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.settings: dict[str, str] = {}
        self.saved, self.seconds, self.in_epoch, self.stopped = 0, 0.0, False, ""
        self.random: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        self.random = {name: each.get_state() for name, each in self._generators().items()}
        return {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"stopped": "", "settings": self.settings})
        self._restore()

    def _generators(self) -> dict[str, torch.Generator]:
        own = getattr(self.loader, "generator", None)
        cuda = torch.cuda.default_generators if torch.cuda.is_available() else ()
        found = {"cpu": torch.default_generator, **{f"cuda{i}": g for i, g in enumerate(cuda)}}
        return found if own is None else {**found, "loader": own}

    def _restore(self) -> None:
        for name, generator in self._generators().items():
            generator.set_state(self.random[name])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begin = time.perf_counter() - self.seconds
        if self.in_epoch:  # what the loader has drawn for a new iterator does not count
            self._restore()

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        self.in_epoch = not trainer.is_last_batch
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True
        elif self.in_epoch and all(hasattr(self.loader, x) for x in ("__len__", "state_dict")):
            self._save(trainer, module, self.every)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if not trainer.should_stop and trainer.current_epoch + 1 != self.max_epochs:
            self._save(trainer, module, self.every)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        early = trainer.early_stopping_callback
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            self.stopped = f"max_steps={self.max_steps} reached"
        elif not trainer.should_stop:
            self.stopped = f"max_epochs={self.max_epochs} reached"
        elif early is not None and early.wait_count >= early.patience:
            self.stopped = f"no better validation in {early.patience} epochs"
        else:
            self.stopped = "stopped by a callback"
        self._save(trainer, module, 1)

    def _save(self, trainer: Any, module: FlowModule, every: int) -> None:
        self.seconds = time.perf_counter() - self.begin
        step = trainer.global_step
        if self.folder is None or step - self.saved < every:
            return
        for name, parameter in module.flow.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite after step {step}")
        before, self.saved = self.saved, step
        try:
            trainer.save_checkpoint(self.folder / "last.ckpt")
        except BaseException:
            self.saved = before
            raise

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if isinstance(exception, FloatingPointError):
            last = f"{self.folder}/last.ckpt (step {self.saved})" if self.saved else "there is none"
            exception.args = (f"{exception}; last good checkpoint: {last}",)


class _Bar(ProgressBar):
    """One bar for all steps."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        total = module.total_steps if math.isfinite(module.total_steps) else None
        self.bar = tqdm(total=total, initial=trainer.global_step, unit="step")

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.is_last_batch or trainer.global_step % 50 == 0:  # to draw it takes a while
            shown = {"loss": module._value, **self.get_metrics(trainer, module)}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.bar.update(trainer.global_step - self.bar.n)
        self.bar.close()


def _settings(module: FlowModule, data: Any, given: dict[str, Any]) -> dict[str, str]:
    """All that decides how a run goes on, by name."""
    found = {name: str(value) for name, value in given.items()}
    for name, tensors in data.items():
        if isinstance(tensors, tuple):
            digest = hashlib.sha256()
            for each in tensors:
                digest.update(f"{tuple(each.shape)} {each.dtype}".encode())
                digest.update(each.cpu().contiguous().view(torch.uint8).numpy())
            found[name] = f"rows {digest.hexdigest()[:8]}"
        elif tensors is not None:
            size = len(tensors) if hasattr(tensors, "__len__") else None
            rows = getattr(tensors, "batch_size", None)
            found[name] = f"{type(tensors).__name__} of {size} batches of {rows}"
    for name, tensor in module.state_dict().items():
        found[name] = f"{tuple(tensor.shape)} {tensor.dtype}"
    for name, each in module.flow.named_modules():
        options = each.extra_repr(), getattr(each, "bounds", "")
        found[f"flow.{name}"] = f"{type(each).__name__}({', '.join(map(str, options))})"
    optimizer = module.optimizer([nn.Parameter(torch.zeros(1))], lr=module.learning_rate)
    found["optimizer"], found["hook"] = type(optimizer).__name__, repr(module.hook)
    found |= {f"optimizer.{name}": repr(value) for name, value in optimizer.defaults.items()}
    found["loss"] = getattr(module.loss, "__qualname__", type(module.loss).__name__)
    found["schedule"] = getattr(module.schedule, "__qualname__", str(module.schedule))
    return found


def _rows_of(name: str, data: Any, flow: nn.Module) -> tuple[Tensor, ...] | None:
    """Rows, and context where there is one, in the precision of the flow; None for a loader."""
    parts = data if isinstance(data, tuple) else (data,)
    if not all(isinstance(part, Tensor | np.ndarray) for part in parts):
        return None
    found = [torch.as_tensor(part) for part in parts]
    if not found[0].is_floating_point():
        raise TypeError(f"{name} must have rows of a floating-point type, got {found[0].dtype}")
    if found[0].dim() < 2 or len(found[0]) < 2 or len({len(part) for part in found}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in found)
        raise ValueError(f"{name} must be rows of features, and as many of context, got {shapes}")
    if not all(bool(part.isfinite().all()) for part in found):
        raise ValueError(f"{name} must be finite, and has entries that are not")
    dtype = next(p.dtype for p in flow.parameters() if p.is_floating_point())
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in found)


class _UnitScale(PointwiseAffineTransform):
    """Takes data to mean 0 and standard deviation 1."""


def _insert(flow: nn.Module, shift: Tensor, scale: Tensor) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"standardize=True needs a Flow of nflows, got {type(flow).__name__}")
    if not any(isinstance(each, _UnitScale) for each in flow.modules()):
        flow._transform = CompositeTransform([_UnitScale(shift, scale), flow._transform])


def _to_unit_scale(flow: nn.Module, rows: Tensor, standardize: bool) -> None:
    mean, std = rows.mean(0), rows.std(0)
    far = ((std < 0.1) | (std > 10.0) | (mean.abs() > 10.0)).flatten().nonzero().flatten().tolist()
    if standardize:
        scale = 1.0 / torch.where(std > 0.0, std, torch.ones_like(std))
        _insert(flow, -mean * scale, scale)
    elif far and not any(isinstance(each, _UnitScale) for each in flow.modules()):
        named = ", ".join(map(str, far[:8])) + (", …" if len(far) > 8 else "")
        warnings.warn(
            f"data is far from unit scale in columns {named}, and flows learn slowly there: pass "
            "standardize=True, or rows of mean 0 and standard deviation 1",
            stacklevel=3,
        )


def _in_batches(data: Any) -> Any:
    """Rows in a loader, in their order."""
    if not isinstance(data, tuple):
        return data
    batches = list(zip(*(part.split(1024) for part in data), strict=True))
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _is_finished(found: Any, settings: dict[str, str], may_go_on: bool) -> bool:
    """Whether a run is done; an error where it would not go on as it was."""
    file, state = found
    kept = state["callbacks"]["_Keeper"]
    before = kept["settings"]
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    limits = {"max_steps", "max_epochs"} & set(changed)
    # At the end of an epoch, a run without a schedule does not know how long it was to be.
    if may_go_on and not (limits and kept["stopped"] and kept["in_epoch"]):
        changed = [name for name in changed if name not in limits]
    if changed:
        named = ", ".join(f"{x} was {before.get(x)} and is {settings.get(x)}" for x in changed[:4])
        raise ValueError(f"{file} cannot go on as it was: {named}; {len(changed)} differ in all")
    for name, done in (("max_steps", "global_step"), ("max_epochs", "epoch")):
        if settings[name] != "None" and state[done] >= int(settings[name]):
            return True
    return bool(kept["stopped"] and not limits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its advice, and with an interrupt that remains one."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels, handler = [each.level for each in loggers], signal.getsignal(signal.SIGINT)
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def load_flow(checkpoint: str | os.PathLike[str], flow: AnyFlow) -> AnyFlow:
    """The best flow of a run, finished or not, from its checkpoint.

    Args:
        checkpoint: the folder of `fit`, or a file that a `Trainer` wrote of a `FlowModule`.
        flow: of the same construction; its state is overwritten.

    Returns:
        The flow, in evaluation mode.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it is damaged.
    """
    path = Path(checkpoint)
    found = _first_whole([path]) if path.is_file() else _newest(path)
    if found is None:
        raise FileNotFoundError(f"{checkpoint} has no checkpoint")
    best = found[1]["p4flows"]["best"]
    if found[1]["p4flows"]["standardized"]:
        _insert(flow, *(best[f"_transform._transforms.0.{name}"] for name in ("_shift", "_scale")))
    flow.load_state_dict(best)
    return flow.eval()


def fit(
    flow: AnyFlow,
    data: Any,
    *,
    validation: Any = 0.1,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    patience: int | None = None,
    batch_size: int = 256,
    steps_per_epoch: int = 100,
    standardize: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    seed: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    logger: Any = False,
    **options: Any,
) -> tuple[AnyFlow, FitResult]:
    """Train a flow, in place and on its device.

    Args:
        flow: of nflows, normflows or zuko: see `negative_log_likelihood`.
        data: rows, a tensor or NumPy array; (rows, context); a `DataLoader` or other iterable of
            batches; or a function of a `torch.Generator` that draws a batch.
        validation: share of rows to hold out (of rows alone), or rows, (rows, context) or a
            `DataLoader`; None for none.
        max_steps: optimizer steps in all.
        max_epochs: epochs in all; 100 where neither is given.
        patience: epochs without a better validation loss after which to stop.
        batch_size: rows in a batch.
        steps_per_epoch: batches of a function that count as an epoch.
        standardize: put the affine map to mean 0 and standard deviation 1 into the flow.
        checkpoint: folder for checkpoints. A run goes on from the one that is there, and ends with
            the numbers that it would have ended with.
        checkpoint_every: steps between checkpoints. A loader without `state_dict` is saved at the
            end of an epoch.
        seed: of split and order of the rows, or of the generator; by default torch's.
        progress: whether to show a progress bar.
        callbacks: handed to the `Trainer`.
        logger: handed to the `Trainer`.
        **options: loss, learning_rate, optimizer, schedule, hook and average of `FlowModule`.

    Returns:
        The flow, in evaluation mode, as it was at the best validation loss, or at the end without
        validation; and a `FitResult`.

    Raises:
        TypeError: when data is none of these.
        ValueError: when an argument is out of range, or the run in the checkpoint would not go on
            as it was: what differs is named, and nothing overwritten.
        FloatingPointError: when a loss or gradient is not finite, before the step.
        OSError: when a checkpoint cannot be written.

    Example:
        >>> from p4flows import bent_stacked_flow
        >>> rows = torch.randn(500, 2)
        >>> flow, result = fit(bent_stacked_flow(2, 2), rows, max_steps=20, progress=False)
        >>> result.steps, result.stopped
        (20, 'max_steps=20 reached')
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("fit trains in one process: hand a FlowModule to Lightning's Trainer")
    limits = {"max_steps": max_steps, "max_epochs": max_epochs}
    given = {"patience": patience, "batch_size": batch_size, "steps_per_epoch": steps_per_epoch}
    for name, count in {**limits, **given, "checkpoint_every": checkpoint_every}.items():
        if count is not None:
            check_positive_int(name, count)
    if max_steps is not None and max_epochs is not None:
        raise ValueError("max_steps and max_epochs exclude each other: give one of them")
    folder = None if checkpoint is None else Path(checkpoint)
    found = None if folder is None else _newest(folder)
    kept = {} if found is None else found[1]["callbacks"]["_Keeper"]
    if seed is None:
        seed = int(kept["settings"]["seed"]) if kept else torch.initial_seed()

    share = validation is None or isinstance(validation, float | int)
    if share and not 0.0 <= (validation or 0.0) < 1.0:
        raise ValueError(f"validation must be a share in [0, 1), got {validation}")
    held_out = None if share else _rows_of("validation", validation, flow) or validation
    rows = _rows_of("data", data, flow)
    loader: Any = data
    if rows is not None:
        if share and validation:
            order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
            count = max(1, round(validation * len(order)))
            held_out = tuple(part[order[:count]] for part in rows)
            rows = tuple(part[order[count:]] for part in rows)
        _to_unit_scale(flow, rows[0], standardize)
        batch = min(batch_size, len(rows[0]))
        loader = _Batches(rows, len(rows[0]) // batch, batch, seed)
    elif standardize:
        raise ValueError("standardize=True needs data as rows")
    elif callable(data):
        loader = _Batches(data, steps_per_epoch, 1, seed)
    elif not hasattr(data, "__iter__") or hasattr(data, "__next__") or type(data) in (list, tuple):
        raise TypeError(
            "data must be rows, (rows, context), a DataLoader or a function of a generator, got "
            f"{type(data).__name__}"
        )
    if folder is not None and getattr(data, "persistent_workers", False):
        raise ValueError("persistent_workers=True of the DataLoader cannot be resumed exactly")
    if patience is not None and held_out is None:
        raise ValueError("patience needs validation data")

    module = FlowModule(flow, **options)
    epochs = max_epochs or (100 if max_steps is None else -1)
    length = len(loader) if hasattr(loader, "__len__") else math.inf
    module.total_steps = max_steps or epochs * length
    keeper = _Keeper(folder, checkpoint_every, max_steps, epochs, loader)
    if folder is not None:
        given |= {"standardize": standardize, "seed": seed, "average": options.get("average")}
        sources = {"data": loader if rows is None else rows, "validation": held_out}
        keeper.settings = _settings(module, sources, {**limits, **given})
        _write(folder / "last.ckpt", b"")  # or steps are lost to a disk that takes nothing
    if found is not None and _is_finished(found, keeper.settings, module.schedule is None):
        state = found[1]
        keeper.seconds, keeper.stopped = kept["seconds"], f"already at step {state['global_step']}"
    else:
        own: list[Callback] = [keeper]
        if patience is not None:
            own.append(EarlyStopping("validation", patience=patience))
        if progress and not any(isinstance(each, ProgressBar) for each in callbacks):
            own.append(_Bar())
        device = next(flow.parameters()).device
        with _quiet():
            trainer = lightning.Trainer(
                accelerator={"cuda": "gpu"}.get(device.type, device.type),
                devices=[device.index or 0] if device.type == "cuda" else 1,
                max_epochs=epochs,
                callbacks=[*callbacks, *own],
                plugins=_WholeFiles(),
                logger=logger,
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                inference_mode=False,  # what a layer keeps from a validation is used in training
            )
            flow.train()
            trainer.fit(
                module,
                loader,
                None if held_out is None else _in_batches(held_out),
                ckpt_path=None if found is None else found[0],
            )
        state = {}
        module.on_save_checkpoint(state)
        flow.to(device)
    saved = state["p4flows"]
    flow.load_state_dict(saved["best"])
    steps = torch.tensor([step for step, _ in saved["validations"]], dtype=torch.int64)
    losses = torch.tensor([loss for _, loss in saved["validations"]], dtype=torch.float64)
    end = keeper.seconds, keeper.stopped, saved["merges"]
    return flow.eval(), FitResult(saved["losses"], losses, steps, *end)
