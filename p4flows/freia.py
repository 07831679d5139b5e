"""P4 layers as FrEIA's invertible modules."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from nflows.transforms.linear import Linear
from torch import Tensor

from p4flows.matrices import MergeBounds
from p4flows.transforms import P4InvTransform, P4OneByOneConvolution

try:
    from FrEIA.modules import InvertibleModule
except ImportError as error:
    raise ImportError("p4flows.freia needs FrEIA: pip install FrEIA") from error


class P4Module(InvertibleModule):
    """A free invertible matrix for the features of rows, or for the channels of images.

    In place of `PermuteRandom`, `HouseholderPerm` or `Fixed1x1Conv`, and trained.

    Args:
        dims_in: one shape without the batch, `[(features,)]` or `[(channels, height, width)]`.
        dims_c: shapes of conditions, which are ignored.
        rank: number of columns of u and v; None is the default of `P4InvTransform`.
        init: "identity", "reverse", a matrix, or nflows' `Linear` or `OneByOneConvolution`.
        bias: whether to add a trainable b.
        using_cache: in eval mode and without gradients, form Ã once and use one matrix product.
        bounds: when a merge is accepted.
        perturbation: "relative" or "additive"; see `P4InvTransform`.

    Attributes:
        layer: the `P4InvTransform` or `P4OneByOneConvolution`.

    Raises:
        ValueError: when there is not one input of one or three dimensions.

    Example:
        >>> import torch
        >>> from FrEIA.framework import SequenceINN
        >>> network = SequenceINN(3)
        >>> network.append(P4Module, rank=1)
        >>> outputs, logabsdet = network(torch.ones(5, 3))
        >>> outputs.shape, logabsdet.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Iterable[tuple[int, ...]] | None = None,
        *,
        rank: int | None = None,
        init: str | Tensor | Linear = "identity",
        bias: bool = True,
        using_cache: bool = False,
        bounds: MergeBounds = MergeBounds(),
        perturbation: Literal["relative", "additive"] = "relative",
    ) -> None:
        super().__init__(dims_in, dims_c)
        if len(dims_in) != 1 or len(dims_in[0]) not in (1, 3):
            raise ValueError(f"dims_in must be one shape of one or three numbers, got {dims_in}")
        kind = P4InvTransform if len(dims_in[0]) == 1 else P4OneByOneConvolution
        self.layer = kind(
            dims_in[0][0],
            rank=rank,
            init=init,
            bias=bias,
            using_cache=using_cache,
            bounds=bounds,
            perturbation=perturbation,
        )

    def forward(
        self, x_or_z: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Outputs and log-determinant of the direction asked for."""
        outputs, logabsdet = self.layer.inverse(x_or_z[0]) if rev else self.layer(x_or_z[0])
        return (outputs,), logabsdet

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes stay."""
        return input_dims
