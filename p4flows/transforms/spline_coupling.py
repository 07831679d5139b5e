"""Spline couplings on R^p × T^q, as nflows Transforms."""

import math
from collections.abc import Sequence

import torch
from nflows.transforms.base import Transform
from torch import Tensor, nn

from p4flows.arguments import (
    check_columns,
    check_context,
    check_count,
    check_positive_int,
    check_positive_ints,
    check_rows,
)
from p4flows.transforms.coupling import dense_net
from p4flows.transforms.spline import rational_quadratic


class SplineCoupling(Transform):
    """Some features are bent by splines that the others choose (Durkan et al. 2019).

    A Euclidean feature is bent within [−bound, bound] and left alone beyond. A circular one, an
    angle in [−π, π), is turned and then bent by a spline whose ends have the same slope (Rezende
    et al. 2020), so that the density has no seam; the nets see its cosine and sine.

    Args:
        features: n ≥ 2.
        transformed: the columns that are bent, not all of them.
        circular: the columns that are angles.
        hidden: widths of the hidden layers of the net.
        bins: K, bins of each spline.
        bound: in the units of the Euclidean features; five standard deviations by default.
        context_features: width of a context that the net sees as well; 0 is none.

    Attributes:
        net: from the conditioning columns to all splines; its last layer starts near zero, so that
            the coupling starts near the identity, but for the turns, which start at random.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when columns are out of range or repeated, nothing or everything is transformed,
            or a size is not positive.

    Cost: forward and inverse alike, one pass of the net, whose last layer has up to 3K + 1 outputs
    for each transformed column.

    Example:
        >>> coupling = SplineCoupling(4, transformed=[1, 3], circular=[3])
        >>> x = torch.randn(5, 4).clamp(-3.0, 3.0)
        >>> y, logabsdet = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5), logabsdet.shape
        (True, torch.Size([5]))
    """

    straight: Tensor
    turned: Tensor
    seen_straight: Tensor
    seen_turned: Tensor
    order: Tensor

    def __init__(
        self,
        features: int,
        transformed: Sequence[int],
        *,
        circular: Sequence[int] = (),
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
        context_features: int = 0,
    ) -> None:
        check_positive_int("features", features)
        check_columns("transformed", transformed, features)
        check_columns("circular", circular, features)
        if not 0 < len(transformed) < features:
            raise ValueError(
                f"transformed must be some of the {features} columns, got {len(transformed)}"
            )
        check_positive_ints("hidden", hidden)
        check_count("context_features", context_features)
        check_positive_int("bins", bins)
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}")
        super().__init__()
        self.features, self.bins, self.bound = features, bins, float(bound)
        self.context_features = context_features
        bent, angles = set(transformed), set(circular)
        # Buffers, so that a checkpoint carries the columns that were drawn at random.
        columns = {
            name: [c for c in range(features) if (c in bent) is moves and (c in angles) is turns]
            for name, moves, turns in (
                ("straight", True, False),
                ("turned", True, True),
                ("seen_straight", False, False),
                ("seen_turned", False, True),
            )
        }
        for name, values in columns.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64))
        self.sizes = [
            len(columns["straight"]) * (3 * bins - 1),
            len(columns["turned"]) * (3 * bins + 1),
        ]
        inputs = len(columns["seen_straight"]) + 2 * len(columns["seen_turned"])
        inputs += context_features
        self.net = dense_net((inputs, *hidden, sum(self.sizes)), nn.SiLU)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        last.weight.uniform_(-1e-3, 1e-3)
        last.bias.zero_()
        # Seams of the layers at different places.
        turns = last.bias[self.sizes[0] :].reshape(-1, 3 * self.bins + 1)[:, -1]
        turns.uniform_(-math.pi, math.pi)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bend.

        Args:
            inputs: shape `(N, features)`, circular columns in [−π, π).
            context: shape `(N, context_features)`; None for a coupling without.

        Returns:
            Outputs of the same shape and logabsdet of shape `(N,)`.

        Raises:
            TypeError: when inputs or context are not floating-point tensors.
            ValueError: when their shapes are others, or a context was not expected.
        """
        return self._bend(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bend back; shapes and errors as for `forward`."""
        return self._bend(inputs, context, inverse=True)

    def extra_repr(self) -> str:
        """What the net does not show."""
        return (
            f"features={self.features}, transformed={len(self.straight) + len(self.turned)}, "
            f"circular={len(self.turned) + len(self.seen_turned)}, bins={self.bins}, "
            f"bound={self.bound:g}"
        )

    def _bend(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        check_rows(inputs, self.features)
        check_context(context, inputs, self.context_features)
        angles = inputs[:, self.seen_turned]
        seen = torch.cat([inputs[:, self.seen_straight], angles.cos(), angles.sin()], -1)
        if context is not None:
            seen = torch.cat([seen, context], -1)
        on_lines, on_circles = self.net(seen).split(self.sizes, -1)
        sizes, ends, turn = self._splines(len(inputs), on_lines, on_circles)

        straight, angle = inputs[:, self.straight], inputs[:, self.turned]
        if not inverse:
            angle = wrapped(angle + turn)
        bound = self.bound
        positions = torch.cat([0.5 + straight / (2.0 * bound), 0.5 + angle / (2.0 * math.pi)], -1)
        bent, log_slope = rational_quadratic(positions, sizes, ends, inverse=inverse)
        lines = straight.shape[1]
        inside = straight.abs() < bound
        straight = torch.where(inside, (bent[:, :lines] - 0.5) * (2.0 * bound), straight)
        angle = (bent[:, lines:] - 0.5) * (2.0 * math.pi)
        if inverse:
            angle = wrapped(angle - turn)
        logabsdet = torch.where(inside, log_slope[:, :lines], 0.0).sum(-1)
        outputs = inputs.index_copy(1, self.straight, straight).index_copy(1, self.turned, angle)
        return outputs, logabsdet + log_slope[:, lines:].sum(-1)

    def _splines(
        self, rows: int, on_lines: Tensor, on_circles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised sizes and slopes of all splines, and the turns of the circles."""
        bins = self.bins
        lines = on_lines.reshape(rows, len(self.straight), 3 * bins - 1)
        circles = on_circles.reshape(rows, len(self.turned), 3 * bins + 1)
        # Brought together bin by bin, which is how they are used.
        line_sizes, inner = lines.movedim(-1, 0).split([2 * bins, bins - 1])
        circle_sizes, ends, turn = circles.movedim(-1, 0).split([2 * bins, bins, 1])
        sizes = torch.cat([line_sizes, circle_sizes], -1).unflatten(0, (2, bins))
        # Beyond the ends of a line the slope is 1; those of a circle are one point.
        one = inner.new_zeros(()).expand(1, *inner.shape[1:])
        line_ends, circle_ends = torch.cat([one, inner, one]), torch.cat([ends, ends[:1]])
        all_ends = torch.cat([line_ends, circle_ends], -1)
        return sizes.movedim((0, 1), (-2, -1)), all_ends.movedim(0, -1), turn.squeeze(0)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [−π, π).

    Args:
        angle: in radians, any shape.

    Returns:
        The same shape.

    Example:
        >>> round(wrapped(torch.tensor(4.0)).item(), 4)
        -2.2832
    """
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi
