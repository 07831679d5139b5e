"""P4 layers as FrEIA's invertible modules."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

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
        **options: those of `P4InvTransform`.

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
        **options: Any,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if len(dims_in) != 1 or len(dims_in[0]) not in (1, 3):
            raise ValueError(f"dims_in must be one shape of one or three numbers, got {dims_in}")
        kind = P4InvTransform if len(dims_in[0]) == 1 else P4OneByOneConvolution
        self.layer = kind(dims_in[0][0], **options)

    def forward(
        self, x_or_z: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Outputs and log-determinant of the direction asked for."""
        outputs, logabsdet = self.layer.inverse(x_or_z[0]) if rev else self.layer(x_or_z[0])
        return (outputs,), logabsdet

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes stay."""
        return input_dims
