"""Where `fit` has its batches from: a function, an iterable, or the rows of a tensor."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from p4flows.arguments import check_positive_int

BatchFunction = Callable[[torch.Generator], Any]


class Source(Protocol):
    """The next batch, and what a checkpoint has to know to go on."""

    def __call__(self, generator: torch.Generator, step: int) -> Any:
        """The batch of a step."""

    def state_dict(self) -> dict[str, Any]:
        """What is not in the generator."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


def source_of(
    batches: BatchFunction | Iterable[Any] | Tensor, batch_size: int, rank: int, ranks: int
) -> Source:
    """The source of one of several processes.

    Args:
        batches: as for `fit`.
        batch_size: rows of a batch from a tensor, over all processes.
        rank: of this process.
        ranks: number of processes.

    Returns:
        A `Source`.

    Raises:
        TypeError: when batches is none of these, or a tensor of another kind.
        ValueError: when a tensor has no rows, or its batches cannot be shared out evenly.
    """
    if isinstance(batches, Tensor):
        return _Rows(batches, batch_size, rank, ranks)
    if callable(batches):
        return _Function(batches, rank, ranks)
    if isinstance(batches, Iterable):
        return _Iterable(batches, ranks)
    raise TypeError(
        "batches must be a function of a generator, an iterable or a tensor of rows, got "
        f"{type(batches).__name__}"
    )


class _Function:
    """Batches from a function of a generator: the generator's state is all there is to save.

    With several processes each has a generator of its own in each step, seeded by a common seed,
    the step and the rank: a run may go on with another number of them.
    """

    def __init__(self, function: BatchFunction, rank: int, ranks: int) -> None:
        self.function, self.rank, self.ranks = function, rank, ranks
        self.seed: int | None = None

    def __call__(self, generator: torch.Generator, step: int) -> Any:
        if self.ranks == 1:
            return self.function(generator)
        if self.seed is None:
            # The generator is in the same state on all processes.
            self.seed = int(torch.randint(1 << 62, (), generator=generator))
        mixed = hash((self.seed, step, self.rank)) % (1 << 63)
        return self.function(torch.Generator(generator.device).manual_seed(mixed))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.seed is None else {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict.get("seed")


class _Rows:
    """Batches of rows in a random order, each row once in an epoch; an odd rest is left out.

    The order is common to all processes, of which each takes its share of every batch.
    """

    def __init__(self, rows: Tensor, batch_size: int, rank: int, ranks: int) -> None:
        check_positive_int("batch_size", batch_size)
        if not rows.is_floating_point():
            raise TypeError(f"batches must be a floating-point tensor, got {rows.dtype}")
        if rows.dim() < 2 or len(rows) == 0:
            raise ValueError(f"batches must have rows, shape (N, ...), got {tuple(rows.shape)}")
        self.rows = rows
        self.size = min(batch_size, len(rows))
        if self.size % ranks:
            raise ValueError(f"batch_size {self.size} cannot be shared out to {ranks} processes")
        self.share = self.size // ranks
        self.first = rank * self.share
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def __call__(self, generator: torch.Generator, step: int) -> Tensor:
        if self.position + self.size > len(self.order):
            device = generator.device
            self.order = torch.randperm(len(self.rows), generator=generator, device=device).cpu()
            self.position = 0
        begin = self.position + self.first
        self.position += self.size
        return self.rows[self.order[begin : begin + self.share].to(self.rows.device)]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["order"]) not in (0, len(self.rows)):
            raise ValueError(
                f"batches have {len(self.rows)} rows, the checkpoint's had "
                f"{len(state_dict['order'])}: resume with the same data"
            )
        self.order, self.position = state_dict["order"], state_dict["position"]


class _Iterable:
    """Batches from an iterable, again and again; resumes by replaying the epoch it was in."""

    def __init__(self, iterable: Iterable[Any], ranks: int) -> None:
        self.iterable, self.ranks = iterable, ranks
        self.iterator: Iterator[Any] | None = None
        self.position = 0
        self.epoch = -1
        self.epoch_random = self._random()

    def __call__(self, generator: torch.Generator, step: int) -> Any:
        if self.iterator is None:
            self._start_epoch()
        try:
            batch = self._next()
        except StopIteration:
            self._start_epoch()
            try:
                batch = self._next()
            except StopIteration:
                raise ValueError(
                    "batches ran out: pass an iterable that can be started again, or a function"
                ) from None
        return batch

    def _start_epoch(self) -> None:
        self.epoch += 1
        # By which torch's DistributedSampler shuffles.
        set_epoch = getattr(getattr(self.iterable, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        self.epoch_random = self._random()
        self.iterator = iter(self.iterable)
        self.position = 0

    def _random(self) -> list[Tensor]:
        """The random states that a DataLoader shuffles by: its own generator's, torch's global."""
        return [generator.get_state() for generator in self._generators()]

    def _generators(self) -> list[torch.Generator]:
        own = getattr(self.iterable, "generator", None)
        return [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]

    def _next(self) -> Any:
        assert self.iterator is not None
        batch = next(self.iterator)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "epoch_random": self.epoch_random,
            "epoch": self.epoch,
            "ranks": self.ranks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("ranks", 1)
        if before != self.ranks:
            raise ValueError(
                f"the checkpoint's batches came to {before} processes and now come to "
                f"{self.ranks}: an epoch of an iterable cannot go on so; a function or a tensor can"
            )
        for generator, state in zip(self._generators(), state_dict["epoch_random"], strict=True):
            generator.set_state(state)
        self.epoch = state_dict.get("epoch", 0) - 1
        self._start_epoch()
        for _ in range(state_dict["position"]):
            try:
                self._next()
            except StopIteration:
                raise ValueError(
                    f"batches end before the {state_dict['position']} that the checkpoint had "
                    "taken: resume with the same data"
                ) from None
