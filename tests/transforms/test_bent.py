"""BentIdentity against mpmath: a few units in the last place over the whole range of the dtype."""

import itertools

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p4flows import BentIdentity

DTYPES = [torch.float32, torch.float64]
BENT = BentIdentity()
# Units of eps, relative to the exact value.
FEW = 4


def exact_outputs(x):
    return x + (mpmath.sqrt(x * x + 1) - 1) / 2


def exact_inverse(y):
    s = y + mpmath.mpf(1) / 2
    return mpmath.mpf(4) / 3 * (s - mpmath.sqrt(s * s + mpmath.mpf(3) / 4) / 2)


def exact_slope(x):
    return 1 + x / (2 * mpmath.sqrt(x * x + 1))


def exact_log_slope(x):
    return mpmath.log(exact_slope(x))


def exact_gradient_of_log_slope(x):
    return 1 / (2 * mpmath.sqrt(x * x + 1) ** 3 * exact_slope(x))


def exact_gradient_of_inverse_log_slope(y):
    x = exact_inverse(y)
    return -exact_gradient_of_log_slope(x) / exact_slope(x)


def gradient_of(part):
    """The gradient of outputs (0) or logabsdet (1), by autograd."""

    def gradient(transform, inputs):
        inputs = inputs.clone().requires_grad_()
        return torch.autograd.grad(transform(inputs)[part].sum(), inputs)[0]

    return gradient


def value_of(part):
    return lambda transform, inputs: transform(inputs)[part]


# name → transform, what is computed, its exact value, and the least scale errors are relative to:
# the gradient of the log-derivative vanishes as |x|⁻³, and is exact to a few eps absolutely.
QUANTITIES = {
    "outputs": (BENT.forward, value_of(0), exact_outputs, 0),
    "logabsdet": (BENT.forward, value_of(1), exact_log_slope, 0),
    "gradient": (BENT.forward, gradient_of(0), exact_slope, 0),
    "gradient of logabsdet": (BENT.forward, gradient_of(1), exact_gradient_of_log_slope, 1),
    "inverse": (BENT.inverse, value_of(0), exact_inverse, 0),
    "inverse logabsdet": (
        BENT.inverse,
        value_of(1),
        lambda y: -exact_log_slope(exact_inverse(y)),
        0,
    ),
    "inverse gradient": (
        BENT.inverse,
        gradient_of(0),
        lambda y: 1 / exact_slope(exact_inverse(y)),
        0,
    ),
    "inverse gradient of logabsdet": (
        BENT.inverse,
        gradient_of(1),
        exact_gradient_of_inverse_log_slope,
        1,
    ),
}


def critical_inputs(dtype):
    """0, ±1e-30 … ±1e30, the neighbourhoods of the points where naive forms cancel; `(N, 1)`."""
    magnitudes = torch.logspace(-30, 30, 121, dtype=torch.float64)
    distances = torch.logspace(-16, -1, 16, dtype=torch.float64)
    inputs = [torch.zeros(1, dtype=torch.float64), magnitudes, -magnitudes]
    for center, sign in itertools.product((-0.5, -1.0, -4 / 3, -1 / 3), (-1, 0, 1)):
        inputs.append(center + sign * distances)
    x = torch.cat(inputs).to(dtype)
    return torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)])[:, None]


def assert_accurate(computed, exact, floor, dtype):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for found, expected in zip(computed.flatten().tolist(), exact, strict=True):
        # Below `tiny` numbers have fewer digits.
        bound = FEW * eps * max(abs(expected), floor, tiny)
        assert abs(mpmath.mpf(found) - expected) <= bound, (found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTITIES)
def test_accurate_to_a_few_ulp(name, dtype):
    transform, compute, exact, floor = QUANTITIES[name]
    inputs = critical_inputs(dtype)
    # 1e-30 and 1e30 meet in x² + 1 and cancel: 60 digits and those of the dtype.
    with mpmath.workdps(90):
        expected = [exact(mpmath.mpf(x)) for x in inputs.flatten().tolist()]
        assert_accurate(compute(transform, inputs), expected, floor, dtype)


def test_naive_formula_would_not_pass():
    x = critical_inputs(torch.float64)
    with mpmath.workdps(90), pytest.raises(AssertionError):
        expected = [exact_outputs(mpmath.mpf(value)) for value in x.flatten().tolist()]
        assert_accurate(x + ((x**2 + 1).sqrt() - 1) / 2, expected, 0, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_overflows_below_the_largest_number(dtype):
    largest = torch.finfo(dtype).max
    # B(x) → 3x/2 and x/2, B⁻¹(y) → 2y/3 and 2y: where these are numbers, they come out.
    x = torch.tensor([[largest / 1.51], [-largest]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[largest], [-largest / 2.01]], dtype=dtype, requires_grad=True)
    slopes = torch.tensor([[1.5], [0.5]], dtype=dtype)
    for transform, inputs, slope in ((BENT.forward, x, slopes), (BENT.inverse, y, 1 / slopes)):
        outputs, logabsdet = transform(inputs)
        torch.testing.assert_close(outputs, inputs * slope)
        torch.testing.assert_close(logabsdet, slope.log().sum(-1))
        outputs_gradient, log_gradient = (
            torch.autograd.grad(part.sum(), inputs, retain_graph=True)[0]
            for part in (outputs, logabsdet)
        )
        torch.testing.assert_close(outputs_gradient, slope)
        torch.testing.assert_close(log_gradient, torch.zeros_like(slope))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_strictly_increasing(direction, dtype):
    magnitudes = torch.exp2(torch.linspace(-90, 90, 20_001, dtype=dtype))
    wide = torch.cat([-magnitudes.flip(0), magnitudes.new_zeros(1), magnitudes])
    # Where the inverse changes formulas, neighbours 16 eps apart: farther than rounding.
    near = -0.5 + 16 * torch.finfo(dtype).eps * torch.arange(-500, 501, dtype=dtype)
    for inputs in (wide, near):
        outputs, _ = getattr(BENT, direction)(inputs[:, None])
        assert (outputs.flatten().diff() > 0).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(min_value=-1e300, max_value=1e300))
def test_round_trip(x):
    inputs = torch.tensor([[x]], dtype=torch.float64)
    for there, back in ((BENT.forward, BENT.inverse), (BENT.inverse, BENT.forward)):
        outputs, logabsdet = there(inputs)
        restored, minus_logabsdet = back(outputs)
        torch.testing.assert_close(restored, inputs, rtol=4e-15, atol=0)
        torch.testing.assert_close(minus_logabsdet, -logabsdet, rtol=4e-15, atol=4e-15)


def test_sums_over_all_but_the_batch_dimension():
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    outputs, logabsdet = BENT(x)
    flat, flat_logabsdet = BENT(x.flatten(1))
    torch.testing.assert_close(outputs, flat.reshape(4, 2, 3))
    torch.testing.assert_close(logabsdet, flat_logabsdet)
