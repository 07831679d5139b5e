"""Merging: nothing but the representation changes, and the frozen state stays true and finite."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from matrices.perturbing import KINDS, additive, perturb, set_factors
from p4flows.matrices import InvertibleMatrix, MergeBounds
from p4flows.matrices.merge import merge_together

FREE = MergeBounds(update=(-math.inf, math.inf))


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double())


@st.composite
def matrices(draw):
    size = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    start = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    matrix = InvertibleMatrix(
        size,
        batch_shape=batch,
        rank=draw(st.integers(1, min(4, size))),
        perturbation=draw(st.sampled_from(KINDS)),
        init=(torch.eye(size) + 0.3 * size**-0.5 * start).to(dtype),
    )
    return matrix, generator


@settings(max_examples=150, deadline=None, derandomize=True)
@given(matrices(), st.integers(1, 8))
@torch.no_grad()
def test_a_merge_changes_nothing_beyond_rounding(given_matrix, merges):
    matrix, generator = given_matrix
    n, k, eps = matrix.size, matrix.rank, torch.finfo(matrix.frozen.dtype).eps
    # Bounds on ‖A X − I‖ and on the error of ln|det A|, kept up to date as merges go.
    residual = norm(matrix.frozen @ matrix.inverse_frozen - torch.eye(n)) + 2 * n * eps
    drift = 2 * n * eps * norm(matrix.frozen) * norm(matrix.inverse_frozen)
    for _ in range(merges):
        perturb(matrix, generator)
        a, x, u, v = matrix.frozen.clone(), matrix.inverse_frozen.clone(), matrix.u, matrix.v
        relative = matrix.perturbation == "relative"
        z = v.mT if relative else v.mT @ x
        g = torch.eye(k, dtype=a.dtype) + z @ u
        w = x @ u @ torch.linalg.inv(g)
        # Ã = A + u Vᵀ; both factors in absolute values, of which the terms are made.
        right = a.abs().mT @ v.abs() if relative else v.abs()
        left = z.abs() if relative else v.abs().mT @ x.abs()
        size_inverse = x.abs() + w.abs() @ left
        size_dense = a.abs() + u.abs() @ right.mT
        amplification = norm(torch.eye(n) - u @ torch.linalg.solve(g, z))
        lemma = norm(torch.linalg.inv(g)) * norm(u) * norm(v) * (1 if relative else norm(x))
        dense, inverse, (sign, logabsdet) = matrix.dense(), matrix.inverse(), matrix.slogdet()

        report = merge_together([matrix], force=True)
        assert report.outcome.merged.all()
        # What the probe found off is more exact than what it was.
        kept, ratio = ~report.corrected, matrix.error().ratio
        assert (ratio[report.corrected] <= 1).all()

        # Both sides are sums of the same products: each rounds by so many eps of the terms' size.
        rounding = 2 * (n + k + 2) * eps
        assert ((matrix.dense() - dense).abs() <= rounding * size_dense).all()
        changed = (matrix.inverse() - inverse).abs() <= rounding * size_inverse
        assert changed.flatten(-2).all(-1)[kept].all()
        assert torch.equal(matrix.slogdet()[0], sign)
        merged = matrix.slogdet()[1]
        changed = (merged - logabsdet).abs() <= 4 * eps * (logabsdet.abs() + merged.abs() + 1)
        assert changed[kept].all()

        # An old residual R becomes R (I − u G⁻¹ vᵀX); the rounding of the new A and X comes on top.
        drift += lemma * (2 * residual + rounding)
        residual = residual * amplification + rounding * norm(size_dense) * norm(size_inverse)
        drift += rounding * norm(size_dense) * norm(size_inverse)

    assume(residual.max() < 0.1)
    a, x = matrix.frozen.double(), matrix.inverse_frozen.double()
    assert (norm(a @ x - torch.eye(n)) <= residual).all()
    sign, logabsdet = torch.linalg.slogdet(a)
    assert torch.equal(matrix.sign.double(), sign)
    assert ((matrix.logabsdet_frozen - logabsdet).abs() <= drift).all()


@pytest.mark.parametrize("rank", [1, 3])
@torch.no_grad()
def test_merged_is_what_was_read(rank):
    matrix = InvertibleMatrix(5, rank=rank, init="reverse")
    generator = torch.Generator().manual_seed(0)
    perturb(matrix, generator)
    dense, v, draws = matrix.dense(), matrix.v.clone(), matrix.draws.clone()
    assert (dense - matrix.frozen).abs().max() > 0.05
    assert matrix.merge().item() is True
    assert torch.equal(matrix.frozen, matrix.dense())
    torch.testing.assert_close(matrix.frozen, dense)
    assert torch.equal(matrix.u, torch.zeros(5, rank))
    assert not torch.isclose(matrix.v, v).any()
    assert matrix.draws == draws + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "rank"), [(32, 1), (64, 1), (64, 4)])
@torch.no_grad()
def test_state_stays_true_over_thousands_of_merges(n, rank, kind):
    # Training towards a target, with noise: float32, a correction at every 50th merge.
    generator = torch.Generator().manual_seed(1)
    target = torch.eye(n) + 0.3 * n**-0.5 * torch.randn(n, n, generator=generator)
    matrix = InvertibleMatrix(n, rank=rank, perturbation=kind)
    for merge in range(1, 2001):
        noise = torch.randn(n, rank, generator=generator)
        set_factors(matrix, 0.5 / n * (target - matrix.frozen) @ matrix.v + 0.005 * noise, matrix.v)
        assert matrix.merge()
        if merge % 50 == 0:
            # Before the correction, when the error is largest.
            error = matrix.error().worst()
            assert error.right <= 1e-5
            assert error.logabsdet <= 2e-5
            assert not error.wrong_sign
            assert not matrix.correct()
    assert (matrix.frozen - torch.eye(n)).abs().max() > 0.1


@torch.no_grad()
def test_state_stays_true_on_a_random_walk_through_singular_matrices():
    n = 32
    matrix = additive(n, bounds=FREE)
    generator = torch.Generator().manual_seed(1)
    signs = set()
    for merge in range(1, 2001):
        set_factors(matrix, 0.3 * n**-0.5 * torch.randn(n, 1, generator=generator), matrix.v)
        assert matrix.merge()
        if merge % 50 == 0:
            matrix.correct()
            error = matrix.error().worst()
            # Rounding A⁻¹ to float32 costs cond(A)·eps already.
            condition = torch.linalg.cond(matrix.frozen.double()).item()
            assert error.right <= 4 * torch.finfo(torch.float32).eps * condition
            assert error.logabsdet <= 1e-5
            assert not error.wrong_sign
            signs.add(matrix.sign.item())
    assert signs == {-1.0, 1.0}


@torch.no_grad()
def test_logabsdet_does_not_add_up_roundings():
    # In plain float32 these additions to a sum of 69 lose 8e-4.
    matrix = additive(1, init=torch.full((1, 1), 1e30))
    expected = math.log(matrix.frozen.item())
    for merge in range(2000):
        set_factors(matrix, 0.01 * matrix.frozen * (1 if merge % 2 else -1), 1.0)
        expected += math.log(1 + (matrix.v.mT @ matrix.inverse_frozen @ matrix.u).item())
        assert matrix.merge()
    assert abs(matrix.logabsdet_frozen.item() - expected) < 1e-5


UPDATE = MergeBounds(update=(-1.0, 1.5))
DETERMINANT = MergeBounds(update=(-9.0, 9.0), logabsdet=(-2.0, 1.0))


def multiplying(factor, bounds=UPDATE, **kwargs):
    """A matrix with det A = 1/2 and a perturbation that multiplies its determinant by `factor`."""
    matrix = additive(2, init=math.sqrt(0.5) * torch.eye(2), bounds=bounds, **kwargs)
    set_factors(matrix, [[(factor - 1) * math.sqrt(0.5)], [0.0]], [[1.0], [0.5]])
    return matrix


def state_of(matrix):
    return {name: value.clone() for name, value in matrix.state_dict().items()}


def assert_unchanged(matrix, state):
    for name, value in matrix.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("bounds", "factor"),
    [
        (UPDATE, 4.4),  # ln 4.4 = 1.48
        (UPDATE, -0.4),  # ln 0.4 = -0.92
        (DETERMINANT, -5.4),  # ln 2.7 = 0.99
        (DETERMINANT, 0.28),  # ln 0.14 = -1.97
        (MergeBounds(), 400.0),
        (MergeBounds.paper(), 1e6),
        (MergeBounds.paper(), 0.17),  # ln 0.085 = -2.47
    ],
)
@torch.no_grad()
def test_a_merge_inside_its_bounds_is_accepted(bounds, factor):
    matrix = multiplying(factor, bounds)
    outcome = matrix.attempt_merge()
    assert [mask.item() for mask in outcome] == [True, False, False]
    torch.testing.assert_close(matrix.logabsdet_frozen.exp(), torch.tensor(abs(factor) / 2))


@pytest.mark.parametrize(
    ("bounds", "factor"),
    [
        (UPDATE, 4.6),
        (UPDATE, -0.36),
        (DETERMINANT, -5.6),
        (DETERMINANT, 0.26),
        (MergeBounds(), 410.0),
        (MergeBounds(), 0.0024),
        (MergeBounds(update=(-6.0, math.inf), logabsdet=(-2.5, 13.0)), 1e6),  # ln 5e5 = 13.1
        (MergeBounds.paper(), 0.16),
    ],
)
@torch.no_grad()
def test_a_merge_outside_its_bounds_waits_for_force(bounds, factor):
    matrix = multiplying(factor, bounds)
    state, dense = state_of(matrix), matrix.dense()
    outcome = matrix.attempt_merge()
    assert [mask.item() for mask in outcome] == [False, False, False]
    assert_unchanged(matrix, state)
    outcome = matrix.attempt_merge(force=True)
    assert [mask.item() for mask in outcome] == [True, True, False]
    torch.testing.assert_close(matrix.frozen, dense)
    assert matrix.sign == math.copysign(1.0, factor)


SINGULAR = [[-1.0], [0.0]], [[1.0], [1.0]]  # I + u vᵀ = [[0, −1], [0, 1]]


@pytest.mark.parametrize(
    ("init", "u", "v"),
    [
        (1.0, *SINGULAR),
        (1.0, [[3e38], [1.0]], [[10.0], [1.0]]),
        (1.0, [[3e38], [3e38]], [[1.0], [1.0]]),
        (1e-5, [[1e18], [0.0]], [[1e18], [0.0]]),  # A + u vᵀ is finite, G is not
        (1e-15, [[1e10], [0.0]], [[0.0], [1e10]]),  # G = 1, A⁻¹u vᵀA⁻¹ is not finite
    ],
    ids=["singular", "huge", "infinite-sum", "infinite-G", "infinite-inverse"],
)
@pytest.mark.parametrize("bounds", [MergeBounds(), MergeBounds.paper(), FREE])
@torch.no_grad()
def test_a_force_beyond_the_dtype_resets(init, u, v, bounds):
    matrix = additive(2, init=init * torch.eye(2), bounds=bounds)
    set_factors(matrix, u, v)
    assert_beyond(matrix)


@torch.no_grad()
def assert_beyond(matrix):
    """Not merged, and thrown away where it is to be forced."""
    state = state_of(matrix)
    assert not matrix.merge().any()
    assert_unchanged(matrix, state)
    outcome = matrix.attempt_merge(force=True)
    assert [mask.item() for mask in outcome] == [False, False, True]
    assert not matrix.u.any() and matrix.draws == state["draws"] + 1
    for name in ("frozen", "inverse_frozen", "sign", "logabsdet_frozen", "logabsdet_carry"):
        assert torch.equal(getattr(matrix, name), state[name]), name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_singular_perturbation_of_rank_two_is_reset_when_forced(kind):
    matrix = InvertibleMatrix(3, rank=2, perturbation=kind)
    set_factors(matrix, [[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], torch.eye(3, 2))
    matrix.dense()
    assert_beyond(matrix)


@pytest.mark.parametrize(("dtype", "merges"), [(torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_forced_merge_cannot_annihilate_a_matrix(kind, dtype, merges):
    """u of 1e10 leaves nothing of A in float32, and six digits in float64."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix = InvertibleMatrix(8, rank=1, init=start.to(dtype), perturbation=kind)
    set_factors(matrix, 1e10 * torch.randn(8, 1, generator=generator), matrix.v)
    if not merges:
        assert_beyond(matrix)
        return
    assert matrix.merge(force=True)
    error = matrix.error()
    assert not error.wrong_sign and error.ratio <= 30
    assert error.logabsdet < 8 * torch.finfo(dtype).eps * error.condition


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bounds_look_at_each_singular_value(kind):
    """det G = 1, and still a merge that would lose ten digits."""
    matrix = InvertibleMatrix(2, perturbation=kind, rank=2)
    stretch = torch.diag(torch.tensor([1e5, 1e-5], dtype=torch.float64))
    set_factors(matrix, stretch - torch.eye(2), torch.eye(2))
    assert matrix.slogdet()[1].abs() < 1e-2
    state = state_of(matrix)
    assert not matrix.merge()
    assert_unchanged(matrix, state)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.lists(st.floats(-37, 37), min_size=3, max_size=3),
    st.integers(0, 1000),
)
@torch.no_grad()
def test_frozen_state_is_never_non_finite(kind, rank, magnitudes, seed):
    """Matrices, u and v of any magnitude in float32, forced."""
    generator = torch.Generator().manual_seed(seed)
    init, u, v = (10.0**magnitude for magnitude in magnitudes)
    start = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    matrix = InvertibleMatrix(3, rank=rank, init=(init * start).float(), perturbation=kind)
    noise = torch.randn(2, 3, rank, generator=generator)
    # That of a relative perturbation is only drawn.
    set_factors(matrix, u * noise[0], v * noise[1] if kind == "additive" else matrix.v)
    matrix.merge(force=True)
    for name, buffer in matrix.named_buffers():
        assert buffer.isfinite().all(), name
    matrix.correct()
    for name, buffer in matrix.named_buffers():
        assert buffer.isfinite().all(), name


