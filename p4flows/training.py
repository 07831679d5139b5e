"""fit: the training loop that the examples share, with progress, checkpoints and exact resume."""

import copy
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from p4flows.arguments import check_positive_int
from p4flows.batches import BatchFunction, Source, source_of
from p4flows.checkpoints import previous_of, read_checkpoint, try_folder, write_checkpoint
from p4flows.matrices import InvertibleMatrix, PerturbedMatrix
from p4flows.merging.attaching import driver_of, held
from p4flows.merging.hook import MergeHook
from p4flows.merging.processes import average_gradients, spread, world

_FORMAT = 2
# Formatting the bar costs as much as a step of a small flow, so it is not done at each one.
_SHOW_EVERY = 50

Loss = Callable[[nn.Module, Any], Tensor]


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
        losses: loss of every step, without the penalty, shape `(steps,)`, float64.
        seconds: training time, that before a resume included.
    """

    losses: Tensor
    seconds: float


def negative_log_likelihood(flow: nn.Module, batch: Any) -> Tensor:
    """Mean of −log q(x), the forward KL divergence up to the entropy of the data.

    Args:
        flow: has `log_prob(inputs, context=None)`.
        batch: inputs, or a tuple or list (inputs,) or (inputs, context) as from a `DataLoader`.

    Returns:
        A differentiable scalar.
    """
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return -flow.log_prob(*arguments).mean()  # type: ignore[operator]


def fit(
    flow: nn.Module,
    batches: BatchFunction | Iterable[Any] | Tensor,
    *,
    steps: int,
    optimizer: Optimizer,
    hook: MergeHook | Literal[False] | None = None,
    penalty: float = 0.0,
    scheduler: LRScheduler | None = None,
    loss: Loss = negative_log_likelihood,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    resume: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> FitResult:
    """Train a flow for a number of gradient steps.

    Args:
        flow: the module to train; its train/eval mode is put back at the end.
        batches: a function of a `torch.Generator` that returns the next batch; an iterable of
            batches (a `DataLoader`), which is started again whenever it is exhausted; or all data
            as one tensor of rows, which are shuffled in each epoch.
        steps: number of gradient steps in all, those before a resume included.
        optimizer: trains the flow's parameters; `LBFGS` takes all its evaluations of a step from
            one batch.
        hook: the `MergeHook` of the flow; it is saved and shown, and merges by itself. None: the
            one that the flow has, or a new one where the flow has P4 layers. False: none.
        penalty: strength C_p of the hook's penalty, added to the loss.
        scheduler: learning-rate schedule, stepped after every gradient step.
        loss: function of (flow, batch) that returns a scalar; −log-likelihood by default.
        batch_size: rows of a batch, where `batches` is a tensor; over all processes together.
        generator: passed to `batches`; by default one that starts from torch's global seed.
        checkpoint: file that takes flow, optimizer, scheduler, hook and random state together. The
            one before it stays as `checkpoint.previous`; each is written aside, synchronised to the
            disk and read back against its checksum before it counts.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        resume: True continues from `checkpoint` if that file exists; a path continues from there. A
            damaged file gives way to the previous one, with a warning. The run ends with the
            numbers that an uninterrupted one would have ended with; a `DataLoader` is to shuffle by
            torch's global random state or by its own `generator`.
        progress: whether to show a progress bar with the loss and the merge counts.

    Where torch.distributed has several processes, all of them call `fit` with the flow itself, not
    wrapped: the first one's parameters are given to all, gradients are averaged, the loss is the
    mean, a hook compares the processes before each merge, and the first alone shows progress and
    writes the checkpoint, which all read. A function of a generator returns the batch of its
    process; a run goes on with another number of processes, unless batches come from an iterable.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: when steps or checkpoint_every is not an int, batches is none of these, or the
            flow is wrapped in `DistributedDataParallel`.
        ValueError: when one is not positive, the batches run out, a penalty is asked for without a
            hook, or the checkpoint is damaged, of another architecture, another optimizer, other
            settings of the hook or beyond `steps` (nothing has been overwritten then).
        FloatingPointError: when loss, penalty or a gradient is not finite, before the step is taken
            and before anything is saved.
        FileNotFoundError: when resume names a file that does not exist.
        OSError: when the checkpoint cannot be written, before the first step where the folder shows
            it.

    Example:
        >>> from p4flows import bent_stacked_flow
        >>> flow = bent_stacked_flow(2, 2)
        >>> optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
        >>> hook = MergeHook(flow, optimizer, every=10)
        >>> sample = lambda generator: torch.randn(256, 2, generator=generator)
        >>> result = fit(flow, lambda generator: sample(generator), steps=20,
        ...              optimizer=optimizer, hook=hook, progress=False)
        >>> result.losses.shape
        torch.Size([20])
    """
    for name, count in (("steps", steps), ("checkpoint_every", checkpoint_every)):
        check_positive_int(name, count)
    hook = _hook_of(flow, optimizer) if hook is None else hook or None
    if penalty != 0.0 and hook is None:
        raise ValueError("penalty needs a hook: pass hook=MergeHook(flow) of P4 layers")
    if resume is True and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the file to continue from")
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed())

    if isinstance(flow, DistributedDataParallel):
        raise TypeError("flow must not be wrapped: fit averages the gradients of processes itself")
    group = world()
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    if group is not None:
        spread(flow, group)
        generator = _common(generator, group)
        if hook is not None and hook.process_group is None:
            hook.compare(group)

    source = source_of(batches, batch_size, rank, ranks)
    run = _Run(flow, optimizer, scheduler, hook, generator, source)
    run.settings["penalty"] = penalty
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and rank == 0:
        try_folder(path)
    resumed: Path | None = None
    if not isinstance(resume, bool):
        resumed = Path(resume)
    elif resume and path is not None and (path.exists() or previous_of(path).exists()):
        resumed = path
    last_good: tuple[Path, int] | None = None
    if resumed is not None:
        last_good = run.load(resumed, steps), run.step

    was_training = flow.training
    flow.train()

    def evaluate() -> tuple[Tensor, Tensor]:
        value = objective = loss(flow, batch)
        if hook is not None and penalty != 0.0:
            objective = value + hook.penalty(penalty)
        optimizer.zero_grad()
        objective.backward()
        if group is not None:
            average_gradients(flow.parameters(), group)
        return value, objective

    begin = time.perf_counter() - run.seconds
    try:
        hidden = not progress or rank > 0
        with tqdm(total=steps, initial=run.step, disable=hidden, unit="step") as bar:
            while run.step < steps:
                batch = run.source(generator, run.step)
                number = _checked(*evaluate(), flow, optimizer, run.step, last_good, group)
                if isinstance(optimizer, LBFGS):
                    optimizer.step(lambda: evaluate()[1])
                else:
                    optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                run.losses.append(number)
                run.seconds = time.perf_counter() - begin
                bar.update()
                if run.step % _SHOW_EVERY == 0 or run.step == steps:
                    bar.set_postfix(_shown(number, hook), refresh=False)
                if path is not None and (run.step % checkpoint_every == 0 or run.step == steps):
                    if rank == 0:
                        run.save(path)
                    last_good = path, run.step
    finally:
        flow.train(was_training)
    if group is not None:
        dist.barrier(group)  # the last checkpoint is there when any of them returns
    return FitResult(torch.tensor(run.losses, dtype=torch.float64), run.seconds)


class _Run:
    """All state of a training run that a checkpoint has to hold."""

    def __init__(
        self,
        flow: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        hook: MergeHook | None,
        generator: torch.Generator,
        source: Source,
    ) -> None:
        # The source first: when it cannot go on, nothing else has been loaded yet.
        self.parts: dict[str, Any] = {"source": source, "flow": flow, "optimizer": optimizer}
        for name, part in (("scheduler", scheduler), ("hook", hook)):
            if part is not None:
                self.parts[name] = part
        self.source = source
        self.generator = generator
        self.settings = _settings(flow, hook)
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def kinds(self) -> dict[str, str]:
        return {name: type(part).__name__ for name, part in self.parts.items()}

    def save(self, path: Path) -> None:
        state = {
            "format": _FORMAT,
            "kinds": self.kinds,
            "settings": self.settings,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        write_checkpoint(path, state)

    def load(self, path: Path, steps: int) -> Path:
        """Take all parts over, or none; the file that they came from."""
        state, found = read_checkpoint(path)
        self._check(state, found, steps)
        before = {
            name: copy.deepcopy(part.state_dict())
            for name, part in self.parts.items()
            if part is not self.source
        }
        random = self.generator.get_state(), torch.get_rng_state()
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except BaseException:
            for name, kept in before.items():
                self.parts[name].load_state_dict(kept)
            self.generator.set_state(random[0])
            torch.set_rng_state(random[1])
            raise
        self.losses = state["losses"].tolist()
        self.seconds = state["seconds"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return found

    def _check(self, state: dict[str, Any], path: Path, steps: int) -> None:
        """An error before anything is overwritten when the checkpoint fits another run."""
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {state.get('format')}, expected {_FORMAT}"
            )
        if state["kinds"] != self.kinds:
            raise ValueError(f"{path} holds {state['kinds']}, this run has {self.kinds}")
        if len(state["losses"]) > steps:
            raise ValueError(f"{path} is at step {len(state['losses'])}, beyond steps={steps}")
        saved = _layout(state["parts"]["flow"])
        present = _layout(self.parts["flow"].state_dict())
        differing = sorted(
            name for name in saved.keys() | present.keys() if saved.get(name) != present.get(name)
        )
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} is of another architecture: {len(differing)} tensors differ, first "
                f"{name}: {saved.get(name)} in the file, {present.get(name)} in the flow"
            )
        groups = [len(group["params"]) for group in state["parts"]["optimizer"]["param_groups"]]
        expected = [len(group["params"]) for group in self.parts["optimizer"].param_groups]
        if groups != expected:
            raise ValueError(
                f"{path} is of another optimizer: parameter groups of {groups} parameters, "
                f"expected {expected}"
            )
        changed = [
            f"{name} was {state['settings'].get(name)!r} and is {value!r}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{path} was trained with other settings ({', '.join(changed)}): it cannot go on "
                "as it would have"
            )


def _settings(flow: nn.Module, hook: MergeHook | None) -> dict[str, Any]:
    """What decides how a run goes on and is in no state dict, by name."""
    plain = int | float | str | None
    settings = {
        f"hook.{name}": value
        for name, value in ({} if hook is None else vars(hook)).items()
        if not name.startswith("_") and isinstance(value, plain)
    }
    for name, module in flow.named_modules():
        if isinstance(module, InvertibleMatrix):
            settings[f"{name or 'flow'}.bounds"] = repr(module.bounds)
    return settings


def _common(generator: torch.Generator, group: "dist.ProcessGroup") -> torch.Generator:
    """A generator in the state that the first process has its own in."""
    state = generator.get_state()
    dist.broadcast(state, dist.get_global_rank(group, 0), group)
    common = torch.Generator(generator.device)
    common.set_state(state)
    return common


def _hook_of(flow: nn.Module, optimizer: Optimizer) -> MergeHook | None:
    """The hook that merges the flow's P4 layers in the steps of the optimizer, made if need be."""
    known = held(optimizer)
    for matrix in flow.modules():
        if isinstance(matrix, PerturbedMatrix) and any(id(p) in known for p in matrix.parameters()):
            driver = driver_of(matrix)
            if isinstance(driver, MergeHook) and driver.follows(optimizer):
                return driver
            return MergeHook(flow, optimizer)
    return None


