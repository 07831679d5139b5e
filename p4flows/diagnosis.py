"""diagnose: how right the stored inverses and log-determinants of a module are, layer by layer."""

from typing import NamedTuple

import torch
from torch import nn

from p4flows.arguments import check_module
from p4flows.matrices import MatrixError, PerturbedMatrix
from p4flows.matrices.error import CONDITION_EPS


class LayerDiagnosis(NamedTuple):
    """A row of `diagnose`.

    Attributes:
        name: where the matrix is in the module.
        kind: its class.
        size: n.
        rank: k.
        matrices: how many it holds; the error is that of the worst.
        error: a `MatrixError` of scalars.
        verdict: "right"; "correct it" where the stored numbers are off by more than rounding, which
            `correct()` mends; "ill-conditioned" where the dtype cannot carry the matrix.
    """

    name: str
    kind: str
    size: int
    rank: int
    matrices: int
    error: MatrixError
    verdict: str


def diagnose(module: nn.Module, *, show: bool = False) -> list[LayerDiagnosis]:
    """Measure how exact every perturbed matrix of a module is.

    Args:
        module: holds the matrices, at any depth.
        show: whether to print the table.

    Returns:
        A `LayerDiagnosis` for each perturbed matrix, in the module's order. Cost O(n³) each.

    Raises:
        TypeError: when it is not an nn.Module.

    Example:
        >>> from p4flows import P4InvTransform
        >>> rows = diagnose(nn.Sequential(P4InvTransform(3)), show=True)
        layer     kind              n  count     cond   |AX-I|   |XA-I|    ratio  ln|det|  verdict
        0.matrix  InvertibleMatrix  3      1  1.0e+00  0.0e+00  0.0e+00  0.0e+00  0.0e+00  right
        >>> rows[0].error.condition.item()
        1.0
    """
    check_module(module)
    rows = [
        _examine(name or type(found).__name__, found)
        for name, found in module.named_modules()
        if isinstance(found, PerturbedMatrix)
    ]
    if show:
        print(_table(rows))
    return rows


def _examine(name: str, matrix: PerturbedMatrix) -> LayerDiagnosis:
    error = matrix.error()
    dtype = matrix.frozen.dtype
    verdict = "right" if bool(error.is_right(matrix.size, dtype).all()) else "correct it"
    if not bool((error.condition * torch.finfo(dtype).eps < CONDITION_EPS).all()):
        verdict = "ill-conditioned"
    return LayerDiagnosis(
        name=name,
        kind=type(matrix).__name__,
        size=matrix.size,
        rank=matrix.rank,
        matrices=matrix.draws.numel(),
        error=error.worst(),
        verdict=verdict,
    )


def _table(rows: list[LayerDiagnosis]) -> str:
    head = ["layer", "kind", "n", "count", "cond", "|AX-I|", "|XA-I|", "ratio", "ln|det|"]
    cells = [[*head, "verdict"]]
    for row in rows:
        error = row.error
        numbers = (error.condition, error.right, error.left, error.ratio, error.logabsdet)
        shape = (str(count) for count in (row.size, row.matrices))
        measured = (f"{number.item():.1e}" for number in numbers)
        cells.append([row.name, row.kind, *shape, *measured, row.verdict])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {0, 1, len(head)}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
