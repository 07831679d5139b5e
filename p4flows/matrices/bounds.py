"""MergeBounds: when a merge is accepted (paper, Appendix A)."""

import dataclasses
import math
import numbers
from typing import Self

from torch import Tensor

Interval = tuple[float, float]
_UNBOUNDED: Interval = (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class MergeBounds:
    """When a merge is accepted and where the penalty starts (paper, Appendix A).

    With G = I + vᵀA⁻¹u, a merge multiplies det A by det G. Each field is an interval (low, high).

    Args:
        update: bounds on the logarithm of each singular value of G, C⁽⁰⁾ in the paper, where G is a
            number. At rank k > 1, ln|det G| alone would pass singular values of 1e-5 and 1e5.
        logabsdet: bounds on ln|det G · det A|, C⁽¹⁾ in the paper.
        penalty_update: the penalty is zero while ln|det G| is inside.
        penalty_logabsdet: the penalty is zero while ln|det G · det A| is inside.

    The default bounds the change and leaves the determinant itself free: absolute bounds on
    ln|det A| forbid ordinary scaling in high dimensions (2·I₃₂ has 22, beyond the paper's 15.5).

    Raises:
        TypeError: when an interval is not a pair of numbers.
        ValueError: when low is not below high.

    Example:
        >>> MergeBounds.paper().logabsdet
        (-2.5, 15.5)
        >>> MergeBounds(update=(-4.0, 4.0)).logabsdet
        (-inf, inf)
    """

    update: Interval = (-6.0, 6.0)
    logabsdet: Interval = _UNBOUNDED
    penalty_update: Interval = (-2.0, 6.0)
    penalty_logabsdet: Interval = _UNBOUNDED

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            interval = getattr(self, field.name)
            if (
                not isinstance(interval, tuple)
                or len(interval) != 2
                or not all(
                    isinstance(bound, numbers.Real) and not isinstance(bound, bool)
                    for bound in interval
                )
            ):
                raise TypeError(f"{field.name} must be a pair of numbers, got {interval!r}")
            if not interval[0] < interval[1]:
                raise ValueError(f"{field.name} must have low < high, got {interval}")

    @classmethod
    def paper(cls) -> Self:
        """The constants of Appendix A."""
        return cls(
            update=(-6.0, math.inf),
            logabsdet=(-2.5, 15.5),
            penalty_update=(-2.0, 15.0),
            penalty_logabsdet=(-2.0, 15.0),
        )

    def accept(self, update: Tensor, logabsdet: Tensor) -> Tensor:
        """Where all logarithms of singular values of G and ln|det G · det A| are inside.

        Args:
            update: logarithms of the singular values of G, shape `(*batch, k)`.
            logabsdet: ln|det G · det A|, shape `batch`.

        Returns:
            Boolean tensor of shape `batch`.
        """
        return (
            ((self.update[0] <= update) & (update <= self.update[1])).all(-1)
            & (self.logabsdet[0] <= logabsdet)
            & (logabsdet <= self.logabsdet[1])
        )

    def penalty(self, update: Tensor, logabsdet: Tensor) -> Tensor:
        """g(u, v)/C_p of Appendix A: squared distances to the penalty intervals."""
        outside = (
            update - update.clamp(*self.penalty_update),
            logabsdet - logabsdet.clamp(*self.penalty_logabsdet),
        )
        return outside[0].square() + outside[1].square()
