"""Counter-based draws: their distribution, independence and reproducibility."""

import math

import pytest
import torch

from p4flows.matrices.directions import basis_columns, standard_normal

COUNT = 100_000


def draw(seed, counter, shape=(COUNT,)):
    return standard_normal(torch.tensor(seed), torch.tensor(counter), shape)


def correlation(x, y):
    """Standardised: a standard normal number when x and y are independent."""
    return ((x - x.mean()) * (y - y.mean())).mean() / x.std() / y.std() * math.sqrt(len(x))


@pytest.mark.parametrize("seed", [0, 1, (1 << 62) - 1, -5])
def test_moments(seed):
    x = draw(seed, 3)
    assert x.isfinite().all()
    # Standard errors of the first four moments of N(0, 1): √1, √2, √15 and √96 over √COUNT.
    for power, (expected, error) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(x.pow(power).mean() - expected) < 4 * math.sqrt(error / COUNT)


def test_distribution():
    x = draw(7, 0).sort().values
    steps = torch.arange(COUNT, dtype=torch.float64) / COUNT
    distance = (torch.special.ndtr(x) - steps).abs().max()
    # Kolmogorov–Smirnov: 2.2 is exceeded with a probability of 1e-4.
    assert distance * math.sqrt(COUNT) < 2.2


@pytest.mark.parametrize(("seed", "counter"), [(0, 1), (1, 0), (1 << 40, 0), (0, 1 << 40)])
def test_draws_of_another_seed_or_counter_are_independent(seed, counter):
    first, second = draw(0, 0), draw(seed, counter)
    assert abs(correlation(first, second)) < 4
    assert abs(correlation(first.square(), second.square())) < 4
    # The streams are not shifts of each other either.
    assert not torch.isin(first, second).any()


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_numbers_of_one_draw_are_independent(lag):
    x = draw(11, 5)
    assert abs(correlation(x[lag:], x[:-lag])) < 4
    assert abs(correlation(x[lag:].square(), x[:-lag].square())) < 4


def test_one_number_per_counter_is_normal_too():
    seeds, counters = torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT)
    for x in (standard_normal(seeds, counters, ()), standard_normal(counters, seeds, ())):
        assert x.shape == (COUNT,)
        assert abs(x.mean()) < 4 / math.sqrt(COUNT)
        assert abs(x.square().mean() - 1) < 4 * math.sqrt(2 / COUNT)
        assert abs(correlation(x[1:], x[:-1])) < 4


def test_a_draw_is_a_function_of_seed_and_counter():
    state = torch.get_rng_state()
    assert torch.equal(draw(3, 4, (5, 2)), draw(3, 4, (5, 2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_the_draws_of_its_members():
    seeds, counters = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 0, 7], [1, 9, 2]])
    together = standard_normal(seeds, counters, (4, 2))
    assert together.shape == (2, 3, 4, 2)
    assert together.dtype == torch.float64
    for index in [(0, 0), (0, 2), (1, 1)]:
        assert torch.equal(
            together[index], draw(seeds[index].item(), counters[index].item(), (4, 2))
        )


def test_the_numbers_stay_what_they_are():
    # Checkpoints continue with the same v only as long as these do not change.
    expected = [1.2970753358689007, 2.228670431168719, -1.1935940500153621, -0.8881570112882115]
    torch.testing.assert_close(draw(2024, 7, (4,)).tolist(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (3, 2), (5, 5), (32, 8), (33, 8)])
def test_columns_of_n_draws_are_k_orthogonal_bases(n, k):
    counters = torch.arange(n)
    draws = basis_columns(torch.full_like(counters, 3), counters, (n, k))
    columns = draws.mT.reshape(k, n, n)  # n draws of k columns are k bases of n
    gram = columns @ columns.mT
    torch.testing.assert_close(gram, n * torch.eye(n, dtype=torch.float64).expand(k, n, n))


def test_basis_columns_of_a_batch_are_those_of_its_members():
    seeds, counters = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 5], [7, 7]])
    batch = basis_columns(seeds, counters, (6, 4))
    assert batch.shape == (2, 2, 6, 4)
    for index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(
            batch[index], basis_columns(seeds[index], counters[index], (6, 4)), rtol=0, atol=1e-14
        )
    assert (batch[1, 0] - batch[1, 1]).abs().max() > 0.1


@pytest.mark.parametrize("n", [2, 3, 16])
def test_basis_columns_have_no_preferred_direction(n):
    seeds = torch.arange(50_000)
    v = basis_columns(seeds, torch.full_like(seeds, 2), (n, 1)).squeeze(-1)
    mean, second = v.mean(0), v.mT @ v / len(v)
    assert mean.abs().max() < 4.5 / math.sqrt(len(v))
    assert (second - torch.eye(n)).abs().max() < 4.5 * math.sqrt(2 / len(v))
