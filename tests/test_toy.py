"""Toy targets: densities against quadrature, samples and independent formulas."""

import functools
import math

import mpmath
import pytest
import torch
from toy_targets import TARGETS, Target

NAMES = [
    "checkerboard",
    "circles",
    "eight_gaussians",
    "moons",
    "pinwheel",
    "rings",
    "swiss_roll",
    "two_spirals",
]
each_target = pytest.mark.parametrize("name", NAMES)

# Cells of side 1/24 over [-6, 6]^2, which leaves out less than 1e-9 of every target; the edges of
# the checkerboard lie between cells.
HALF, CELLS_PER_UNIT = 6, 24


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sample(name, n, seed=0):
    return TARGETS[name].sample(n, seeded(seed), dtype=torch.float64)


@functools.cache
def grid_log_density(name):
    """Log-density at the middle of every cell, (288, 288), first index along x."""
    cells = 2 * HALF * CELLS_PER_UNIT
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) / CELLS_PER_UNIT - HALF
    return TARGETS[name].log_density(torch.cartesian_prod(axis, axis)).reshape(cells, cells)


def chi_square_z(name, points):
    """Chi-square of a histogram with bins of side 1/2, as a standardised number."""
    bins = 4 * HALF
    cells = CELLS_PER_UNIT // 2
    mass = grid_log_density(name).exp().reshape(bins, cells, bins, cells).sum((1, 3))
    expected = (mass / CELLS_PER_UNIT**2 * len(points)).flatten()
    index = ((points + HALF) * 2).floor().long()
    counted = torch.bincount(index[:, 0] * bins + index[:, 1], minlength=bins * bins).double()
    # Chi-square needs a few points in every bin; the others together are to stay within 5 σ.
    rare = expected < 10
    spread = 5 * expected[rare].sum().sqrt() + 5
    if (counted[rare].sum() - expected[rare].sum()).abs() > spread:
        return math.inf
    expected, counted = expected[~rare], counted[~rare]
    freedom = len(expected)
    chi_square = ((counted - expected).square() / expected).sum().item()
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def test_names():
    assert sorted(TARGETS) == NAMES
    assert all(target.name == name for name, target in TARGETS.items())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match="unknown target 'gaussians'") as error:
        TARGETS["gaussians"]
    assert all(name in str(error.value) for name in NAMES)
    assert TARGETS.get("gaussians") is None


def test_targets_are_read_only():
    with pytest.raises(TypeError, match="item assignment"):
        TARGETS["moons"] = TARGETS["rings"]
    with pytest.raises(AttributeError, match="cannot assign"):
        TARGETS["moons"].entropy = 0.0


@each_target
@pytest.mark.parametrize("n", [0, 1, 7])
def test_shapes(name, n):
    points = TARGETS[name].sample(n)
    assert points.shape == (n, 2)
    assert TARGETS[name].log_density(points).shape == (n,)


@each_target
def test_samples_follow_the_seed_in_every_dtype(name):
    points = sample(name, 50, seed=1)
    assert torch.equal(points, sample(name, 50, seed=1))
    assert not torch.isclose(points, sample(name, 50, seed=2)).any(-1).all()
    assert len(points.unique(dim=0)) == 50
    default = TARGETS[name].sample(50, seeded(1))
    assert default.dtype == torch.float32
    assert torch.equal(default, points.float())


