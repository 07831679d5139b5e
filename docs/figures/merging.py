"""Draws the figure of docs/merging.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from p4flows import InvertibleMatrix

SIZE, RANK, CELL = 9, 2, 1.0
COLORS = "RdBu_r"


def draw(axis: plt.Axes, matrix: torch.Tensor, left: float, name: str, note: str) -> float:
    """A matrix as coloured cells at `left`, centred on the middle line; its right edge."""
    rows, columns = matrix.shape
    bottom = -rows / 2
    extent = (left, left + columns * CELL, bottom, bottom + rows)
    axis.imshow(matrix, cmap=COLORS, vmin=-1.6, vmax=1.6, extent=extent, aspect="equal")
    axis.add_patch(Rectangle((left, bottom), columns, rows, fill=False, color="0.2", linewidth=1.0))
    middle = left + columns / 2
    axis.text(middle, bottom + rows + 0.5, name, ha="center", va="bottom", fontsize=13)
    axis.text(middle, bottom - 0.5, note, ha="center", va="top", fontsize=8, color="0.35")
    return left + columns * CELL


def sign(axis: plt.Axes, left: float, text: str) -> float:
    """A sign between two matrices."""
    axis.text(left + 0.9, 0.0, text, ha="center", va="center", fontsize=15)
    return left + 1.8


def state(axis: plt.Axes, matrix: InvertibleMatrix, title: str, *notes: str) -> None:
    """(I + u vᵀ) A, drawn from left to right, each with its note."""
    u_note, v_note, a_note = notes
    u, v = (factor.detach() for factor in matrix.factors())
    right = sign(axis, -1.8, "( I +")
    right = draw(axis, u, right + 0.6, "u", u_note)
    right = draw(axis, v.T, right + 0.5, "vᵀ", v_note)
    right = sign(axis, right, ")")
    right = draw(axis, matrix.frozen, right, "A", a_note)
    right = sign(axis, right, "=")
    right = draw(axis, matrix.dense().detach(), right, "Ã", "what the layer applies")
    axis.set(xlim=(-2.0, right + 0.5), ylim=(-7.0, 7.5), title=title)
    axis.axis("off")


def main() -> None:
    """Draw a matrix before and after its merge."""
    torch.manual_seed(3)
    matrix = InvertibleMatrix(SIZE, rank=RANK, init=0.5 * torch.randn(SIZE, SIZE) + torch.eye(SIZE))
    torch.nn.init.normal_(matrix.u, std=0.7)
    figure, axes = plt.subplots(2, 1, figsize=(9.0, 7.4), layout="constrained")
    state(axes[0], matrix, "before the merge", "trained", "frozen", "frozen")
    before = matrix.dense().detach().clone()
    matrix.merge()
    torch.testing.assert_close(matrix.dense(), before)
    state(
        axes[1],
        matrix,
        "after the merge: the same Ã",
        "zero again",
        "drawn anew",
        "has taken it up",
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
