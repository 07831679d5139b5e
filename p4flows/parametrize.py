"""Weights of any module as perturbed matrices, through `torch.nn.utils.parametrize`."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from p4flows.arguments import check_module
from p4flows.matrices import InvertibleMatrix, MergeBounds, OrthogonalMatrix, PerturbedMatrix
from p4flows.matrices.orthogonal import nearest_orthogonal
from p4flows.matrices.precision import storage_dtype


def orthogonal(module: nn.Module, name: str = "weight", *, rank: int | None = None) -> nn.Module:
    """Make a weight an `OrthogonalMatrix`, as `torch.nn.utils.parametrizations.orthogonal` does.

    The weight starts as the orthogonal matrix nearest to its value. Build the optimizer afterwards,
    with a `MergeHook` on it.
    `torch.nn.utils.parametrize.remove_parametrizations` turns the weight into a plain one again.

    Args:
        module: holds the weight; it is changed.
        name: its name; a parameter or buffer of shape `(*batch, n, n)`. Assigning an orthogonal
            tensor to it takes that matrix over.
        rank: number k of columns of u and v; None is n up to 256, then n/16 or 64.

    Returns:
        The module.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when there is no such weight, it is not a square matrix, or has a
            parametrization already.

    Cost: reading the weight O(n²k), merge O(n²k).

    Example:
        >>> layer = orthogonal(nn.Linear(4, 4))
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-6)
        True
    """
    weight = _square_weight(module, name)
    matrix = OrthogonalMatrix(
        weight.shape[-1],
        batch_shape=tuple(weight.shape[:-2]),
        rank=rank,
        # In float32 at least: rounded to bfloat16, no matrix is orthogonal.
        init=nearest_orthogonal(weight.to(storage_dtype(weight.dtype))),
        dtype=weight.dtype,
    )
    with torch.no_grad():
        weight.copy_(matrix.frozen)
    return _register(module, name, matrix)


def invertible(
    module: nn.Module,
    name: str = "weight",
    *,
    rank: int | None = None,
    bounds: MergeBounds = MergeBounds(),
    perturbation: Literal["relative", "additive"] = "relative",
) -> nn.Module:
    """Make a weight an `InvertibleMatrix`, whose inverse and log-determinant stay at hand.

    The matrix is `module.parametrizations.weight[0]`, with `inverse()` and `slogdet()`. As for
    `orthogonal`, build the optimizer afterwards, with a `MergeHook` on it.

    Args:
        module: holds the weight; it is changed.
        name: its name; a parameter or buffer of shape `(*batch, n, n)`. Assigning an invertible
            tensor to it takes that matrix over.
        rank: number k of columns of u and v; None is n up to 64 and 8√n beyond.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive" (the paper); see `InvertibleMatrix`.

    Returns:
        The module.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when there is no such weight, it is not a square matrix, is singular to working
            precision, or has a parametrization already.

    Cost: reading the weight, its inverse or log-determinant O(n²k), merge O(n²k).

    Example:
        >>> layer = invertible(nn.Linear(4, 4))
        >>> inverse = layer.parametrizations.weight[0].inverse()
        >>> torch.allclose(layer.weight @ inverse, torch.eye(4), atol=1e-4)
        True
    """
    weight = _square_weight(module, name)
    matrix = InvertibleMatrix(
        weight.shape[-1],
        batch_shape=tuple(weight.shape[:-2]),
        rank=rank,
        init=weight,
        bounds=bounds,
        perturbation=perturbation,
    )
    return _register(module, name, matrix)


def _register(module: nn.Module, name: str, matrix: PerturbedMatrix) -> nn.Module:
    # What is frozen stays frozen.
    if not getattr(module, name).requires_grad:
        matrix.requires_grad_(False)
    return register_parametrization(module, name, matrix)


def _square_weight(module: nn.Module, name: str) -> Tensor:
    """The weight to be parametrized, checked."""
    check_module(module)
    if is_parametrized(module, name):
        raise ValueError(f"{name} must be a plain weight, got one with a parametrization")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be that of a weight of {type(module).__name__}, got {name!r}")
    if weight.dim() < 2 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"{name} must have shape (*, n, n), got {tuple(weight.shape)}")
    return weight