@each_target
def test_generator_leaves_the_global_one_alone(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(name, 10)
    assert torch.equal(torch.get_rng_state(), before)
    by_default = TARGETS[name].sample(10)
    assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(by_default, TARGETS[name].sample(10, seeded(3)))


@each_target
def test_device(name):
    assert TARGETS[name].sample(3, device="meta").is_meta
    assert TARGETS[name].sample(3, seeded(0), device="meta").is_meta


@pytest.mark.parametrize("n", [2.0, True, None])
def test_n_must_be_an_int(n):
    with pytest.raises(TypeError, match=f"n must be a non-negative int, got {type(n).__name__}"):
        TARGETS["moons"].sample(n)


def test_n_must_not_be_negative():
    with pytest.raises(ValueError, match="n must be a non-negative int, got -1"):
        TARGETS["moons"].sample(-1)


@each_target
def test_density_refuses_other_inputs(name):
    with pytest.raises(ValueError, match=r"must have shape \(N, 2\), got \(4, 3\)"):
        TARGETS[name].log_density(torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, got torch\.int64"):
        TARGETS[name].log_density(torch.zeros(4, 2, dtype=torch.int64))


def test_unknown_density_names_target_and_those_with_one():
    target = Target("blob", lambda source, n: source.normal(n, 2))
    assert not target.has_log_density
    assert target.entropy is None
    assert target.sample(3).shape == (3, 2)
    with pytest.raises(NotImplementedError, match=r"log-density of blob is not known.*moons"):
        target.log_density(torch.zeros(1, 2))


@each_target
def test_density_keeps_the_dtype_and_does_not_depend_on_the_batch(name):
    target = TARGETS[name]
    points = sample(name, 2100)
    whole = target.log_density(points)
    assert whole.dtype == torch.float64
    assert whole.isfinite().all()
    parts = torch.cat([target.log_density(part) for part in points.split(700)])
    # A matrix product of another size may add up in another order.
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-11)
    single = points.float()
    assert target.log_density(single).dtype == torch.float32
    assert torch.equal(target.log_density(single), target.log_density(single.double()).float())


@each_target
def test_density_is_normalised(name):
    # Cells are about half a standard deviation of the noise wide, or less, where the rule of
    # equal weights is exact to 1e-30 for Gaussians. At the folds of the pinwheel, which hold
    # 1e-9 of it, the density has an inverse square root and the rule is off by more than that.
    mass = grid_log_density(name).exp().sum().item() / CELLS_PER_UNIT**2
    assert mass == pytest.approx(1.0, abs=3e-8 if name == "pinwheel" else 1e-9)


@each_target
def test_entropy_by_quadrature(name):
    log_p = grid_log_density(name)
    integrand = torch.special.entr(log_p.exp())
    entropy = integrand.sum().item() / CELLS_PER_UNIT**2
    assert entropy == pytest.approx(TARGETS[name].entropy, abs=1e-7)


@each_target
def test_entropy_by_samples(name):
    surprise = -TARGETS[name].log_density(sample(name, 20_000, seed=4))
    error = (surprise.mean() - TARGETS[name].entropy).abs()
    # The checkerboard is uniform: its standard error is zero.
    assert error < 4 * surprise.std() / math.sqrt(20_000) + 1e-12


def test_known_entropies():
    assert TARGETS["checkerboard"].entropy == pytest.approx(math.log(32), abs=1e-15)
    assert TARGETS["eight_gaussians"].entropy == pytest.approx(2.831, abs=1e-3)


@each_target
def test_samples_follow_the_density(name):
    assert abs(chi_square_z(name, sample(name, 100_000, seed=5))) < 4


@each_target
def test_wrong_samples_are_noticed(name):
    assert chi_square_z(name, 1.02 * sample(name, 100_000, seed=5)) > 8


@each_target
def test_rows_are_independent(name):
    # The components come in random order, not one after the other.
    points = sample(name, 20_000, seed=6)
    for first, second in [points.chunk(2), (points[::2], points[1::2])]:
        difference = first.mean(0) - second.mean(0)
        assert (difference.abs() < 4 * points.std(0) * math.sqrt(4 / 20_000)).all()


@each_target
def test_limits_hold_the_picture(name):
    target = TARGETS[name]
    assert (sample(name, 20_000).abs() < target.limits).all(-1).double().mean() > 0.998


def test_checkerboard_support():
    target = TARGETS["checkerboard"]
    points = [[1.0, 1.0], [3.0, -3.0], [-1.0, -1.0], [1.0, 3.0], [1.0, 5.0], [5.0, 5.0]]
    expected = [-math.log(32), -math.inf, -math.log(32), -math.inf, -math.inf, -math.inf]
    assert target.log_density(torch.tensor(points, dtype=torch.float64)).tolist() == expected
    # In half precision many samples are rounded to an edge, which belongs to the support.
    points = target.sample(20_000, seeded(0), dtype=torch.float16)
    assert (points % 2 == 0).any()
    assert target.log_density(points).isfinite().all()
    assert target.log_density(torch.tensor([[math.nan, 1.0]])).isnan().all()


def integral(integrand, begin, end):
    """By mpmath, whose error estimate is absolute: the integrand is brought near to one."""
    pieces = mpmath.linspace(begin, end, 41)
    largest = max(map(integrand, pieces))
    return largest * mpmath.quad(lambda t: integrand(t) / largest, pieces)


def blurred(curve, begin, end, std):
    """Density of a curve plus Gaussian noise, as a function of a point, by mpmath."""

    def density(x, y):
        def integrand(t):
            a, b = curve(t)
            return mpmath.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * std**2))

        return integral(integrand, begin, end) / ((end - begin) * 2 * mpmath.pi * std**2)

    return density


