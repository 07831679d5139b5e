"""What linear_problems.py trains: targets, methods (paper, Table 1, and beyond) and presets."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["direct", "p4inv", "inverse", "orthogonal"]
TITLES = {
    "direct": "direct",
    "p4inv": "P4Inv",
    "inverse": "inverse of P4Inv",
    "orthogonal": "OrthogonalMatrix",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a matrix is trained; N is `every`. One that will not arrive stops at `stuck_after`."""

    kind: Kind
    every: int = 1
    rank: int = 1
    draw: Literal["normal", "basis"] = "normal"
    optimizer: Literal["SGD", "Adam"] = "SGD"
    learning_rate: float = 1e-2
    penalty: float = 0.0
    paper_bounds: bool = False
    stuck_after: int | None = None

    @property
    def baseline(self) -> "Method":
        """Direct training with the same optimizer and learning rate."""
        return Method("direct", optimizer=self.optimizer, learning_rate=self.learning_rate)

    @property
    def title(self) -> str:
        parts = [TITLES[self.kind]]
        if self.kind != "direct":
            parts.append(f"N={self.every}")
        if self.rank > 1:
            parts.append(f"rank {self.rank}")
        if self.draw == "basis":
            parts.append("basis")
        if self.paper_bounds:
            parts.append("paper's bounds")
        if self.penalty:
            parts.append(f"penalty {self.penalty}")
        if (self.optimizer, self.learning_rate) != ("SGD", 1e-2):
            parts.append(f"{self.optimizer} {self.learning_rate:g}")
        return ", ".join(parts)


def positive_definite(size: int, generator: torch.Generator) -> Tensor:
    """Symmetric, with eigenvalues exp(0.3 z), z standard normal: close to 1."""
    eigenvectors = rotation(size, generator)
    eigenvalues = torch.exp(0.3 * torch.randn(size, generator=generator))
    return (eigenvectors * eigenvalues) @ eigenvectors.T


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random element of SO(n), uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    q *= r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q).sign()
    return q.float()


def minus_identity(size: int, generator: torch.Generator) -> Tensor:
    """−I; its determinant is −1 where n is odd."""
    return -torch.eye(size)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A target and the methods to reach it; of those in `panels` the eigenvalues are drawn."""

    title: str
    target: Callable[[int, torch.Generator], Tensor]
    size: int
    quick_size: int
    seeds: int
    steps: int
    methods: tuple[Method, ...]
    panels: tuple[int, ...]


ADAM = Method("direct", optimizer="Adam", learning_rate=3e-4)
P4INV_ADAM = dataclasses.replace(ADAM, kind="p4inv", every=50, rank=8)
PROBLEMS = {
    "positive_definite": Problem(
        "positive definite",
        positive_definite,
        size=32,
        quick_size=16,
        seeds=5,
        steps=40_000,
        methods=(
            Method("direct"),
            Method("p4inv"),
            Method("p4inv", every=10),
            Method("p4inv", every=50),
            Method("inverse"),
            *(Method("p4inv", every=50, rank=rank) for rank in (2, 4, 8, 16)),
            Method("p4inv", every=10, draw="basis"),
            *(Method("p4inv", every=50, rank=rank, draw="basis") for rank in (1, 2, 4, 8)),
            ADAM,
            P4INV_ADAM,
            dataclasses.replace(P4INV_ADAM, draw="basis"),
        ),
        panels=(0, 1, 4),
    ),
    "rotation": Problem(
        "rotation",
        rotation,
        size=128,
        quick_size=16,
        seeds=1,
        steps=50_000,
        methods=(
            Method("direct"),
            Method("p4inv"),
            Method("p4inv", paper_bounds=True, penalty=0.1),
            Method("inverse", stuck_after=20_000),
            *(Method("p4inv", every=50, rank=rank) for rank in (8, 16)),
            Method("p4inv", every=50, rank=8, draw="basis"),
            Method("direct", learning_rate=1e-1),
            Method("orthogonal", learning_rate=1e-1),
            Method("orthogonal", every=50, rank=8, draw="basis", learning_rate=1e-1),
        ),
        panels=(0, 1, 2, 8),
    ),
    "minus_identity": Problem(
        "−I",
        minus_identity,
        size=101,
        quick_size=15,
        seeds=1,
        steps=40_000,
        methods=(
            Method("direct"),
            Method("p4inv"),
            Method("p4inv", paper_bounds=True),
            Method("p4inv", paper_bounds=True, penalty=0.1, stuck_after=30_000),
            Method("p4inv", every=50, rank=8, draw="basis"),
        ),
        panels=(0, 1, 3),
    ),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Small or large matrices, how many seeds at most, and the loss that counts as reached."""

    small: bool
    seeds: int
    tolerance: float

    def size(self, problem: Problem) -> int:
        return problem.quick_size if self.small else problem.size

    def steps(self, problem: Problem, method: Method) -> int:
        steps = method.stuck_after or problem.steps
        return steps // 8 if self.small else steps


PRESETS = {"quick": Preset(True, 1, 1e-2), "paper": Preset(False, 5, 1e-4)}
