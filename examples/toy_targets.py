"""Two-dimensional targets with known densities, the data of the paper's Figure 5.

Geometry and scale are those of the toy data of FFJORD (Grathwohl et al., arXiv:1810.01367). Rows
are independent: where those data have a fixed number of points on each component and evenly spaced
positions on it, components are drawn with equal probability and positions are uniform here. With
the entropy H of a target a negative log-likelihood L in nats becomes KL(target ‖ model) = L − H.

Densities are exact: in closed form (checkerboard, eight gaussians, circles, rings), as a sum over
preimages (pinwheel), or as a quadrature along the curve that the noise blurs (moons, swiss roll,
two spirals), whose error in the log-density is below 1e-11 in [−4, 4]² and 2e-7 in [−8, 8]². The
pinwheel's is −inf for `|x| > 8`, where its probability is 1e-23.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from p4flows.arguments import check_rows

# Rows whose log-density is computed at once, so that a quadrature takes some 50 MB at most.
_CHUNK = 1024


class _Source:
    """Random numbers in float64, all from one generator."""

    def __init__(
        self, generator: torch.Generator | None, device: torch.device | str | None
    ) -> None:
        self._generator = generator
        self._device = generator.device if generator is not None else device

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(
            shape, generator=self._generator, dtype=torch.float64, device=self._device
        )

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(
            shape, generator=self._generator, dtype=torch.float64, device=self._device
        )

    def integers(self, count: int, n: int) -> Tensor:
        """Uniform in 0..count-1."""
        return torch.randint(count, (n,), generator=self._generator, device=self._device)


@dataclass(frozen=True)
class Target:
    """A distribution on the plane to learn.

    Args:
        name: its key in `TARGETS`.
        draw: gives n independent points of shape (n, 2) from a source of random numbers.
        density: maps float64 points (N, 2) to log-densities (N,); None where it is not known.
        entropy: differential entropy in nats; None where it is not known.
        limits: half the side of a square about the origin that holds the picture.

    Example:
        >>> target = TARGETS["eight_gaussians"]
        >>> x = target.sample(5, torch.Generator().manual_seed(0))
        >>> x.shape, target.log_density(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    name: str
    draw: Callable[[_Source, int], Tensor] = field(repr=False)
    density: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    entropy: float | None = None
    limits: float = 4.0

    @property
    def has_log_density(self) -> bool:
        """Whether `log_density` is known."""
        return self.density is not None

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Independent points.

        Args:
            n: number of points, may be 0.
            generator: source of all randomness; torch's default one if None. The same seed gives
                the same points in every dtype, up to rounding.
            dtype: torch's default dtype if None.
            device: the device of the generator if None, torch's default device without one.

        Returns:
            Tensor of shape (n, 2).

        Raises:
            TypeError: when n is not an int.
            ValueError: when n is negative.

        Example:
            >>> TARGETS["moons"].sample(3, dtype=torch.float64).dtype
            torch.float64
        """
        if isinstance(n, bool) or not isinstance(n, numbers.Integral):
            raise TypeError(f"n must be a non-negative int, got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"n must be a non-negative int, got {n}")
        points = self.draw(_Source(generator, device), n)
        return points.to(dtype=dtype or torch.get_default_dtype(), device=device)

    def log_density(self, x: Tensor) -> Tensor:
        """Normalised log-density in nats, computed in float64 and differentiable.

        Args:
            x: points of shape (N, 2).

        Returns:
            Tensor of shape (N,) in the dtype of x; -inf outside of the support.

        Raises:
            TypeError: when x is not a floating-point tensor.
            ValueError: when its shape is another one.
            NotImplementedError: when the target's density is not known.

        Example:
            >>> TARGETS["checkerboard"].log_density(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
            tensor([-3.4657,    -inf])
        """
        check_rows(x, 2)
        if self.density is None:
            known = ", ".join(name for name, target in TARGETS.items() if target.has_log_density)
            raise NotImplementedError(
                f"the log-density of {self.name} is not known; targets with one: {known}"
            )
        return torch.cat([self.density(rows) for rows in x.double().split(_CHUNK)]).to(x.dtype)


# Mixtures of Gaussians with one standard deviation. A curve that is blurred by Gaussian noise is
# one as well, up to the error of the quadrature along the curve.


def _mixture(x: Tensor, centres: Tensor, weights: Tensor, std: float) -> Tensor:
    """Log-density of Gaussians at `centres` of shape (M, 2)."""
    centres, weights = centres.to(x.device), weights.to(x.device)
    # |x − c|² written out, because one matrix product is cheaper than (N, M, 2) differences.
    offset = weights.log() - centres.square().sum(-1) / (2 * std**2)
    logits = torch.addmm(offset, x, centres.T, alpha=std**-2)
    outer = x.square().sum(-1) / (2 * std**2) + math.log(2 * math.pi * std**2)
    return logits.logsumexp(-1) - outer


@functools.cache
def _gauss_legendre(points: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [low, high], weights of sum one (Golub and Welsch, 1969)."""
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")
    side = torch.diag(k / (4 * k * k - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(side + side.T)
    return low + (high - low) * (nodes + 1) / 2, vectors[0].square()


_GAUSSIANS_STD = 0.5 / math.sqrt(2)


def _gaussians_centres(index: Tensor) -> Tensor:
    angle = index * (math.pi / 4)
    return 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=-1)


def _draw_eight_gaussians(source: _Source, n: int) -> Tensor:
    return _gaussians_centres(source.integers(8, n)) + _GAUSSIANS_STD * source.normal(n, 2)


def _eight_gaussians(x: Tensor) -> Tensor:
    centres = _gaussians_centres(torch.arange(8, dtype=torch.float64, device=x.device))
    return _mixture(x, centres, torch.full((8,), 1 / 8, dtype=torch.float64), _GAUSSIANS_STD)


_MOONS_STD = 0.2


def _moon(t: Tensor) -> Tensor:
    """The upper arc; the lower one is its image under x ↦ (0, 0.6) − x."""
    return torch.stack([2 * t.cos() - 1, 2 * t.sin() - 0.2], dim=-1)


def _other_moon(x: Tensor) -> Tensor:
    return x.new_tensor([0.0, 0.6]) - x


def _draw_moons(source: _Source, n: int) -> Tensor:
    upper = _moon(math.pi * source.uniform(n))
    is_upper = source.integers(2, n).bool().unsqueeze(-1)
    arcs = torch.where(is_upper, upper, _other_moon(upper))
    return arcs + _MOONS_STD * source.normal(n, 2)


def _moons(x: Tensor) -> Tensor:
    t, weights = _gauss_legendre(128, 0.0, math.pi)
    upper = _moon(t)
    centres = torch.cat([upper, _other_moon(upper)])
    return _mixture(x, centres, torch.cat([weights, weights]) / 2, _MOONS_STD)


_ROLL_STD = 0.2
_ROLL_BEGIN, _ROLL_END = 1.5 * math.pi, 4.5 * math.pi


def _roll(t: Tensor) -> Tensor:
    return torch.stack([t * t.cos(), t * t.sin()], dim=-1) / 5


def _draw_swiss_roll(source: _Source, n: int) -> Tensor:
    t = _ROLL_BEGIN + (_ROLL_END - _ROLL_BEGIN) * source.uniform(n)
    return _roll(t) + _ROLL_STD * source.normal(n, 2)


def _swiss_roll(x: Tensor) -> Tensor:
    t, weights = _gauss_legendre(400, _ROLL_BEGIN, _ROLL_END)
    return _mixture(x, _roll(t), weights, _ROLL_STD)


# Two spirals: a point of a spiral, uniform noise on a small square and Gaussian noise.

_SPIRAL_END = 3 * math.pi
_SPIRAL_BOX = 1 / 6
_SPIRAL_STD = 0.1


def _spiral(t: Tensor) -> Tensor:
    return torch.stack([-t * t.cos(), t * t.sin()], dim=-1) / 3


def _draw_two_spirals(source: _Source, n: int) -> Tensor:
    spiral = _spiral(_SPIRAL_END * source.uniform(n).sqrt()) + _SPIRAL_BOX * source.uniform(n, 2)
    sign = 2 * source.integers(2, n).unsqueeze(-1) - 1
    return sign * spiral + _SPIRAL_STD * source.normal(n, 2)


def _log_blurred_box(x: Tensor) -> Tensor:
    """Log-density of uniform noise on [0, _SPIRAL_BOX] plus Gaussian noise."""
    # Symmetric about the middle of the box: on the left of it Φ does not cancel.
    left = -(x - _SPIRAL_BOX / 2).abs()
    high = torch.special.log_ndtr((left + _SPIRAL_BOX / 2) / _SPIRAL_STD)
    low = torch.special.log_ndtr((left - _SPIRAL_BOX / 2) / _SPIRAL_STD)
    return high + torch.log1p(-(low - high).exp()) - math.log(_SPIRAL_BOX)


def _two_spirals(x: Tensor) -> Tensor:
    return torch.logaddexp(_one_spiral(x), _one_spiral(-x)) - math.log(2)


def _one_spiral(x: Tensor) -> Tensor:
    t, weights = (tensor.to(x.device) for tensor in _gauss_legendre(600, 0.0, _SPIRAL_END))
    log_weights = (weights * 2 * t / _SPIRAL_END).log()
    centres = _spiral(t)
    # Log Φ is slow: leave out the nodes that cannot add more than exp(−50) of the nearest one.
    with torch.no_grad():
        distance = torch.cdist(x, centres + _SPIRAL_BOX / 2)
        to_box = (distance - _SPIRAL_BOX / math.sqrt(2)).clamp(min=0)
        nearest = distance.amin(-1, keepdim=True)
        kept = to_box.square() < nearest.square() + 100 * _SPIRAL_STD**2
        rows, nodes = kept.nonzero(as_tuple=True)
    log_terms = log_weights[nodes] + _log_blurred_box(x[rows] - centres[nodes]).sum(-1)
    return x.new_full(kept.shape, -math.inf).index_put((rows, nodes), log_terms).logsumexp(-1)


# Circles about the origin, blurred by Gaussian noise: in closed form with a Bessel function.


def _draw_circles(radii: tuple[float, ...], std: float, source: _Source, n: int) -> Tensor:
    index = source.integers(len(radii), n)
    radius = torch.tensor(radii, dtype=torch.float64, device=index.device)[index]
    angle = 2 * math.pi * source.uniform(n)
    circle = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return circle + std * source.normal(n, 2)


def _circles(radii: tuple[float, ...], std: float, x: Tensor) -> Tensor:
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    radius = x.new_tensor(radii)
    # exp(−(r² + R²) / 2σ²) I₀(rR/σ²), with the exponential growth of I₀ taken out.
    log_circle = torch.special.i0e(r * radius / std**2).log() - ((r - radius) / std).square() / 2
    return log_circle.logsumexp(-1) - math.log(2 * math.pi * std**2 * len(radii))


# Checkerboard: uniform on 8 of the 16 squares of side 2 in [−4, 4]².


def _draw_checkerboard(source: _Source, n: int) -> Tensor:
    column = source.integers(4, n) - 2
    row = 2 * source.integers(2, n) - 2 + column % 2
    return 2 * (torch.stack([column, row], dim=-1) + source.uniform(n, 2))


def _checkerboard(x: Tensor) -> Tensor:
    cell = (x / 2).floor()
    # Every edge bounds a dark square: a sample that rounding moved to an edge is in the support.
    dark = (cell.sum(-1) % 2 == 0) | (cell == x / 2).any(-1)
    inside = dark & (x.abs() <= 4).all(-1)
    # The zero has a gradient and passes on nan.
    zero = (0 * x).sum(-1)
    return torch.where(inside, zero - math.log(32), zero - math.inf)


# Pinwheel: f ~ N((1, 0), diag(0.3², 0.1²)) is turned clockwise by 2πk/5 + exp(f₀)/4 and doubled.

_WHEEL_STD = (0.3, 0.1)
_WHEEL_RATE = 0.25
_WHEEL_ARMS = 5
# Beyond this radius, which f exceeds with probability 1e-23, the arms are wound too tightly.
_WHEEL_RADIUS = 4.0
# So fine that an interval holds one preimage at most, up to that radius; the exception are pairs
# beside a fold, at f₁ < −4 exp(−f₀), where the probability is 1e-9.
_WHEEL_ANGLES = 256


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate counterclockwise."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], dim=-1)


def _wheel_angle(arm: Tensor, f_0: Tensor) -> Tensor:
    return 2 * math.pi / _WHEEL_ARMS * arm + _WHEEL_RATE * f_0.exp()


def _draw_pinwheel(source: _Source, n: int) -> Tensor:
    arm = source.integers(_WHEEL_ARMS, n)
    noise = source.normal(n, 2)
    f = noise * noise.new_tensor(_WHEEL_STD) + noise.new_tensor([1.0, 0.0])
    return 2 * _turn(f, -_wheel_angle(arm, f[:, 0]))


def _pinwheel(x: Tensor) -> Tensor:
    """Sum over all preimages f of p(f) / |det ∂x/∂f|."""
    rows, arm, f_0 = _wheel_preimages(x.detach() / 2)
    y = x[rows] / 2
    # A Newton step for f₀ = (turned y)₀ makes f₀ exact, and differentiable with respect to y.
    f = _turn(y, _wheel_angle(arm, f_0))
    slope = 1 + _WHEEL_RATE * f_0.exp() * f[:, 1]
    f_0 = f_0 - (f_0 - f[:, 0]) / slope.detach()
    f_1 = _turn(y, _wheel_angle(arm, f_0))[:, 1]
    determinant = 4 * (1 + _WHEEL_RATE * f_0.exp() * f_1)
    exponent = ((f_0 - 1) / _WHEEL_STD[0]).square() + (f_1 / _WHEEL_STD[1]).square()
    normaliser = 2 * math.pi * math.prod(_WHEEL_STD) * _WHEEL_ARMS
    terms = (-exponent / 2).exp() / (determinant.abs() * normaliser)
    return x.new_zeros(len(x)).index_add(0, rows, terms).log()


def _wheel_preimages(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row of y, arm and f₀ of every f that is turned onto a row.

    With f = r (cos φ, sin φ), r = |y|, an arm k has a preimage where `level` is the integer k.
    """
    r, angle = torch.linalg.vector_norm(y, dim=-1), torch.atan2(y[:, 1], y[:, 0])

    def level(phi: Tensor, r: Tensor, angle: Tensor) -> Tensor:
        turned = phi - _WHEEL_RATE * (r * phi.cos()).exp()
        return _WHEEL_ARMS / (2 * math.pi) * (turned - angle)

    grid = torch.linspace(
        -math.pi, math.pi, _WHEEL_ANGLES + 1, dtype=torch.float64, device=y.device
    )
    floors = level(grid, r.unsqueeze(-1), angle.unsqueeze(-1)).floor()
    crossed = (floors.diff(dim=-1) != 0) & (r <= _WHEEL_RADIUS).unsqueeze(-1)
    rows, cells = crossed.nonzero(as_tuple=True)
    before, after = floors[rows, cells], floors[rows, cells + 1]
    arm = torch.maximum(before, after)
    low, high = grid[cells], grid[cells + 1]
    r, angle = r[rows], angle[rows]
    # Bisection holds beside a fold, where Newton's method does not; 2⁻³² is left for the last step.
    for _ in range(32):
        middle = (low + high) / 2
        is_low = (level(middle, r, angle) < arm) == (before < after)
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return rows, arm, r * ((low + high) / 2).cos()


class _Targets(dict[str, Target]):
    """Targets by name."""

    def __missing__(self, name: str) -> Target:
        raise KeyError(f"unknown target {name!r}, known targets: {', '.join(self)}")


# The entropies are −∫ p log p by the trapezoidal rule on [−6.5, 6.5]², exact to the digits given:
# halving the spacing from 0.02 (two spirals: from 0.03) moves none by more than 5e-9.
_CIRCLES = ((1.5, 3.0), 0.24)
_RINGS = ((0.75, 1.5, 2.25, 3.0), 0.08)

TARGETS: Mapping[str, Target] = MappingProxyType(
    _Targets(
        (target.name, target)
        for target in [
            Target("checkerboard", _draw_checkerboard, _checkerboard, math.log(32)),
            Target("eight_gaussians", _draw_eight_gaussians, _eight_gaussians, 2.831578361),
            Target("two_spirals", _draw_two_spirals, _two_spirals, 2.645450284),
            Target("swiss_roll", _draw_swiss_roll, _swiss_roll, 2.669646174),
            Target(
                "circles",
                functools.partial(_draw_circles, *_CIRCLES),
                functools.partial(_circles, *_CIRCLES),
                3.268135712,
            ),
            Target("moons", _draw_moons, _moons, 2.393879196),
            Target("pinwheel", _draw_pinwheel, _pinwheel, 2.31778800),
            Target(
                "rings",
                functools.partial(_draw_circles, *_RINGS),
                functools.partial(_circles, *_RINGS),
                2.623182770,
            ),
        ]
    )
)
