"""The relative perturbation R_{u,v}(A) = (I + u vᵀ) A, with hand-written gradients.

∂J/∂u at u = 0 is the relative gradient (∂J/∂A)Aᵀ seen through v (Gresele et al. 2020), which knows
neither scale nor condition of A: a step turns the outputs z = A x, not the entries of A. With
y = (I + u vᵀ) z + b, the gradient g of a loss with respect to y and G = I + vᵀu,

    ∂x = Aᵀ(I + v uᵀ) g,   ∂u = Σ g (vᵀz)ᵀ,   ∂v = Σ z (uᵀg)ᵀ,   ∂b = Σ g

where the inverse reverses the sign of the last three; ln|det Ã| adds v G⁻ᵀ to ∂u and u G⁻¹ to ∂v.
Neither the forward pass nor its gradient needs A⁻¹.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from p4flows.matrices.linear_algebra import (
    by_columns,
    identity_plus,
    inverse_and_logabsdet_small,
    inverse_small,
    multiply_transposed,
)
from p4flows.matrices.perturbation import (
    Gradients,
    Perturbation,
    for_each_row,
    logabsdet_perturbed,
)

# Adam moves every entry of u by its learning rate η, so that a step turns a matrix of n dimensions
# by η·√n·scale where signs are random, whatever the rank. Rates that suit the layers around it
# (1e-3 to 1e-2) suit a matrix of up to so many dimensions; beyond, v is shorter
# (benchmarks/learning.py).
_UNSCALED_UP_TO = 48


class Multiply(torch.autograd.Function):
    """(I + u vᵀ) A x + b and ln|det Ã| of each row, from (x, b, u, v, A, ln|det A|, its carry)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        frozen: Tensor,
        *logabsdet: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rows and log-determinants, shapes (N, n) and (N,)."""
        g_inverse, update = inverse_and_logabsdet_small(identity_plus(v, u))
        z = F.linear(x, frozen)
        z_v = z @ by_columns(v)
        y = torch.addmm(z, z_v, by_columns(u).mT)
        if bias is not None:
            y.add_(bias)
        # z is kept for the gradient of v alone, which mostly is not wanted.
        kept = z if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(x, u, v, frozen, z_v, kept, g_inverse)
        return y, for_each_row(logabsdet_perturbed(update, *logabsdet), x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> Gradients:
        """∂x, ∂b, ∂u and ∂v, differentiable once more."""
        x, u, v, frozen, z_v, z, g_inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Only with create_graph=True: as functions of x, u and v, for a second derivative.
            z = F.linear(x, frozen)
            z_v, g_inverse = z @ v, inverse_small(identity_plus(v, u))
        u, v = by_columns(u), by_columns(v)
        needs_x, needs_bias, _, needs_v = ctx.needs_input_grad[:4]
        grad_x = grad_v = None
        scaled = grad_log.sum() * g_inverse
        if needs_x or needs_v:
            grad_y_u = grad_y @ u
        if needs_x:
            grad_x = torch.addmm(grad_y, grad_y_u, v.mT) @ frozen
        if needs_v:
            grad_v = torch.addmm(multiply_transposed(z, grad_y_u), u, scaled)
        grad_u = torch.addmm(multiply_transposed(grad_y, z_v), v, scaled.mT)
        grad_bias = grad_y.sum(0) if needs_bias else None
        return grad_x, grad_bias, grad_u, grad_v, None, None, None


class MultiplyDense(torch.autograd.Function):
    """As `Multiply`, by the matrix itself: fewer operations where rows and columns are many."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        frozen: Tensor,
        *logabsdet: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rows and log-determinants, shapes (N, n) and (N,)."""
        g_inverse, update = inverse_and_logabsdet_small(identity_plus(v, u))
        right = v.mT @ frozen
        dense = torch.addmm(frozen, u, right)
        ctx.save_for_backward(x, u, v, frozen, right, dense, g_inverse)
        y = F.linear(x, dense, bias)
        return y, for_each_row(logabsdet_perturbed(update, *logabsdet), x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> Gradients:
        """∂x, ∂b, ∂u and ∂v, differentiable once more."""
        x, u, v, frozen, right, dense, g_inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Only with create_graph=True: as functions of u and v, for a second derivative.
            right, g_inverse = v.mT @ frozen, inverse_small(identity_plus(v, u))
            dense = frozen + u @ right
        needs_x, needs_bias, _, needs_v = ctx.needs_input_grad[:4]
        scaled = grad_log.sum() * g_inverse
        grad_dense = grad_y.mT @ x
        grad_u = torch.addmm(grad_dense @ right.mT, v, scaled.mT)
        grad_v = None
        if needs_v:
            grad_v = torch.addmm(frozen @ (grad_dense.mT @ u), u, scaled)
        grad_x = grad_y @ dense if needs_x else None
        grad_bias = grad_y.sum(0) if needs_bias else None
        return grad_x, grad_bias, grad_u, grad_v, None, None, None


def is_dense_cheaper(rows: int, n: int, k: int) -> bool:
    """Whether a training step takes fewer multiplications by Ã than by its factors.

    Rows pass k columns five times, forward and backward; Ã is formed and differentiated by three
    n × n × k products and one n × n × rows.
    """
    return 3 * n * k + n * rows < 5 * k * rows


def multiply_rows(
    x: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    frozen: Tensor,
    inverse: Tensor,
    *logabsdet: Tensor,
) -> tuple[Tensor, Tensor]:
    """`Perturbation.multiply_rows`: A⁻¹ is not read."""
    way = MultiplyDense if is_dense_cheaper(len(x), *u.shape) else Multiply
    return way.apply(x, bias, u, v, frozen, *logabsdet)  # type: ignore[no-untyped-call]


class Solve(torch.autograd.Function):
    """Ã⁻¹ (y − b) and −ln|det Ã| of each row y, from (y, b, u, v, A⁻¹, ln|det A|, its carry)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        inverse: Tensor,
        *logabsdet: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rows and log-determinants, shapes (N, n) and (N,)."""
        g_inverse, update = inverse_and_logabsdet_small(identity_plus(v, u))
        centred = y if bias is None else y - bias
        # Of q = (I + u vᵀ)⁻¹ (y − b), vᵀq is all that the gradient of u asks for.
        q_v = (centred @ by_columns(v)) @ g_inverse.mT
        q = torch.addmm(centred, q_v, by_columns(u).mT, alpha=-1)
        kept = q if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(y, bias, u, v, inverse, q_v, kept, g_inverse)
        return q @ inverse.mT, for_each_row(-logabsdet_perturbed(update, *logabsdet), y)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log: Tensor) -> Gradients:
        """∂y, ∂b, ∂u and ∂v, differentiable once more."""
        y, bias, u, v, inverse, q_v, q, g_inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            g_inverse = inverse_small(identity_plus(v, u))
            centred = y if bias is None else y - bias
            q_v = (centred @ v) @ g_inverse.mT
            q = centred - q_v @ u.mT
        u, v = by_columns(u), by_columns(v)
        needs_v = ctx.needs_input_grad[3]
        h = grad_x @ inverse
        grad_y = torch.addmm(h, h @ (u @ g_inverse), v.mT, alpha=-1)
        scaled = grad_log.sum() * g_inverse
        grad_u = -torch.addmm(multiply_transposed(grad_y, q_v), v, scaled.mT)
        grad_v = None
        if needs_v:
            grad_v = -torch.addmm(multiply_transposed(q, grad_y @ u), u, scaled)
        grad_bias = -grad_y.sum(0) if ctx.needs_input_grad[1] else None
        return grad_y, grad_bias, grad_u, grad_v, None, None, None


class Relative(Perturbation):
    """R_{u,v}(A) = (I + u vᵀ) A: learns most in a second.

    det Ã = 0 is a barrier of the log-determinant at any scale of A: training does not cross it.
    """

    name = "relative"
    layout_version = 2
    trains_v = False
    draw = "basis"
    multiply_rows = staticmethod(multiply_rows)
    solve_rows = staticmethod(Solve.apply)

    def scale(self, size: int) -> float:
        """min(1, √(48/n)): one learning rate serves all sizes, and the layers around as well."""
        return min(1.0, math.sqrt(_UNSCALED_UP_TO / size))

    def right_factor(self, frozen: Tensor, v: Tensor) -> Tensor:
        """Aᵀv."""
        return multiply_transposed(frozen, v)

    def capacitance(self, inverse: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """G = I + vᵀu."""
        return identity_plus(v, u)

    def inverse_factors(
        self, inverse: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A⁻¹u, v and G."""
        return inverse @ u, v, identity_plus(v, u)

    def multiply(self, x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, a: Tensor) -> Tensor:
        """z + u (vᵀz) + b with z = A x."""
        z = x @ a.mT
        y = z + (z @ v) @ u.mT
        return y if bias is None else y + bias.unsqueeze(-2)

    def solve(self, y: Tensor, u: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
        """A⁻¹(y − u G⁻¹ vᵀy)."""
        return (y - (y @ v) @ (u @ inverse_small(identity_plus(v, u))).mT) @ inverse.mT
