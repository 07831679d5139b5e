"""A transform of some columns only."""

from collections.abc import Sequence

import torch
from nflows.transforms.base import Transform
from torch import Tensor

from p4flows.arguments import check_columns, check_positive_int, check_rows


class ColumnsTransform(Transform):
    """Applies a transform to some columns and leaves the others alone.

    On R^p × T^q a linear layer makes sense for the Euclidean columns alone.

    Args:
        features: n.
        columns: the columns that are transformed, in the order in which they are handed over.
        transform: an nflows `Transform` of `len(columns)` features.

    Attributes:
        transform: as given.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when columns are out of range or repeated, there is none, or the transform has
            another number of features.

    Cost: that of the transform.

    Example:
        >>> from p4flows import P4InvTransform
        >>> layer = ColumnsTransform(4, [0, 2, 3], P4InvTransform(3, init="reverse"))
        >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0].tolist()
        [[4.0, 2.0, 3.0, 1.0]]
    """

    columns: Tensor

    def __init__(self, features: int, columns: Sequence[int], transform: Transform) -> None:
        check_positive_int("features", features)
        check_columns("columns", columns, features)
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transform must be an nflows Transform, got {type(transform).__name__}"
            )
        if len(columns) == 0:
            raise ValueError("columns must name at least one column, got none")
        expected = getattr(transform, "features", len(columns))
        if expected != len(columns):
            raise ValueError(f"transform must have {len(columns)} features, got {expected}")
        super().__init__()
        self.features = features
        self.transform = transform
        self.register_buffer("columns", torch.tensor(list(columns), dtype=torch.int64))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inputs with some columns transformed.

        Args:
            inputs: shape `(N, features)`.
            context: handed to the transform.

        Returns:
            Outputs of the same shape and logabsdet of shape `(N,)`.

        Raises:
            TypeError: when the inputs are not a floating-point tensor.
            ValueError: when their shape is not `(N, features)`.
        """
        check_rows(inputs, self.features)
        outputs, logabsdet = self.transform(inputs[:, self.columns], context)
        return inputs.index_copy(1, self.columns, outputs), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same with the transform's inverse; shapes and errors as for `forward`."""
        check_rows(inputs, self.features)
        outputs, logabsdet = self.transform.inverse(inputs[:, self.columns], context)
        return inputs.index_copy(1, self.columns, outputs), logabsdet

    def extra_repr(self) -> str:
        """What the transform does not show already."""
        return f"features={self.features}, columns={self.columns.tolist()}"
