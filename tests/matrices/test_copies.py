"""State that travels: state_dict, deepcopy, pickle, stacking; and v as a function of it."""

import copy
import pickle

import pytest
import torch

from matrices.perturbing import KINDS, additive, perturb, set_factors
from p4flows.matrices import InvertibleMatrix


def moved(seed=0, **arguments):
    torch.manual_seed(seed)
    matrix = InvertibleMatrix(4, **{"rank": 2, **arguments})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        perturb(matrix, generator)
        assert matrix.merge(force=True).all()
    perturb(matrix, generator)
    return matrix


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def through_state_dict(matrix):
    copied = moved(seed=9)
    copied.load_state_dict(matrix.state_dict())
    return copied


@pytest.mark.parametrize(
    "copied",
    [through_state_dict, copy.deepcopy, lambda matrix: pickle.loads(pickle.dumps(matrix))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_a_copy_goes_on_as_the_original_does(copied):
    matrix = moved()
    matrix.dense().sum().backward()
    twin = copied(matrix)
    assert_same(matrix, twin)
    assert twin.bounds == matrix.bounds
    for seed in range(3):
        for each in (matrix, twin):
            torch.manual_seed(each is twin)  # the global random state has no say
            perturb(each, torch.Generator().manual_seed(seed))
            assert each.merge()
        assert_same(matrix, twin)
    set_factors(twin, 1.0, 1.0)
    assert not torch.equal(matrix.u, twin.u)


def test_matrices_draw_different_v():
    torch.manual_seed(0)
    matrix, other = additive(4), additive(4, batch_shape=(3,))
    drawn = torch.cat([matrix.v.detach().unsqueeze(0), other.v.detach()])
    assert len(drawn.flatten().unique()) == 16
    torch.manual_seed(0)
    assert torch.equal(additive(4).v, matrix.v)


@torch.no_grad()
def test_v_follows_seed_and_counter_that_are_saved():
    matrix = moved(perturbation="additive")
    state = copy.deepcopy(matrix.state_dict())
    assert state["draws"] == 3
    drawn = {}
    for name, change in {"same": {}, "seed": {"seed": 1}, "counter": {"draws": 1}}.items():
        changed = {key: value + change.get(key, 0) for key, value in state.items()}
        torch.manual_seed(len(drawn))  # has no say
        matrix.load_state_dict(changed)
        matrix.reset()
        drawn[name] = matrix.v.clone()
        matrix.load_state_dict(changed)
        assert matrix.merge()
        assert torch.equal(matrix.v, drawn[name])
    matrix.load_state_dict(state)
    matrix.reset()
    assert torch.equal(matrix.v, drawn["same"])
    for name in ("seed", "counter"):
        assert not torch.isclose(drawn[name], drawn["same"]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_other_perturbation_is_refused(kind):
    matrix = moved(perturbation=kind)
    (other,) = set(KINDS) - {kind}
    state, before = moved(perturbation=other).state_dict(), copy.deepcopy(matrix.state_dict())
    with pytest.raises(
        RuntimeError, match=f"saved with perturbation='{other}' and has '{kind}': build it with"
    ):
        matrix.load_state_dict(state)
    for name, value in matrix.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_change_of_dtype():
    matrix = moved()
    assert 1e-9 < matrix.error().worst().right < 1e-5
    matrix.double()
    assert matrix.error().worst().right < 1e-13
    assert matrix.seed.dtype == matrix.draws.dtype == torch.int64
    assert matrix.merge(force=True)
    assert matrix.v.dtype == torch.float64
