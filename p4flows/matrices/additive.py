"""The additive perturbation R_{u,v}(A) = A + u vᵀ of the paper, with hand-written gradients.

With y = Ã x + b and the gradient g of a loss with respect to y, both directions have

    ∂x = Ãᵀ g,   ∂u = Σ g (vᵀx)ᵀ,   ∂v = Σ x (uᵀg)ᵀ,   ∂b = Σ g

where the inverse reverses the sign of the last three; ln|det Ã| adds A⁻ᵀv G⁻ᵀ to ∂u and A⁻¹u G⁻¹
to ∂v, G = I + vᵀA⁻¹u. Autograd finds the same numbers with half as many kernels again: at n = 2
kernels are all the cost, at large n each is one more pass over the batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from p4flows.matrices.linear_algebra import (
    by_columns,
    capacitance,
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


class Multiply(torch.autograd.Function):
    """Ã x + b and ln|det Ã| of each row x, from (x, b, u, v, A, A⁻¹, ln|det A|, its carry)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        frozen: Tensor,
        inverse: Tensor,
        *logabsdet: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rows and log-determinants, shapes (N, n) and (N,)."""
        columns_u, columns_v = by_columns(u), by_columns(v)
        w, g = capacitance(inverse, columns_u, columns_v)
        g_inverse, update = inverse_and_logabsdet_small(g)
        y = F.linear(x, frozen, bias).addmm_(x @ columns_v, columns_u.mT)
        ctx.save_for_backward(x, u, v, frozen, inverse, w, g_inverse)
        return y, for_each_row(logabsdet_perturbed(update, *logabsdet), x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> Gradients:
        """∂x, ∂b, ∂u and ∂v, differentiable once more."""
        x, u, v, frozen, inverse, w, g_inverse = ctx.saved_tensors
        u, v = by_columns(u), by_columns(v)
        if torch.is_grad_enabled():
            w, g_inverse = _differentiable(inverse, u, v)
        grad_y_u = grad_y @ u
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ frozen).addmm_(grad_y_u, v.mT)
        scaled = grad_log.sum() * g_inverse
        grad_u = torch.addmm(
            multiply_transposed(grad_y, x @ v), multiply_transposed(inverse, v), scaled.mT
        )
        grad_v = torch.addmm(multiply_transposed(x, grad_y_u), w, scaled)
        grad_bias = grad_y.sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, grad_u, grad_v, None, None, None, None


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
        columns_u, columns_v = by_columns(u), by_columns(v)
        w, g = capacitance(inverse, columns_u, columns_v)
        g_inverse, update = inverse_and_logabsdet_small(g)
        x = (y if bias is None else y - bias) @ inverse.mT
        x.addmm_(x @ columns_v, (w @ g_inverse).mT, alpha=-1)
        ctx.save_for_backward(x, u, v, inverse, w, g_inverse)
        return x, for_each_row(-logabsdet_perturbed(update, *logabsdet), x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log: Tensor) -> Gradients:
        """∂y, ∂b, ∂u and ∂v, differentiable once more."""
        x, u, v, inverse, w, g_inverse = ctx.saved_tensors
        u, v = by_columns(u), by_columns(v)
        if torch.is_grad_enabled():
            w, g_inverse = _differentiable(inverse, u, v)
        grad_y_u = grad_x @ (w @ g_inverse)
        grad_y = torch.addmm(grad_x, grad_y_u, v.mT, alpha=-1) @ inverse
        scaled = grad_log.sum() * g_inverse
        grad_u = -torch.addmm(
            multiply_transposed(grad_y, x @ v), multiply_transposed(inverse, v), scaled.mT
        )
        grad_v = -torch.addmm(multiply_transposed(x, grad_y_u), w, scaled)
        grad_bias = -grad_y.sum(0) if ctx.needs_input_grad[1] else None
        return grad_y, grad_bias, grad_u, grad_v, None, None, None


def _differentiable(inverse: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹u and G⁻¹ as functions of u and v, for a second derivative (create_graph=True)."""
    w, g = capacitance(inverse, u, v)
    return w, inverse_small(g)


class Additive(Perturbation):
    """R_{u,v}(A) = A + u vᵀ (equation 5): reaches all of GL(n), through det A = 0 as well."""

    name = "additive"
    layout_version = 1
    trains_v = True
    draw = "normal"
    multiply_rows = staticmethod(Multiply.apply)
    solve_rows = staticmethod(Solve.apply)

    def scale(self, size: int) -> float:
        """One: E[v vᵀ] = I."""
        return 1.0

    def right_factor(self, frozen: Tensor, v: Tensor) -> Tensor:
        """V."""
        return v

    def capacitance(self, inverse: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """G = I + vᵀA⁻¹u."""
        return capacitance(inverse, u, v)[1]

    def inverse_factors(
        self, inverse: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A⁻¹u, A⁻ᵀv and G."""
        w, g = capacitance(inverse, u, v)
        return w, multiply_transposed(inverse, v), g

    def multiply(self, x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, a: Tensor) -> Tensor:
        """A x + u (vᵀx) + b."""
        if a.dim() == 2:
            return torch.addmm(F.linear(x, a, bias), x @ v, u.mT)
        y = x @ a.mT
        y = y if bias is None else y + bias.unsqueeze(-2)
        return y + (x @ v) @ u.mT

    def solve(self, y: Tensor, u: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
        """A⁻¹y − A⁻¹u G⁻¹ vᵀA⁻¹y."""
        w, g = capacitance(inverse, u, v)
        x = y @ inverse.mT
        return x - (x @ v) @ (w @ inverse_small(g)).mT