@pytest.mark.parametrize("factor", ["u", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("force", [False, True])
@torch.no_grad()
def test_a_perturbation_that_is_not_finite_is_thrown_away(factor, value, force):
    matrix = multiplying(1.5)
    state = state_of(matrix)
    getattr(matrix, factor)[1] = value
    outcome = matrix.attempt_merge(force)
    assert [mask.item() for mask in outcome] == [False, False, True]
    assert torch.equal(matrix.u, torch.zeros(2, 1))
    assert matrix.v.isfinite().all()
    assert not torch.equal(matrix.v, state["v"])
    for name in ("frozen", "inverse_frozen", "sign", "logabsdet_frozen", "logabsdet_carry"):
        assert torch.equal(getattr(matrix, name), state[name]), name


@torch.no_grad()
def test_in_a_batch_each_matrix_has_its_own_fate():
    matrix = additive(2, batch_shape=(2, 2))
    fates = torch.tensor([[1.5, math.nan], [1000.0, 0.0]])  # merged, reset, skipped, singular
    set_factors(matrix, 0.0, torch.tensor([[1.0], [0.5]]))
    matrix.u[..., 0, 0] = fates - 1
    state = state_of(matrix)
    outcome = matrix.attempt_merge()
    assert outcome.merged.tolist() == [[True, False], [False, False]]
    assert outcome.reset.tolist() == [[False, True], [False, False]]
    assert not outcome.forced.any()
    changed = {
        name: (value != state[name]).reshape(2, 2, -1).any(-1)
        for name, value in state_of(matrix).items()
        if name != "kind"
    }
    merged = torch.tensor([[True, False], [False, False]])
    redrawn = torch.tensor([[True, True], [False, False]])
    for name in ("frozen", "inverse_frozen", "logabsdet_frozen"):
        assert torch.equal(changed[name], merged), name
    for name in ("u", "v", "draws"):
        assert torch.equal(changed[name], redrawn), name

    outcome = matrix.attempt_merge(force=True)
    assert outcome.forced.tolist() == [[False, False], [True, False]]
    assert outcome.merged.tolist() == [[True, True], [True, False]]
    assert matrix.error().worst().right < 1e-4
    assert matrix.error().worst().logabsdet < 1e-5


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_a_batch_merges_as_its_members_do(seed):
    together = InvertibleMatrix(4, batch_shape=(3,), rank=2).double()
    generator = torch.Generator().manual_seed(seed)
    alone = [InvertibleMatrix(4, rank=2).double() for _ in range(3)]
    for index, matrix in enumerate(alone):
        state = {name: value[index] for name, value in together.state_dict().items() if value.dim()}
        matrix.load_state_dict({**matrix.state_dict(), **state})
    # Batched products round in another order; what that may change, a small G amplifies.
    amplified = torch.ones(3, dtype=torch.float64)
    for _ in range(3):
        perturb(together, generator)
        amplified *= torch.linalg.cond(torch.eye(2) + together.v.mT @ together.u)
        for index, matrix in enumerate(alone):
            set_factors(matrix, together.u[index], together.v[index])
        accepted = together.merge(force=True)
        assert accepted.tolist() == [matrix.merge(force=True).item() for matrix in alone]
    for index, matrix in enumerate(alone):
        rounding = 100 * torch.finfo(torch.float64).eps * amplified[index].item()
        rounding *= max(matrix.error().condition.item(), 1.0)
        assert rounding < 1e-4
        for name, value in matrix.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    together.state_dict()[name][index], value, rtol=rounding, atol=rounding
                )
        assert (matrix.frozen - torch.eye(4)).abs().max() > 0.1


@torch.no_grad()
def test_reset_keeps_the_frozen_matrix():
    matrix = multiplying(1.5)
    state = state_of(matrix)
    matrix.reset()
    assert torch.equal(matrix.dense(), state["frozen"])
    assert not torch.equal(matrix.v, state["v"])
    assert matrix.draws == state["draws"] + 1


@torch.no_grad()
def test_train_eval_and_reading_change_nothing():
    matrix = multiplying(1.5)
    state, random = state_of(matrix), torch.get_rng_state()
    matrix.eval()
    matrix.train()
    for read in (matrix.dense, matrix.inverse, matrix.slogdet, matrix.penalty):
        read()
    assert_unchanged(matrix, state)
    matrix.merge()
    assert torch.equal(torch.get_rng_state(), random)