def _layout(state_dict: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{tuple(value.shape)} {value.dtype}"
        for name, value in state_dict.items()
        if isinstance(value, Tensor)
    }


def _shown(loss: float, hook: MergeHook | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"loss": f"{loss:.4f}"}
    if hook is not None:
        # As text: tqdm would write 20000 as 2e+4.
        shown["merged"] = str(hook.stats.merged)
        shown["skipped"] = str(hook.stats.skipped)
    return shown


def _checked(
    value: Tensor,
    objective: Tensor,
    flow: nn.Module,
    optimizer: Optimizer,
    step: int,
    last_good: tuple[Path, int] | None,
    group: "dist.ProcessGroup | None",
) -> float:
    """The loss as a number; an error when it, the penalty or a gradient is not finite.

    All of them travel to the host together: one synchronisation a step.
    """
    gradients: dict[torch.device, list[Tensor]] = defaultdict(list)
    for parameters in optimizer.param_groups:
        for parameter in parameters["params"]:
            gradient = parameter.grad
            if gradient is not None:
                entries = gradient._values() if gradient.is_sparse else gradient
                gradients[gradient.device].append(entries)
    found = torch.zeros((), device=objective.device)
    for device, entries_there in gradients.items():
        # GradScaler's kernel: one call for all, where a norm of each would take ten times as long.
        found_there = torch.zeros((), device=device)
        one = torch.ones((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(entries_there, found_there, one)
        found = found + found_there.to(found.device)
    numbers = torch.stack([value.detach(), objective.detach(), found])
    if group is not None:
        # Means over the processes, so that all of them stop or none.
        dist.all_reduce(numbers, dist.ReduceOp.SUM, group)
        numbers /= dist.get_world_size(group)
    loss, total, broken = numbers.tolist()
    if not math.isfinite(total):
        raise FloatingPointError(_not_finite(f"loss is {total}", step, last_good))
    if broken:
        names = (
            name
            for name, parameter in flow.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        )
        name = next(names, "a parameter")
        raise FloatingPointError(
            _not_finite(f"the gradient of {name} is not finite", step, last_good)
        )
    return float(loss)


def _not_finite(found: str, step: int, last_good: tuple[Path, int] | None) -> str:
    advice = "there is no checkpoint"
    if last_good is not None:
        advice = f"the last good checkpoint is {last_good[0]} (step {last_good[1]})"
    return f"{found} at step {step + 1}; {advice}"
