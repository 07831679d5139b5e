"""What a perturbation R_{u,v} of an invertible matrix has to say of itself, and what all share."""

import abc
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from p4flows.matrices.directions import Draw
from p4flows.matrices.precision import is_autocast

Gradients = tuple[Tensor | None, ...]


class Perturbation(abc.ABC):
    """A rank-k perturbation R_{u,v}(A) whose determinant and inverse cost O(n²k).

    Whatever the kind, with a capacitance matrix G of shape (k, k),

        Ã = A + u Vᵀ,   Ã⁻¹ = A⁻¹ − W G⁻¹ Zᵀ,   det Ã = det G · det A.

    A kind says what G, V, W and Z are, and how rows go through Ã and Ã⁻¹ without forming either.
    It holds no state: arguments are those of an `InvertibleMatrix`.

    Attributes:
        name: as users write it.
        layout_version: what tells states of the kinds apart in a `state_dict`.
        trains_v: whether v is trained from the start, or only redrawn.
        draw: how v is drawn unless a `MergeHook` says otherwise.
        multiply_rows: function of (x, b, u, v, A, A⁻¹, ln|det A|, what rounding cut off of it) that
            returns Ã x + b and ln|det Ã| of each row of a single matrix, with hand-written
            gradients.
        solve_rows: function of (y, b, u, v, A⁻¹, ln|det A|, what rounding cut off of it) that
            returns Ã⁻¹ (y − b) and −ln|det Ã| of each row, likewise.
    """

    name: str
    layout_version: int
    trains_v: bool
    draw: Draw
    multiply_rows: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    solve_rows: ClassVar[Callable[..., tuple[Tensor, Tensor]]]

    @abc.abstractmethod
    def scale(self, size: int) -> float:
        """The length of v, relative to E[v vᵀ] = I."""

    @abc.abstractmethod
    def right_factor(self, frozen: Tensor, v: Tensor) -> Tensor:
        """V, shape `(*batch, n, k)`."""

    @abc.abstractmethod
    def capacitance(self, inverse: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """G, shape `(*batch, k, k)`."""

    @abc.abstractmethod
    def inverse_factors(
        self, inverse: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W and Z, shape `(*batch, n, k)`, and G, by the products that they share."""

    @abc.abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, a: Tensor) -> Tensor:
        """Ã x + b for rows x of shape `(*batch, N, n)`, in operations that autograd knows."""

    @abc.abstractmethod
    def solve(self, y: Tensor, u: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
        """Ã⁻¹ y for rows y of shape `(*batch, N, n)`, in operations that autograd knows."""


def needs_plain_operations(x: Tensor) -> bool:
    """Whether torch.compile, torch.func or autocast has to see the operations one by one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # torch has no public way to ask
        or is_autocast(x.device.type)
    )


def logabsdet_perturbed(update: Tensor, frozen: Tensor, carry: Tensor) -> Tensor:
    """ln|det Ã| from ln|det G|, ln|det A| and what rounding cut off of it."""
    return (update + carry).add_(frozen)


def for_each_row(logabsdet: Tensor, rows: Tensor) -> Tensor:
    """For `(*batch, N, n)` as `repeat`, which takes as long as three other kernels."""
    return logabsdet.unsqueeze(-1).expand(rows.shape[:-1]).contiguous()
