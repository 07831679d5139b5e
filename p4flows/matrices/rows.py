"""Rows through Ã = A + u R and through Ã⁻¹, with ln|det Ã|: one formula for both perturbations.

With Z = R A⁻¹ and the capacitance G = I + Z u, of shape (k, k),

    Ã⁻¹ = A⁻¹ − A⁻¹ u T,  T = G⁻¹ Z   (equation 3),      det Ã = det G · det A   (equation 4).

Rows e enter as x, or as y − b in the inverse direction. A gradient g of the outputs gives

    Ã:    ∂e = g A + (g u) R,            ∂u =  gᵀ (e Rᵀ),
    Ã⁻¹:  ∂e = h − (h u) T,  h = g A⁻¹,  ∂u = −∂eᵀ (e Tᵀ),

and ±ln|det Ã| adds ±Zᵀ G⁻ᵀ to ∂u. Autograd finds the same numbers, and takes 1.1 times as long.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from p4flows.matrices.linear_algebra import (
    identity,
    inverse_small,
    plus_identity,
    slogdet_small,
)

Outputs = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, ...]


def through_matrix(
    rows: Tensor,
    bias: Tensor | None,
    u: Tensor,
    right: Tensor,
    left: Tensor,
    frozen: Tensor,
    logabsdet: Tensor,
) -> Outputs:
    """y = Ã x + b for rows x, and ln|det Ã| for each row, in operations that autograd knows."""
    outputs = rows @ frozen.mT + (rows @ right.mT) @ u.mT
    outputs = outputs if bias is None else outputs + bias.unsqueeze(-2)
    _, change = slogdet_small(plus_identity(left @ u))
    return outputs, for_each_row(logabsdet + change, rows)


def through_inverse(
    rows: Tensor,
    bias: Tensor | None,
    u: Tensor,
    left: Tensor,
    inverse: Tensor,
    logabsdet: Tensor,
) -> Outputs:
    """x = Ã⁻¹ (y − b) for rows y, and −ln|det Ã| for each row; arguments as `through_matrix`."""
    g = plus_identity(left @ u)
    centred = rows if bias is None else rows - bias.unsqueeze(-2)
    outputs = (centred - (centred @ left.mT) @ (u @ inverse_small(g)).mT) @ inverse.mT
    _, change = slogdet_small(g)
    return outputs, for_each_row(-(logabsdet + change), rows)


def for_each_row(logabsdet: Tensor, rows: Tensor) -> Tensor:
    """A log-determinant of shape `batch` repeated to shape `(*batch, N)`."""
    return logabsdet.unsqueeze(-1).expand(rows.shape[:-1]).contiguous()


def is_dense_cheaper(rows: int, n: int, k: int) -> bool:
    """Whether a training step by Ã itself takes no more multiplications than by its factors.

    Rows pass k columns five times, forward and backward; Ã is formed and differentiated by three
    n × n × k products and one n × n × rows.
    """
    return 3 * n * k + n * rows <= 5 * k * rows


class _Multiply(torch.autograd.Function):
    """`through_matrix` of one matrix, with one factorisation of G."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        u: Tensor,
        right: Tensor,
        left: Tensor,
        frozen: Tensor,
        logabsdet: Tensor,
    ) -> Outputs:
        """y of shape (N, n) and ln|det Ã| of shape (N,)."""
        lu, pivots, change = _factorised(left, u)
        ctx.is_dense = is_dense_cheaper(len(x), *u.shape)
        if ctx.is_dense:
            matrix = torch.addmm(frozen, u, right)
            y = F.linear(x, matrix, bias)
        else:
            passed = x @ right.mT
            y = F.linear(x, frozen, bias).addmm_(passed, u.mT)
        kept = matrix if ctx.is_dense else passed
        ctx.save_for_backward(x, u, right, left, frozen, kept, lu, pivots)
        return y, change.add_(logabsdet).expand(len(x)).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> Gradients:
        """∂x, ∂b, ∂u, ∂R and ∂Z."""
        x, u, right, left, frozen, kept, lu, pivots = ctx.saved_tensors
        needs_x, needs_bias, _, needs_right, needs_left, _, _ = ctx.needs_input_grad
        grad_bias = grad.sum(0) if needs_bias else None
        if torch.is_grad_enabled():
            outputs = through_matrix(x, None, u, right, left, frozen, lu.new_zeros(()))
            own = _differentiable(outputs, (x, u, right, left), (grad, grad_log))
            return own[0], grad_bias, *own[1:], None, None
        grad_g = _transposed_inverse(lu, pivots).mul_(grad_log.sum())
        grad_x = grad_right = None
        if ctx.is_dense:
            grad_matrix = grad.mT @ x
            grad_u = torch.addmm(left.mT @ grad_g, grad_matrix, right.mT)
            if needs_x:
                grad_x = grad @ kept
            if needs_right:
                grad_right = u.mT @ grad_matrix
        else:
            grad_u = torch.addmm(left.mT @ grad_g, grad.mT, kept)
            grad_z = grad @ u
            if needs_x:
                grad_x = torch.addmm(grad @ frozen, grad_z, right)
            if needs_right:
                grad_right = grad_z.mT @ x
        grad_left = grad_g @ u.mT if needs_left else None
        return grad_x, grad_bias, grad_u, grad_right, grad_left, None, None