def mixture(*densities):
    return lambda x, y: mpmath.fsum(density(x, y) for density in densities) / len(densities)


def circle(radius, std):
    return blurred(
        lambda t: (radius * mpmath.cos(t), radius * mpmath.sin(t)), 0, 2 * mpmath.pi, std
    )


def moon(sign):
    def curve(t):
        return sign * (2 * mpmath.cos(t) - 1), sign * (2 * mpmath.sin(t) - 0.5) + 0.3

    return blurred(curve, 0, mpmath.pi, 0.2)


def gaussian(index):
    angle, radius, std = index * mpmath.pi / 4, 4 / mpmath.sqrt(2), 0.5 / mpmath.sqrt(2)
    a, b = radius * mpmath.cos(angle), radius * mpmath.sin(angle)
    return lambda x, y: mpmath.npdf(x, a, std) * mpmath.npdf(y, b, std)


def spiral(sign):
    def blurred_box(distance):
        # From the left of the box, where the difference does not cancel.
        half = mpmath.mpf(1) / 12
        left = -abs(distance - half)
        return 6 * (mpmath.ncdf((left + half) / 0.1) - mpmath.ncdf((left - half) / 0.1))

    def density(x, y):
        def integrand(t):
            a, b = -t * mpmath.cos(t) / 3, t * mpmath.sin(t) / 3
            return t * blurred_box(sign * x - a) * blurred_box(sign * y - b)

        return integral(integrand, 0, 3 * mpmath.pi) * 2 / (3 * mpmath.pi) ** 2

    return density


REFERENCES = {
    "circles": mixture(circle(3, 0.24), circle(1.5, 0.24)),
    "eight_gaussians": mixture(*map(gaussian, range(8))),
    "moons": mixture(moon(1), moon(-1)),
    "rings": mixture(*(circle(radius, 0.08) for radius in (0.75, 1.5, 2.25, 3))),
    "swiss_roll": blurred(
        lambda t: (t * mpmath.cos(t) / 5, t * mpmath.sin(t) / 5),
        1.5 * mpmath.pi,
        4.5 * mpmath.pi,
        0.2,
    ),
    "two_spirals": mixture(spiral(1), spiral(-1)),
}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_density_against_mpmath(name):
    points = [[0.0, 0.0], [0.3, -1.6], [2.1, 1.9], [-3.9, 0.4], [-5.0, 7.0]]
    found = TARGETS[name].log_density(torch.tensor(points, dtype=torch.float64))
    expected = [float(mpmath.log(REFERENCES[name](*map(mpmath.mpf, x)))) for x in points]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_pinwheel_is_the_transformed_gaussian():
    def turned(f):
        angle = 4 * math.pi / 5 + f[0].exp() / 4
        cos, sin = angle.cos(), angle.sin()
        return 2 * torch.stack([cos * f[0] + sin * f[1], cos * f[1] - sin * f[0]])

    # On the outer half of one arm the others are too far away to count.
    for f in torch.tensor([[1.0, 0.0], [1.3, 0.2], [1.8, -0.15]], dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(turned, f)
        expected = -torch.linalg.slogdet(jacobian).logabsdet - math.log(5 * 2 * math.pi * 0.03)
        expected = expected - ((f[0] - 1) / 0.3) ** 2 / 2 - (f[1] / 0.1) ** 2 / 2
        found = TARGETS["pinwheel"].log_density(turned(f).unsqueeze(0)).squeeze(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pinwheel_ends():
    ends = TARGETS["pinwheel"].log_density(torch.tensor([[7.99, 0.0], [0.0, -8.01]]))
    assert ends.isfinite().tolist() == [True, False]
    assert ends[1] == -math.inf


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_gradient(name):
    points = torch.cat([sample(name, 6), torch.tensor([[0.0, 0.0], [3.7, -3.9]])])
    points = points.double().requires_grad_()
    assert torch.autograd.gradcheck(TARGETS[name].log_density, (points,), atol=1e-6)


def test_gradient_of_the_uniform_density_is_zero():
    points = torch.tensor([[1.0, 1.0], [1.0, 3.0]], requires_grad=True)
    TARGETS["checkerboard"].log_density(points)[0].backward()
    assert torch.equal(points.grad, torch.zeros(2, 2))