class _Solve(torch.autograd.Function):
    """`through_inverse` of one matrix, with one factorisation of G."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bias: Tensor | None,
        u: Tensor,
        left: Tensor,
        inverse: Tensor,
        logabsdet: Tensor,
    ) -> Outputs:
        """x of shape (N, n) and −ln|det Ã| of shape (N,)."""
        lu, pivots, change = _factorised(left, u)
        transposed = _transposed_inverse(lu, pivots)
        factor = transposed.mT @ left
        centred = y if bias is None else y - bias
        ctx.is_dense = is_dense_cheaper(len(y), *u.shape)
        if ctx.is_dense:
            matrix = torch.addmm(inverse, inverse @ u, factor, alpha=-1)
            x = centred @ matrix.mT
        else:
            passed = centred @ factor.mT
            x = torch.addmm(centred, passed, u.mT, alpha=-1) @ inverse.mT
        kept = matrix if ctx.is_dense else passed
        ctx.save_for_backward(y, bias, u, left, inverse, kept, factor, transposed)
        return x, change.add_(logabsdet).neg_().expand(len(y)).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> Gradients:
        """∂y, ∂b, ∂u and ∂Z."""
        y, bias, u, left, inverse, kept, factor, transposed = ctx.saved_tensors
        _, needs_bias, _, needs_left, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            outputs = through_inverse(y, bias, u, left, inverse, inverse.new_zeros(()))
            own = _differentiable(outputs, (y, bias, u, left), (grad, grad_log))
            return *own, None, None
        centred = y if bias is None else y - bias
        grad_g = transposed * -grad_log.sum()
        if ctx.is_dense:
            grad_y = grad @ kept
            grad_u = torch.addmm(left.mT @ grad_g, grad_y.mT @ centred, factor.mT, alpha=-1)
        else:
            grad_z = grad @ inverse
            grad_y = torch.addmm(grad_z, grad_z @ u, factor, alpha=-1)
            grad_u = torch.addmm(left.mT @ grad_g, grad_y.mT, kept, alpha=-1)
        grad_left = None
        if needs_left:
            # Of x = A⁻¹ z, z = e − u T e.
            z = torch.addmm(centred, centred @ factor.mT, u.mT, alpha=-1)
            grad_left = torch.addmm(grad_g @ u.mT, (grad_y @ u).mT, z, alpha=-1)
        grad_bias = -grad_y.sum(0) if needs_bias else None
        return grad_y, grad_bias, grad_u, grad_left, None, None


multiply_rows: Callable[..., Outputs] = _Multiply.apply
solve_rows: Callable[..., Outputs] = _Solve.apply


def _factorised(left: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LU of G, its pivots, and ln|det G|."""
    one = identity(len(left), left.dtype, left.device)
    lu, pivots, _ = torch.linalg.lu_factor_ex(torch.addmm(one, left, u))
    return lu, pivots, lu.diagonal().abs().log().sum()


def _transposed_inverse(lu: Tensor, pivots: Tensor) -> Tensor:
    """G⁻ᵀ. MKL solves with the transposed factors faster than with the factors."""
    one = identity(len(lu), lu.dtype, lu.device)
    return torch.linalg.lu_solve(lu, pivots, one, adjoint=True)


def _differentiable(
    outputs: Outputs, inputs: tuple[Tensor | None, ...], grads: Outputs
) -> list[Tensor | None]:
    """Gradients with a graph of their own, for create_graph=True."""
    needed = [tensor is not None and tensor.requires_grad for tensor in inputs]
    wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))  # type: ignore[arg-type]
    return [next(found) if is_needed else None for is_needed in needed]
